"""The U-Net computes what a plain rewriting of the published architecture computes from the same tensors."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.diffusion.doubling import DoublingConv2d, doubling_kernel
from pipeline.diffusion.group_norm import GroupNorm
from pipeline.diffusion.unet import UNet, modulated, timestep_embedding
from pipeline.presets import PRESETS

SMALL = {
    "image_size": 16,
    "model_channels": 32,
    "num_res_blocks": 2,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
}
CLASSES = 5


# ---- The published architecture, written a second time: straight from a state dict, no modules ----


def published_shapes(num_classes=None):
    """Names and shapes of a guided-diffusion checkpoint with the settings SMALL (six output channels)."""
    width, mults, blocks = SMALL["model_channels"], SMALL["channel_mult"], SMALL["num_res_blocks"]
    embedding, shapes = 4 * width, {}

    def layer(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def res_block(name, channels, out):
        layer(f"{name}.in_layers.0", channels)
        layer(f"{name}.in_layers.2", out, channels, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * out, embedding)
        layer(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if channels != out:
            layer(f"{name}.skip_connection", out, channels, 1, 1)

    def attention(name, channels):
        layer(f"{name}.norm", channels)
        layer(f"{name}.qkv", 3 * channels, channels, 1)
        layer(f"{name}.proj_out", channels, channels, 1)

    layer("time_embed.0", embedding, width)
    layer("time_embed.2", embedding, embedding)
    if num_classes:
        shapes["label_emb.weight"] = (num_classes, embedding)
    layer("input_blocks.0.0", width, 3, 3, 3)
    channels, skips, n = width, [width], 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            res_block(f"input_blocks.{n}.0", channels, mult * width)
            channels = mult * width
            if 2**level in SMALL["attention_resolutions"]:
                attention(f"input_blocks.{n}.1", channels)
            skips.append(channels)
            n += 1
        if level < len(mults) - 1:
            res_block(f"input_blocks.{n}.0", channels, channels)
            skips.append(channels)
            n += 1
    res_block("middle_block.0", channels, channels)
    attention("middle_block.1", channels)
    res_block("middle_block.2", channels, channels)
    n = 0
    for level in reversed(range(len(mults))):
        for i in range(blocks + 1):
            res_block(f"output_blocks.{n}.0", channels + skips.pop(), mults[level] * width)
            channels, m = mults[level] * width, 1
            if 2**level in SMALL["attention_resolutions"]:
                attention(f"output_blocks.{n}.1", channels)
                m = 2
            if level and i == blocks:
                res_block(f"output_blocks.{n}.{m}", channels, channels)
            n += 1
    layer("out.0", channels)
    layer("out.2", 6, channels, 3, 3)
    return shapes


def random_checkpoint(num_classes=None, seed=0):
    """Every tensor random, also those that training starts at zero; of a size that keeps activations tame."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in published_shapes(num_classes).items():
        values = torch.randn(shape, generator=generator)
        if name == "label_emb.weight":
            weights[name] = values
        elif name.endswith("bias"):
            weights[name] = 0.1 * values
        elif len(shape) == 1:  # the gain of a norm
            weights[name] = 1 + 0.2 * values
        else:
            weights[name] = values / math.sqrt(math.prod(shape[1:]))
    return weights


class Reference:
    """The published forward pass, functional, on a checkpoint's tensors."""

    def __init__(self, weights):
        self.w = weights

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        n, c = x.shape[:2]
        groups = x.reshape(n, 32, -1)
        centred = groups - groups.mean(2, keepdim=True)
        normal = (centred / torch.sqrt((centred**2).mean(2, keepdim=True) + 1e-5)).reshape(x.shape)
        gain = [1, c] + [1] * (x.ndim - 2)
        return normal * self.w[f"{name}.weight"].reshape(gain) + self.w[f"{name}.bias"].reshape(gain)

    def res_block(self, name, x, embedding, resize):
        h = resize(silu(self.norm(f"{name}.in_layers.0", x)))
        h = self.conv(f"{name}.in_layers.2", h, padding=1)
        scale, shift = self.linear(f"{name}.emb_layers.1", silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = silu(self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift)
        x = resize(x)
        if f"{name}.skip_connection.weight" in self.w:
            x = self.conv(f"{name}.skip_connection", x)
        return x + self.conv(f"{name}.out_layers.3", h, padding=1)

    def attention(self, name, x):
        n, c = x.shape[:2]
        size = SMALL["num_head_channels"]
        normal = self.norm(f"{name}.norm", x.reshape(n, c, -1))
        qkv = torch.einsum("oi,nip->nop", self.w[f"{name}.qkv.weight"][:, :, 0], normal)
        qkv = qkv + self.w[f"{name}.qkv.bias"][:, None]
        heads = []
        for head in qkv.split(3 * size, dim=1):
            q, k, v = head.split(size, dim=1)
            scale = 1 / math.sqrt(math.sqrt(size))
            attended = torch.softmax(torch.einsum("ncq,nck->nqk", q * scale, k * scale), dim=2)
            heads.append(torch.einsum("nqk,nck->ncq", attended, v))
        h = torch.einsum("oi,nip->nop", self.w[f"{name}.proj_out.weight"][:, :, 0], torch.cat(heads, dim=1))
        return x + (h + self.w[f"{name}.proj_out.bias"][:, None]).reshape(x.shape)

    def block(self, name, x, embedding, resize_last):
        """All layers of one block; resize_last is how its last residual block changes the side."""
        layers = {int(re.match(rf"{name}\.(\d+)\.", key)[1]) for key in self.w if key.startswith(f"{name}.")}
        for m in sorted(layers):
            layer = f"{name}.{m}"
            if f"{layer}.qkv.weight" in self.w:
                x = self.attention(layer, x)
            elif f"{layer}.in_layers.0.weight" in self.w:
                x = self.res_block(layer, x, embedding, resize_last if m == max(layers) else unchanged)
            else:
                x = self.conv(layer, x, padding=1)
        return x

    def __call__(self, x, timesteps, labels=None):
        """Prediction, and what each decoder block hands on."""
        half = SMALL["model_channels"] // 2
        frequencies = np.exp(-math.log(10000) * np.arange(half) / half)
        angles = timesteps.numpy()[:, None] * frequencies[None]
        waves = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1)).float()
        embedding = self.linear("time_embed.2", silu(self.linear("time_embed.0", waves)))
        if labels is not None:
            embedding = embedding + self.w["label_emb.weight"][labels]
        per_level, levels = SMALL["num_res_blocks"] + 1, len(SMALL["channel_mult"])
        skips = []
        for n in range(levels * per_level):
            halves = n > 0 and n % per_level == 0
            x = self.block(f"input_blocks.{n}", x, embedding, halved if halves else unchanged)
            skips.append(x)
        for m in range(3):
            name = f"middle_block.{m}"
            x = self.attention(name, x) if m == 1 else self.res_block(name, x, embedding, unchanged)
        decoded = []
        for n in range(levels * per_level):
            doubles = n % per_level == per_level - 1 and n < (levels - 1) * per_level
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.block(f"output_blocks.{n}", x, embedding, doubled if doubles else unchanged)
            decoded.append(x)
        return self.conv("out.2", silu(self.norm("out.0", x)), padding=1), decoded


def silu(x):
    return x / (1 + torch.exp(-x))


def unchanged(x):
    return x


def halved(x):
    n, c, height, width = x.shape
    return x.reshape(n, c, height // 2, 2, width // 2, 2).mean((3, 5))


def doubled(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def noisy_batch(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = SMALL["image_size"]
    x = torch.randn(count, 3, side, side, generator=generator)
    return x, torch.randint(1000, (count,), generator=generator)


# ---- The tests ----


@pytest.mark.parametrize("num_classes", [None, CLASSES])
def test_published_weights_give_the_published_outputs(num_classes):
    weights = random_checkpoint(num_classes)
    x, timesteps = noisy_batch()
    labels = None if num_classes is None else torch.tensor([4, 0, 2])
    network = UNet.from_guided_diffusion(weights, **SMALL, num_classes=num_classes)
    with torch.no_grad():
        found = network(x, timesteps, labels)
    expected, _ = Reference(weights)(x, timesteps, labels)
    assert found.features is None
    assert expected.std() > 0.1
    torch.testing.assert_close(found.prediction, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_plain_rewriting():
    weights = {name: value.requires_grad_() for name, value in random_checkpoint().items()}
    x, timesteps = noisy_batch()
    network = UNet.from_guided_diffusion({k: v.detach() for k, v in weights.items()}, **SMALL)
    network(x, timesteps).prediction.square().sum().backward()
    Reference(weights)(x, timesteps)[0].square().sum().backward()
    largest = {name: weights[name].grad.abs().max().item() for name in weights}
    # A norm right behind it swallows many a bias, whose gradient is then rounding error.
    noise = 1e-6 * max(largest.values())
    assert sum(size > 100 * noise for size in largest.values()) > 0.8 * len(largest)
    for name, parameter in network.named_parameters():
        found, expected = parameter.grad, weights[name].grad
        assert (found - expected).abs().max() < 1e-3 * largest[name] + noise, name


def test_network_names_its_tensors_as_published():
    for num_classes in (None, CLASSES):
        own = UNet(**SMALL, num_classes=num_classes).state_dict()
        assert {k: tuple(v.shape) for k, v in own.items()} == published_shapes(num_classes)


def test_the_paper_preset_is_the_published_256_pixel_network():
    with torch.device("meta"):
        network = UNet(**PRESETS["paper"].network.model_dump(), num_classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 553_838_086
    keys = network.state_dict().keys()
    for key in (
        "time_embed.0.weight",
        "label_emb.weight",
        "input_blocks.0.0.weight",
        "input_blocks.10.1.qkv.weight",
        "input_blocks.15.0.in_layers.0.weight",
        "input_blocks.17.0.out_layers.3.bias",
        "middle_block.1.proj_out.weight",
        "output_blocks.2.2.in_layers.2.weight",
        "output_blocks.17.0.skip_connection.weight",
        "out.2.weight",
    ):
        assert key in keys


def test_label_embedding_of_a_checkpoint_is_dropped_unless_wanted():
    weights = random_checkpoint(CLASSES)
    x, timesteps = noisy_batch()
    without = UNet.from_guided_diffusion(weights, **SMALL)
    assert not any("label" in key for key in without.state_dict())
    del weights["label_emb.weight"]
    with torch.no_grad():
        found = without(x, timesteps).prediction
    torch.testing.assert_close(found, Reference(weights)(x, timesteps)[0], rtol=1e-4, atol=1e-4)


def test_labels_are_asked_for_exactly_when_there_are_classes():
    x, timesteps = noisy_batch()
    with pytest.raises(AssertionError, match="labels go with num_classes"):
        UNet(**SMALL)(x, timesteps, torch.tensor([0, 1, 2]))
    with pytest.raises(AssertionError, match="labels go with num_classes"):
        UNet(**SMALL, num_classes=CLASSES)(x, timesteps)


def test_half_precision_checkpoints_load_as_float32():
    halves = {key: value.half() for key, value in random_checkpoint().items()}
    network = UNet.from_guided_diffusion(halves, **SMALL)
    for key, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, halves[key].float())


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("middle_block.1.qkv.weight", lambda weights, key: weights.pop(key)),
        ("input_blocks.99.0.weight", lambda weights, key: weights.update({key: torch.zeros(3)})),
        ("out.2.weight", lambda weights, key: weights.update({key: weights[key][:3]})),
        ("feature_head.0.weight", lambda weights, key: weights.update({key: torch.zeros(3)})),
    ],
    ids=["missing", "unexpected", "other shape", "feature head"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(key, damage):
    weights = random_checkpoint()
    damage(weights, key)
    with pytest.raises(ValueError, match=re.escape(key)):
        UNet.from_guided_diffusion(weights, **SMALL)


def test_wanted_classes_that_a_checkpoint_lacks_are_named():
    with pytest.raises(ValueError, match="label_emb"):
        UNet.from_guided_diffusion(random_checkpoint(), **SMALL, num_classes=CLASSES)


@pytest.mark.parametrize(("rate", "block"), [(2, 1), (1, 4)])
def test_features_come_from_the_last_decoder_block_that_does_not_up_sample(rate, block):
    weights = random_checkpoint()
    network = UNet(**SMALL, feature_channels=7, feature_rate=rate)
    network.load_guided_diffusion(weights)
    x, timesteps = noisy_batch()
    with torch.no_grad():
        found = network(x, timesteps)
    assert found.features.shape == (3, 7, SMALL["image_size"] // rate, SMALL["image_size"] // rate)
    prediction, decoded = Reference(weights)(x, timesteps)
    head = Reference({k.replace(".", "_", 1): v for k, v in network.state_dict().items() if "head" in k})
    expected = head.conv("feature_head_2", silu(head.norm("feature_head_0", decoded[block])))
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.prediction, prediction, rtol=1e-4, atol=1e-4)


def test_the_mean_of_the_feature_heads_answers():
    network = UNet(**SMALL, feature_channels=7, feature_rate=2)
    x = torch.randn(4, 3, SMALL["image_size"], SMALL["image_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answered = network(x, torch.tensor([5, 25, 5, 25]))
        unasked = network(x, torch.tensor([5, 25, 5, 25]), ask_head=False)
        mean = network.feature_head.mean(unasked.states, 2)
    assert unasked.features is None
    torch.testing.assert_close(unasked.prediction, answered.prediction)
    torch.testing.assert_close(mean, answered.features.unflatten(0, (2, 2)).mean(0))


@pytest.mark.parametrize("gradients", [True, False])
def test_images_may_share_a_timestep(gradients):
    """As they do on each noise scale, and in each step of a restoration."""
    network = UNet(**SMALL, num_classes=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(6, 3, SMALL["image_size"], SMALL["image_size"], generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([5, 25]), torch.tensor([0, 2])
    with torch.set_grad_enabled(gradients):
        alone = network(x, t.repeat_interleave(3), labels.repeat_interleave(3)).prediction
        shared = network(x, t, labels).prediction
    assert alone.std() > 0.01
    assert shared.requires_grad == gradients
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="as many images to each timestep"):
        network(x[:5], t, labels)


def test_in_bfloat16_a_timestep_is_shared_to_its_rounding_and_by_any_number_alike():
    torch.manual_seed(0)
    network = UNet(**SMALL).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(4, 3, SMALL["image_size"], SMALL["image_size"]).contiguous(memory_format=torch.channels_last)
    t = torch.tensor([25])
    with torch.inference_mode():
        exact = network(x, t).prediction
        with torch.autocast("cpu", torch.bfloat16):
            shared, one_each, pair, single = (
                network(images, steps).prediction
                for images, steps in ((x, t), (x, t.repeat(4)), (x[:2], t), (x[:1], t))
            )
    error, known = ((found.float() - exact).square().mean() for found in (shared, one_each))
    assert error < 1.5 * known < 0.1 * exact.square().mean()
    for fewer in (pair, single):
        torch.testing.assert_close(fewer, shared[: len(fewer)], rtol=0, atol=0)


def test_on_a_gpu_a_timestep_is_shared_in_the_precision_of_its_norm():
    """Without one: made tensors have shapes, types and devices, and no numbers."""
    given = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses where there is none
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
            norm, x = GroupNorm(32, 64), torch.empty(6, 64, 8, 8, dtype=torch.bfloat16)
            scale = torch.empty(2, 64, dtype=torch.bfloat16)
            found = modulated(norm, x, scale, scale)
            assert (found.shape, found.dtype, found.device.type) == (x.shape, norm(x).dtype, "cuda")
            assert found.dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", given)


def test_loading_a_checkpoint_leaves_the_feature_head_alone():
    network = UNet(**SMALL, feature_channels=7, feature_rate=2)
    before = {k: v.clone() for k, v in network.feature_head.state_dict().items()}
    network.load_guided_diffusion(random_checkpoint())
    for key, value in network.feature_head.state_dict().items():
        assert torch.equal(value, before[key])


def test_features_are_float32_under_low_precision():
    network = UNet(**SMALL, feature_channels=7, feature_rate=2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(*noisy_batch())
    assert found.prediction.dtype == torch.bfloat16
    assert found.features.dtype == torch.float32


def test_a_feature_rate_without_a_level_is_refused():
    with pytest.raises(AssertionError, match="rate 8"):
        UNet(**SMALL, feature_channels=7, feature_rate=8)


def test_a_new_network_predicts_zero_and_learns_from_there():
    network = UNet(**SMALL)
    found = network(*noisy_batch()).prediction
    assert found.shape == (3, 6, 16, 16)
    assert (found == 0).all()
    found.sum().backward()
    assert network.out[2].weight.grad.abs().max() > 0


def test_other_image_sides_pass_through():
    network = UNet(**SMALL)
    found = network(torch.zeros(1, 3, 24, 8), torch.tensor([3]))
    assert found.prediction.shape == (1, 6, 24, 8)


def test_timestep_embedding_starts_with_cosines_from_frequency_1_to_1e_4():
    found = timestep_embedding(torch.tensor([0, 3]), 32)
    assert found.shape == (2, 32)
    assert found.dtype == torch.float32
    assert found[0].tolist() == [1.0] * 16 + [0.0] * 16
    assert found[1, 0].item() == pytest.approx(math.cos(3))
    assert found[1, 16].item() == pytest.approx(math.sin(3))
    assert found[1, 31].item() == pytest.approx(math.sin(3 * 1e-4 ** (15 / 16)), rel=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(2, 64, 8, 12), (2, 64, 40, 36), (2, 1024, 6, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_norm_is_pytorchs_in_whatever_way_it_is_computed(shape, layout, dtype):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(32, shape[1]).to(dtype), torch.nn.GroupNorm(32, shape[1]).to(dtype)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = (3 + torch.randn(shape, dtype=dtype)).contiguous(memory_format=layout)
    with torch.no_grad():
        found = ours(x)
    torch.testing.assert_close(found, theirs(x), rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=layout)
    gradients = []
    for norm in (ours, theirs):
        x = x.detach().requires_grad_()
        norm(x).square().mul(torch.linspace(0, 1, shape[-1])).sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in (x, norm.weight, norm.bias)]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mean", [0, 3, 10])
def test_the_gradient_of_group_norm_in_bfloat16_is_as_good_as_its_rounding(mean):
    torch.manual_seed(0)
    x = (mean + torch.randn(2, 64, 16, 16)).bfloat16()
    grad = (x - mean + torch.randn(2, 64, 16, 16)).bfloat16()
    weight = torch.rand(64)
    gradients = []
    for norm, dtype in ((GroupNorm(32, 64), torch.bfloat16), (torch.nn.GroupNorm(32, 64).double(), torch.float64)):
        norm.weight.data.copy_(weight)
        seen = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
        norm(seen).backward(grad.to(dtype))
        gradients.append((seen.grad.double(), norm.weight.grad.double(), norm.bias.grad.double()))
    for found, exact in zip(*gradients, strict=True):
        assert (found - exact).norm() < 0.006 * exact.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_doubling_convolution_is_one_of_the_doubled_image(layout):
    torch.manual_seed(0)
    convolution = DoublingConv2d(8, 12)
    x = torch.randn(2, 8, 5, 7).contiguous(memory_format=layout).requires_grad_()
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), convolution.weight, convolution.bias, padding=1)
    found = convolution(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert doubling_kernel(convolution.weight).dtype == torch.float32
    weights = torch.randn_like(wanted)
    inputs = (x, convolution.weight, convolution.bias)
    gradients = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, wanted))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
