"""Presets hold together, digests name settings, and every wrong override is refused in one line that helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.unet import UNet
from pipeline.errors import UserError
from pipeline.presets import PRESETS, load_config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_and_build_their_network(name):
    config = PRESETS[name]
    assert config.preset == name
    assert Config.model_validate(config.model_dump()) == config
    net = config.network
    with torch.device("meta"):
        UNet(**net.model_dump(), feature_channels=192, feature_rate=net.image_size // config.features.grid)
    process = DiffusionProcess.from_schedule(config.schedule).respaced(config.scoring.respaced_steps)
    assert max(config.scoring.timesteps) < len(process)


@pytest.mark.parametrize("name", ["demo", "fast"])
def test_features_come_on_the_grid_of_the_preset(name):
    net, grid = PRESETS[name].network, PRESETS[name].features.grid
    network = UNet(**net.model_dump(), feature_channels=8, feature_rate=net.image_size // grid)
    with torch.no_grad():
        found = network(torch.zeros(1, 3, net.image_size, net.image_size), torch.tensor([20]))
    assert found.features.shape == (1, 8, grid, grid)


def test_paper_preset_is_the_published_recipe():
    paper = PRESETS["paper"]
    assert (paper.network.image_size, paper.network.model_channels, paper.features.grid) == (256, 256, 64)
    training = paper.training
    assert (training.iterations, training.batch_size, training.learning_rate) == (10_000, 2, 1e-4)
    assert (training.ema_decay, training.weight_decay, training.rotation_degrees) == (0.997, 0, 5)
    assert (paper.scoring.timesteps, paper.scoring.respaced_steps, paper.scoring.alpha) == ((5, 50, 100), 250, 0.5)
    assert PRESETS["unified"].training.iterations == 20_000


def test_training_covers_the_timesteps_that_scoring_looks_at():
    for config in PRESETS.values():
        process = DiffusionProcess.from_schedule(config.schedule).respaced(config.scoring.respaced_steps)
        seen = process.network_timesteps(torch.tensor(config.scoring.timesteps))
        assert seen.max() < config.training.max_timestep


def test_digest_names_the_settings_and_not_the_preset():
    demo = PRESETS["demo"]
    assert demo.digest() == demo.model_copy(update={"preset": "renamed"}).digest()
    assert demo.digest() == Config.model_validate_json(demo.model_dump_json()).digest()
    assert demo.digest() != load_config("demo", ["training.seed=1"]).digest()
    assert load_config("demo", ["training.seed=0"]).digest() == demo.digest()
    assert len({config.digest() for config in PRESETS.values()}) == len(PRESETS)
    assert all(len(config.digest()) == 12 and int(config.digest(), 16) for config in PRESETS.values())


@pytest.mark.slow
def test_digest_is_the_same_in_another_process():
    command = "from pipeline.presets import PRESETS; print(PRESETS['fast'].digest())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    answer = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == PRESETS["fast"].digest()


def test_overrides_reach_their_fields_and_no_others():
    config = load_config(
        "demo",
        [
            "training.iterations=100",
            "training.learning_rate=1e-3",
            "training.precision=float32",
            "scoring.timesteps=[2, 30]",
            "scoring.covariance=none",
            "schedule=cosine",
        ],
    )
    assert (config.training.iterations, config.training.learning_rate) == (100, 1e-3)
    assert (config.training.precision, config.schedule) == ("float32", "cosine")
    assert (config.scoring.timesteps, config.scoring.covariance) == ((2, 30), "none")
    assert config.network == PRESETS["demo"].network
    assert config.training.batch_size == PRESETS["demo"].training.batch_size
    assert PRESETS["demo"].training.iterations != 100


def test_null_leaves_the_weight_of_the_branches_to_each_model():
    assert load_config("demo", ["scoring.alpha=null"]).scoring.alpha is None


def test_the_last_of_two_overrides_wins():
    assert load_config("demo", ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_overrides_may_change_fields_that_only_fit_together():
    config = load_config("demo", ["network.image_size=32", "features.grid=16"])
    assert (config.network.image_size, config.features.grid) == (32, 16)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.iterations=many", "training.iterations: .*integer.*'many'"),
        ("training.iterations=-1", "training.iterations: .*greater than or equal to 0"),
        ("scoring.alpha=2", "scoring.alpha: .*less than or equal to 1.*given 2"),
        ("training.precision=float16", "training.precision: .*'bfloat16' or 'float32'"),
        ("schedule=sqrt", "schedule: .*'linear' or 'cosine'"),
        ("scoring.timesteps=[5, 250]", r"scoring.timesteps = \(5, 250\): each must be below respaced_steps \(250\)"),
        ("training.max_timestep=300", "training.max_timestep = 300: scoring.timesteps reach 401 of 1000"),
        ("training.iterations=0", 'only scoring.method = "features" does without a trained network'),
        ("scoring.pixel=distance", 'with scoring.method = "noise" choose "kl" or "gaussian"'),
        ("scoring.pixel=none", 'with scoring.method = "noise" choose "kl" or "gaussian"'),
        ("scoring.restoration.weight=-1", "scoring.restoration.weight: .*greater than or equal to 0"),
        ("scoring.restoration=1", "expected SECTION.FIELD=VALUE"),
        ("scoring.timesteps=[-1]", "scoring.timesteps"),
        ("scoring.timesteps=[]", "scoring.timesteps"),
        ("scoring.respaced_steps=2000", "scoring.respaced_steps: .*1000"),
        ("scoring.kl_sigma=Infinity", "scoring.kl_sigma: .*finite"),
        ("scoring.map_size=100", r"scoring.map_size = 100: must be a multiple of network.image_size \(64\)"),
        ("features.grid=20", "features.grid = 20: .*must be one of"),
        ("features.stages=[]", "features.stages"),
        ("network.channel_mult=[]", "network.channel_mult"),
        ("network.num_head_channels=40", "network.num_head_channels = 40: must divide 192"),
        ("training.iteration=5", "training.iteration=5: expected SECTION.FIELD=VALUE"),
        ("trainings.iterations=5", "expected SECTION.FIELD=VALUE"),
        ("training.seed.x=5", "expected SECTION.FIELD=VALUE"),
        ("training=5", "expected SECTION.FIELD=VALUE"),
        ("training.iterations", "expected SECTION.FIELD=VALUE"),
        ("", "expected SECTION.FIELD=VALUE"),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(override, told):
    with pytest.raises(UserError, match=told) as caught:
        load_config("demo", [override])
    text = str(caught.value)
    assert text.startswith("--set ")
    assert "\n" not in text
    assert len(text) < 200


def test_ways_of_scoring_have_their_own_pixel_branches():
    config = load_config("texture", ["scoring.restoration.weight=1.5", "scoring.pixel=distance"])
    assert (config.scoring.restoration.weight, config.scoring.pixel) == (1.5, "distance")
    for preset, override, told in (
        ("texture", "scoring.pixel=kl", 'with scoring.method = "restoration" choose "distance" or "gaussian"'),
        ("gaussian", "scoring.pixel=kl", 'with scoring.method = "features" choose "none"'),
        ("gaussian", "scoring.alpha=0.5", "needs scoring.alpha = 0"),
        ("gaussian", "scoring.normalisation=image", 'only with scoring.method = "noise"'),
        ("texture", "scoring.normalisation=image", 'only with scoring.method = "noise"'),
        ("texture", "training.max_timestep=231", "scoring.timesteps reach 231 of 1000"),
        ("fast", "scoring.restoration.eta=0", 'only scoring.method = "restoration" looks at it'),
        ("demo", "scoring.place_reach=1", 'needs scoring.covariance "place" or "select"'),
        ("gaussian", "scoring.place_reach=9", "less than or equal to 8"),
        ("demo", "scoring.place_turns=true", 'needs scoring.covariance "place", "kind" or "select"'),
        ("fast", "scoring.place_turns=true scoring.prediction=subtract", 'scoring.prediction other than "subtract"'),
        ("texture", "scoring.covariance=kind scoring.prediction=ignore scoring.kinds=0", "needs scoring.kinds"),
        ("fast", "scoring.covariance=kind", 'scoring.prediction = "ignore"'),
        ("gaussian", "scoring.prediction=subtract", 'and scoring.prediction = "ignore"'),
    ):
        with pytest.raises(UserError, match=told):
            load_config(preset, override.split())


def test_digests_leave_out_what_a_way_of_scoring_does_not_look_at():
    former = ["training.feature_weight=1", "scoring.place_turns=false", "scoring.kinds=0", "scoring.top_pixels=1"]
    texture = load_config("texture", former)
    assert texture.digest() == "ffed4e33692a", "models of earlier releases count as trained with what they knew"
    assert texture.digest() != load_config("texture", [*former, "scoring.place_reach=1"]).digest()
    then = ["training.feature_weight=1", "features.context_stages=[4]"]
    general = [*then, "scoring.covariance=general", "scoring.context_weight=0"]
    for unasked in ("scoring.place_reach=0", "scoring.place_turns=false", "scoring.context_cells=7", "scoring.kinds=7"):
        assert load_config("fast", [*general, unasked]).digest() == "83699213ea31"
    for asked in ("scoring.context_cells=7", "scoring.kinds=7", "scoring.kinds=0"):
        assert load_config("fast").digest() != load_config("fast", [asked]).digest()
    assert texture.digest() != load_config("texture", ["scoring.restoration.weight=1"]).digest()
    stored = texture.model_copy(update={"training": texture.training.model_copy(update={"max_timestep": 100})})
    assert Config.model_validate_json(stored.model_dump_json()) == stored, "what is stored stays readable"


def test_unknown_fields_are_refused():
    for extra in ({"colour": 1}, {"training": {"iteration": 5}}, {"scoring": {"Alpha": 0.5}}):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            Config.model_validate(extra)


def test_settings_cannot_be_changed():
    config = load_config("demo")
    with pytest.raises(ValidationError, match="frozen"):
        config.training.iterations = 5
    with pytest.raises(ValidationError, match="frozen"):
        config.preset = "mine"


def test_every_setting_is_explained():
    def undocumented(schema):
        return [name for name, field in schema["properties"].items() if not field.get("description")]

    schema = Config.model_json_schema()
    for name, section in schema["$defs"].items():
        assert not undocumented(section), name
    assert json.dumps(schema)  # plain JSON: other tools may read it
