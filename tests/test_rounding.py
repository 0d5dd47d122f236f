"""Weights rounded once give, number for number, what autocast makes of them at every call; what is stored stays exact."""

from __future__ import annotations

import pytest
import timm
import torch

from pipeline.diffusion.unet import UNet
from pipeline.evidence import evidence_source
from pipeline.features import FeatureExtractor
from pipeline.images import to_unit_range
from pipeline.rounding import rounded_once


@pytest.fixture
def network():
    """With attention, residual blocks that halve and double, classes and a feature head, none at its initial zeros."""
    torch.manual_seed(0)
    network = UNet(
        image_size=16,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_head_channels=32,
        num_classes=3,
        feature_channels=5,
        feature_rate=2,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.to(memory_format=torch.channels_last)


def noisy():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def ask(network, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return network(x, torch.tensor([3, 80]), torch.tensor([0, 2]))


def test_a_network_rounded_once_answers_the_same(network):
    with torch.inference_mode():
        answers = [ask(each, noisy()) for each in (rounded_once(network), network)]
    for found, wanted in zip(*answers, strict=True):
        assert wanted.std() > 0
        assert torch.equal(found, wanted)


def test_gradients_pass_through_a_network_rounded_once_as_before(network):
    """As restoring by descent needs them."""
    x = noisy().requires_grad_()
    found, wanted = (
        torch.autograd.grad(ask(each, x).prediction.square().sum(), x)[0] for each in (rounded_once(network), network)
    )
    assert wanted.std() > 0
    assert torch.equal(found, wanted)


def test_the_given_network_stays_exact(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    twin = rounded_once(network)
    assert twin.input_blocks[0][0].weight.dtype == torch.bfloat16
    assert twin.feature_head is network.feature_head
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_an_efficientnet_rounded_once_sees_the_same():
    extractor = FeatureExtractor(
        "tf_efficientnet_lite0", stages=(0, 1, 2), context_stages=(4,), grid=16, input_size=64
    ).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    twin = extractor.rounded_once()
    assert {p.dtype for p in twin.backbone.conv_stem.parameters()} == {torch.bfloat16}
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for found, wanted in zip(twin(x), extractor(x), strict=True):
            assert torch.equal(found, wanted)


def test_other_extractors_keep_their_weights(monkeypatch):
    untrained = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(1,))
    monkeypatch.setattr("pipeline.features.load_backbone", lambda *_, **__: untrained)
    extractor = FeatureExtractor("resnet18", stages=(1,), grid=8)
    assert extractor.rounded_once() is extractor


def test_scorers_of_float32_networks_round_nothing(calibrated):
    scorer = calibrated(training={"precision": "float32"})
    assert scorer.source.denoiser is scorer.denoiser
    assert scorer.source.extractor is scorer.extractor


def test_scorers_keep_the_weights_that_are_stored(calibrated):
    scorer = calibrated(training={"precision": "bfloat16"})
    dtypes = {tensor.dtype for tensor in scorer.source.denoiser.state_dict().values()}
    assert torch.bfloat16 in dtypes
    assert {tensor.dtype for tensor in scorer.denoiser.state_dict().values()} == {torch.float32}


def test_scorers_see_what_the_stored_weights_would_show(calibrated, fresh):
    scorer = calibrated(training={"precision": "bfloat16"})
    found = scorer.evidence(fresh[:4])
    plain = evidence_source(scorer.config, scorer.denoiser, scorer.extractor, None)
    with torch.inference_mode():
        x = torch.from_numpy(to_unit_range(fresh[:4])).contiguous(memory_format=torch.channels_last)
        wanted = plain(x, 4)
    for name in ("pixel", "denoising", "features", "residuals"):
        assert getattr(wanted, name).std() > 0
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
