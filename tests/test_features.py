"""The frozen extractors load without a network, know a cat when they see one, and keep their contract."""

from __future__ import annotations

import socket
from copy import deepcopy

import pytest
import skimage.data
import skimage.transform
import timm
import torch
from timm.layers import Conv2dSame
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import FeatureConfig
from pipeline.errors import UserError
from pipeline.features import OFFLINE_WEIGHTS, FeatureExtractor, load_backbone, offline_weights, resize_features
from pipeline.relu6 import IntegerReLU6
from pipeline.same_padding import SameConv2d, use_same_convolutions

LITE0 = "tf_efficientnet_lite0"
EGYPTIAN_CAT = 285  # ImageNet's class index


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("this test allows no network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # spares its half minute of retries


def cat():
    """The cat of scikit-image, (1, 3, 224, 224) in [-1, 1]."""
    square = skimage.data.chelsea()[:, 75:375]
    pixels = skimage.transform.resize(square, (224, 224), anti_aliasing=True)
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None] * 2 - 1


def whole_network(name):
    network = timm.create_model(name, pretrained=False)
    network.load_state_dict(offline_weights(name))
    return network.eval()


@pytest.mark.parametrize("name", sorted(OFFLINE_WEIGHTS))
def test_packaged_weights_recognise_a_cat(no_network, name):
    with torch.no_grad():
        assert whole_network(name)(cat()).argmax().item() == EGYPTIAN_CAT


@pytest.mark.parametrize(
    ("name", "channels"),
    [(LITE0, 16 + 24 + 40 + 112), ("tf_efficientnet_lite1", 192), ("tf_efficientnet_lite2", 16 + 24 + 48 + 120)],
)
def test_packaged_extractors_load_without_a_network(no_network, name, channels):
    extractor = FeatureExtractor(name, stages=(0, 1, 2, 3), grid=16)
    assert extractor.channels == channels
    found = extractor(torch.zeros(2, 3, 64, 64)).details
    assert found.shape == (2, channels, 16, 16)
    assert found.dtype == torch.float32
    assert found.std() > 0


def test_features_are_the_stages_of_the_whole_network():
    extractor = FeatureExtractor(LITE0, stages=(1, 3), grid=14)
    assert extractor.channels == 24 + 112
    with torch.no_grad():
        found = extractor(cat()).details
        stages = whole_network(LITE0).forward_intermediates(cat(), indices=[1, 3], intermediates_only=True)
    assert [tuple(stage.shape[1:]) for stage in stages] == [(24, 56, 56), (112, 14, 14)]
    torch.testing.assert_close(found[:, :24], stages[0].reshape(1, 24, 14, 4, 14, 4).mean((3, 5)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 24:], stages[1], rtol=1e-4, atol=1e-4)


def test_context_is_deeper_coarser_and_only_there_when_asked_for():
    config = FeatureConfig(stages=(0, 2), context_stages=(2, 4), grid=28, neighbourhood=3)
    extractor, without = (FeatureExtractor.of(config, context=context) for context in (True, False))
    assert extractor.stage_channels == {0: 16, 2: 40, 4: 320}
    with torch.no_grad():
        found = extractor(cat())
        alone = without(cat())
        deep = whole_network(LITE0).forward_intermediates(cat(), indices=[2, 4], intermediates_only=True)
    assert (found.details.shape, found.context.shape) == ((1, 56, 28, 28), (1, 360, 14, 14))
    torch.testing.assert_close(alone.details, found.details)
    assert alone.context is None
    averaged = torch.nn.functional.avg_pool2d(deep[0], 2)[:, :, 5:8, 3:6].mean((2, 3))
    torch.testing.assert_close(found.context[:, :40, 6, 4], averaged)


def test_blocks_that_nobody_asks_for_are_not_computed():
    def products(stages):
        with FlopCounterMode(display=False) as counted:
            FeatureExtractor(LITE0, stages=stages, grid=8)(torch.zeros(1, 3, 64, 64))
        return counted.get_total_flops()

    assert products((0,)) < products((1,)) < products((2,)) < products((0, 3)) < 0.8 * products((3, 4))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "side"),
    [(3, 2, 1, (8, 10)), (5, 2, 1, (8, 8)), (5, 2, 1, (9, 8)), (3, 2, 1, (7, 7)), (5, 1, 1, (6, 6)), (3, 2, 2, (8, 8))],
)
def test_same_convolutions_sum_the_same_products_as_padded_copies(kernel, stride, dilation, side):
    torch.manual_seed(0)
    padded = Conv2dSame(6, 6, kernel, stride=stride, dilation=dilation, groups=3)
    network = torch.nn.Sequential(deepcopy(padded))
    use_same_convolutions(network)
    assert type(network[0]) is SameConv2d
    x = torch.randn(2, 6, *side)
    torch.testing.assert_close(network(x), padded(x))


@pytest.mark.parametrize("side", [64, 65])
def test_extractors_do_without_padded_copies_and_say_the_same(side):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        backbone = load_backbone(LITE0, (0, 1, 2, 3, 4), folded=False)
        assert sum(type(module) is SameConv2d for module in backbone.modules()) == 5
        x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        stages = whole_network(LITE0).to(memory_format=torch.channels_last)
        expected = stages.forward_intermediates(x, indices=[0, 1, 2, 3, 4], intermediates_only=True)
        for found, each in zip(backbone.to(memory_format=torch.channels_last)(x), expected, strict=True):
            torch.testing.assert_close(found, each)


@pytest.mark.parametrize("name", sorted(OFFLINE_WEIGHTS))
def test_folded_extractors_have_no_batch_norm_and_say_the_same(name):
    folded, plain = (load_backbone(name, (0, 1, 2, 3, 4), folded=each) for each in (True, False))
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in each.modules()) for each in (folded, plain)]
    assert norms[0] == 0 < norms[1]
    with torch.no_grad():
        exact = plain(cat())
        for found, each in zip(folded(cat()), exact, strict=True):
            torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-4)
        # Weights are rounded anew, which costs little beside what activations lose by rounding.
        with torch.autocast("cpu", torch.bfloat16):
            errors = [
                [(found - each).square().mean().sqrt() for found, each in zip(network(cat()), exact, strict=True)]
                for network in (folded, plain)
            ]
    assert torch.tensor(errors[0]).div(torch.tensor(errors[1])).max() < 2


@pytest.mark.parametrize("inplace", [True, False])
def test_relu6_of_every_bfloat16_number_is_pytorchs(inplace):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]  # 65 282, infinities and denormal ones among them
    given = numbers.clone()
    found = IntegerReLU6(inplace=inplace)(given)
    assert torch.equal(found, torch.nn.functional.relu6(numbers))
    assert (found.data_ptr() == given.data_ptr()) == inplace
    assert torch.equal(given, found if inplace else numbers)


def test_relu6_passes_gradients_and_other_precisions_on():
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.tensor([-1.0, 3.0, 7.0], dtype=dtype, requires_grad=True)
        IntegerReLU6()(x).sum().backward()
        assert x.grad.tolist() == [0, 1, 0]
    assert IntegerReLU6()(torch.tensor([-1.0, 3.5, 7.0])).tolist() == [0, 3.5, 6]


def test_extractors_use_it_and_say_the_same():
    x = cat().to(memory_format=torch.channels_last)
    ours = load_backbone(LITE0, [0, 1, 2, 3])
    plain = deepcopy(ours)
    for module in plain.modules():
        if type(module) is IntegerReLU6:
            module.__class__ = torch.nn.ReLU6
    seen = []
    for module in ours.modules():
        if type(module) is IntegerReLU6:
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(ours(x), plain(x), strict=True):
            assert torch.equal(found, expected)
    assert len(seen) > 20
    assert {*seen} == {torch.bfloat16}


def test_lite_extractors_take_the_diffusion_range_as_it_is():
    extractor = FeatureExtractor(LITE0, stages=(0,), grid=112)
    with torch.no_grad():
        torch.testing.assert_close(extractor(cat()).details, extractor.backbone(cat())[0])


def test_other_normalisations_are_converted():
    extractor = FeatureExtractor(LITE0, stages=(0,), grid=112)
    expected = extractor(cat()).details
    extractor.mean, extractor.std = torch.full((1, 3, 1, 1), 0.25), torch.full((1, 3, 1, 1), 0.125)
    # What this extractor must be shown so that its backbone sees the cat: pixel = 0.25 + 0.125 cat, in [0, 1].
    shown = 2 * (0.25 + 0.125 * cat()) - 1
    torch.testing.assert_close(extractor(shown).details, expected, rtol=1e-3, atol=1e-4)


def test_extractor_is_frozen_but_lets_gradients_reach_the_image():
    extractor = FeatureExtractor(LITE0, stages=(0, 1), grid=8)
    before = {k: v.clone() for k, v in extractor.state_dict().items()}
    assert extractor.train() is extractor
    assert not any(module.training for module in extractor.modules())
    x = cat()[..., :32, :32].clone().requires_grad_()
    extractor(x).details.square().mean().backward()
    assert x.grad.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in extractor.parameters())
    for key, value in extractor.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_unknown_extractor_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"no model 'efficientnet_b99'.*tf_efficientnet_lite0") as caught:
        FeatureExtractor("efficientnet_b99", stages=(0,), grid=8)
    assert "\n" not in str(caught.value)


def test_extractor_whose_weights_are_out_of_reach_names_the_offline_ones(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"no weights for resnet18.*offline use one of tf_efficientnet_lite0") as caught:
        load_backbone("resnet18", (0, 1))
    assert "\n" not in str(caught.value)


def test_resizing_averages_whole_cells_and_interpolates_otherwise():
    ramp = torch.arange(12.0).repeat(1, 2, 12, 1)
    assert resize_features(ramp, 12) is ramp
    torch.testing.assert_close(resize_features(ramp, 4)[0, 0, 0], torch.tensor([1.0, 4.0, 7.0, 10.0]))
    torch.testing.assert_close(resize_features(ramp, 8)[0, 1, 3], torch.arange(8) * 1.5 + 0.25)
    # Bilinear interpolation keeps a ramp a ramp, except in the outermost half cell.
    torch.testing.assert_close(resize_features(ramp, 24)[0, 0, 0, 1:-1], (torch.arange(1, 23) + 0.5) / 2 - 0.5)


def test_a_larger_input_gives_finer_features():
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, larger = (
        FeatureExtractor("tf_efficientnet_lite0", stages=(0, 1), grid=16, input_size=size) for size in (None, 64)
    )
    enlarged = torch.nn.functional.interpolate(x, size=(64, 64), mode="bicubic", align_corners=False)
    # Normalised before or after it is enlarged: another rounding.
    torch.testing.assert_close(larger(x).details, plain(enlarged).details, rtol=1e-5, atol=5e-5)
    assert not torch.allclose(larger(x).details, plain(x).details, atol=0.1)
