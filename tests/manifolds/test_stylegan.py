import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.manifolds import build_manifold, load_manifold, save_manifold
from onmanifold.manifolds.stylegan import StyleGAN
from onmanifold.manifolds.stylegan_layers import (
    EqualConv,
    EqualLinear,
    Mapping,
    ModulatedConv,
    ModulatedOutput,
    widths_to,
)
from onmanifold.training.fits.base import FitStep
from onmanifold.training.fits.stylegan import (
    Discriminator,
    StyleGANFit,
    mixed,
    squared_gradient,
    with_deviation,
)

SMALL = {
    "image_shape": (1, 8, 8),
    "w_size": 5,
    "z_size": 6,
    "mapping_depth": 2,
    "channel_base": 64,
    "channel_max": 6,
}


def small(seed=0, **options):
    """A generator with noise, biases and a mean style, as after learning."""
    manifold = build_manifold("stylegan", seed=seed, **SMALL | options).double()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in manifold.state_dict().items():
        if name.endswith(("strength", "bias")) or name == "mean_w":
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("style.weight"):
            # A fresh network hardly looks at its code.
            tensor.mul_(3)
    return manifold


def draw(manifold, count, seed=0):
    return manifold.sample_codes(torch.zeros(count, dtype=torch.int64), seed).double()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def step_of(manifold, players, images, number=0):
    indices = torch.arange(len(images))
    return FitStep(manifold, players, images, 0 * indices, indices, 0, number, 1000, 0)


def train(fit, manifold, images, steps, rate):
    """What the training loop does, without its comforts."""
    torch.manual_seed(0)
    players = fit.players(manifold)
    optimizers = {
        name: torch.optim.Adam(player.parameters(), rate, fit.defaults["betas"])
        for name, player in players.items()
    }
    for player in players.values():
        player.train()
    for number in range(steps):
        for turn in fit.turns(step_of(manifold, players, images, number)):
            for name, loss in turn.items():
                optimizers[name].zero_grad()
                loss.backward(inputs=list(players[name].parameters()))
                optimizers[name].step()
    manifold.eval()
    return players


@pytest.mark.parametrize(("power", "layers"), [(3, 4), (4, 6), (5, 8), (6, 10), (7, 12), (8, 14)])
def test_images_of_all_resolutions(power, layers):
    side = 2**power
    options = SMALL | {"image_shape": (3, side, side), "channel_max": 3}
    manifold = build_manifold("stylegan", seed=0, **options)
    assert manifold.layers == layers
    assert manifold.latent_size == manifold.code_size == layers * 5
    codes = manifold.sample_codes(torch.zeros(2, dtype=torch.int64))
    images = manifold.decode(codes)
    assert images.shape == (2, 3, side, side)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert Discriminator(side, 3, manifold.widths)(images).shape == (2,)


@pytest.mark.parametrize("side", [4, 24, 28, 512])
def test_other_sides_are_refused(side):
    with pytest.raises(ConfigError, match=rf"power of two from 8 to 256.*{side} x {side}.*crop"):
        build_manifold("stylegan", **SMALL | {"image_shape": (1, side, side)})


def test_a_rectangle_needs_a_crop():
    with pytest.raises(ConfigError, match="16 x 8"):
        build_manifold("stylegan", **SMALL | {"image_shape": (1, 16, 8)})
    with pytest.raises(ConfigError, match="300 x 200"):
        build_manifold("stylegan", **SMALL | {"image_shape": (1, 300, 200), "crop": True})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("space", "v"),
        ("w_size", 0),
        ("z_size", 0),
        ("mapping_depth", 0),
        ("channel_base", 0),
        ("channel_max", -1),
        ("truncation", 1.5),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ConfigError, match=option):
        build_manifold("stylegan", **SMALL | {option: value})


def test_a_crop_is_the_middle():
    whole = small(image_shape=(1, 16, 16))
    part = small(image_shape=(1, 12, 9), crop=True)
    codes = draw(whole, 3)
    assert torch.equal(draw(part, 3), codes)
    assert torch.equal(part.decode(codes), whole.decode(codes)[:, :, 2:14, 3:12])


def test_widths_fall_with_the_resolution():
    assert widths_to(32, base=512, largest=64) == {4: 64, 8: 64, 16: 32, 32: 16}


def test_the_three_codes_are_of_the_same_images():
    spaces = [small(space=space, truncation=0.7) for space in ("w+", "w", "z")]
    images = [manifold.decode(draw(manifold, 3)) for manifold in spaces]
    # Draws are float32.
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=1e-6)
    assert [manifold.latent_size for manifold in spaces] == [20, 5, 6]
    assert [list(manifold.levels) for manifold in spaces] == [[0, 1, 2, 3], [0], [0]]


def test_no_truncation_gives_what_the_mapping_gives_and_full_truncation_the_mean():
    labels = torch.zeros(4, dtype=torch.int64)
    whole, none = small(space="w", truncation=1.0), small(space="w", truncation=0.0)
    mean = whole.mean_code(labels)
    assert torch.equal(mean, whole.mean_w.float().expand(4, -1))
    torch.testing.assert_close(none.sample_codes(labels), mean)
    half = small(space="w", truncation=0.5).sample_codes(labels)
    torch.testing.assert_close(half, (whole.sample_codes(labels) + mean) / 2)
    assert torch.equal(small().mean_code(labels), mean.repeat(1, 4))
    assert torch.equal(small(space="z").mean_code(labels), torch.zeros(4, 6))


def test_levels_are_the_layers():
    manifold = small(image_shape=(1, 16, 16))
    codes = draw(manifold, 1)
    assert torch.equal(
        torch.cat([torch.arange(30)[part] for part in manifold.levels.values()]), torch.arange(30)
    )
    image = manifold.decode(codes)
    changes = []
    for part in manifold.levels.values():
        moved = codes.clone()
        moved[:, part] += 0.3
        changes.append((manifold.decode(moved) - image).abs().amax())
    assert min(changes) > 1e-4


def test_coarse_layers_do_not_see_the_style_of_fine_ones():
    manifold = small(image_shape=(1, 16, 16))
    seen = []
    ready = manifold.chart(draw(manifold, 1)).synthesis
    codes = draw(manifold, 1).view(1, 6, 5)
    for change in (0.0, 1.0):
        styles = codes.clone()
        styles[:, 3:] += change
        features = ready.constant
        for number in range(3):
            features = ready.layers[number](features, styles[:, number])
        seen.append(features)
    assert torch.equal(*seen)


@pytest.mark.parametrize("space", ["w+", "w", "z"])
def test_an_image_does_not_depend_on_its_batch(space):
    manifold = small(space=space)
    codes = draw(manifold, 7)
    whole = manifold.decode(codes)
    assert torch.equal(manifold.decode(codes), whole)
    parts = torch.cat([manifold.decode(part) for part in codes.split(2)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    mask = torch.tensor([True, False, True, True, False, False, True])
    kept = manifold.chart(codes).keep(mask)
    torch.testing.assert_close(kept.decode(kept.latents), whole[mask], rtol=0, atol=1e-12)
    assert torch.equal(kept.latents, codes[mask])


def test_noise_is_fixed_in_decoding_and_random_in_learning():
    manifold = small()
    codes = draw(manifold, 2)
    styles = manifold.styles_of(codes)
    with torch.no_grad():
        first, second = manifold.generate(styles), manifold.generate(styles)
        assert (first - second).abs().max() > 0.01
        for layer in manifold.synthesis.layers:
            layer.strength.zero_()
        silent = manifold.generate(styles).clamp(0, 1)
    torch.testing.assert_close(silent, manifold.decode(codes), rtol=0, atol=1e-12)


def test_the_precision_is_that_of_the_codes():
    for space in ("w+", "z"):
        manifold = small(space=space).float()
        codes = draw(manifold, 3)
        double = manifold.decode(codes)
        assert double.dtype == torch.float64
        assert torch.equal(double, copy.deepcopy(manifold).double().decode(codes))
        single = manifold.decode(codes.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_decoding_in_bfloat16():
    manifold = small().float()
    codes = draw(manifold, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        images = manifold.decode(codes)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, manifold.decode(codes), rtol=0, atol=0.06)


@pytest.mark.parametrize("space", ["w+", "w", "z"])
def test_gradients_of_decoding(space):
    manifold = small(space=space)
    chart = manifold.chart(draw(manifold, 2))
    latents = chart.latents.clone().requires_grad_()
    assert torch.autograd.gradcheck(chart.decode, latents, fast_mode=True)
    (gradient,) = torch.autograd.grad(chart.decode(latents).sum(), latents)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("space", ["w+", "z"])
def test_decoding_wants_no_gradient_of_the_weights(space):
    manifold = small(space=space)
    codes = draw(manifold, 2)
    assert not manifold.decode(codes).requires_grad
    manifold.decode(codes.requires_grad_()).sum().backward()
    assert all(parameter.grad is None for parameter in manifold.parameters())
    assert manifold.generate(manifold.styles_of(codes)).requires_grad


def test_round_trip_through_a_file(tmp_path):
    manifold = small(truncation=0.5).float()
    loaded = load_manifold(save_manifold(manifold, tmp_path / "stylegan.safetensors"))
    assert isinstance(loaded, StyleGAN)
    assert loaded.fingerprint == manifold.fingerprint
    codes = draw(manifold, 3)
    assert torch.equal(draw(loaded, 3), codes)
    assert torch.equal(loaded.decode(codes), manifold.decode(codes))


def test_encoding_finds_what_was_generated():
    manifold = small()
    images = manifold.decode(draw(manifold, 4))
    labels = torch.zeros(4, dtype=torch.int64)
    mean = manifold.decode(manifold.mean_code(labels).double())
    found = manifold.decode(manifold.encode(images, labels))
    error, start = ((other - images).abs().flatten(1).mean(1) for other in (found, mean))
    assert error.mean() < 0.25 * start.mean()


@pytest.mark.parametrize("up", [False, True])
def test_modulation_is_a_convolution_with_weights_of_the_sample(up):
    """Against the formula: w' = s w, w'' = w' / norm (Karras et al. 2020, eq. 1 and 3), sample by sample."""
    torch.manual_seed(0)
    layer = ModulatedConv(w_size=5, before=3, after=4, side=8, up=up).double()
    layer.bias.data, layer.strength.data = random(4), torch.tensor(0.3).double()
    features, w = random(2, 3, 4 if up else 8, 4 if up else 8, seed=1), random(2, 5, seed=2)
    expected = []
    for sample, style in zip(features, layer.style(w), strict=True):
        weight = style.view(1, 3, 1, 1) * layer.weight / math.sqrt(27)
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        sample = sample.unsqueeze(0)
        sample = F.interpolate(sample, scale_factor=2.0) if up else sample
        result = F.conv2d(sample, weight, padding=1)
        result = result + 0.3 * layer.noise + layer.bias.view(1, 4, 1, 1)
        expected.append(F.leaky_relu(result, 0.2) * math.sqrt(2))
    torch.testing.assert_close(layer.ready()(features, w), torch.cat(expected))


def test_demodulation_gives_unit_variance():
    torch.manual_seed(0)
    layer = ModulatedConv(w_size=5, before=16, after=8, side=30)
    features, w = torch.randn(20, 16, 30, 30), 3 * torch.randn(20, 5)
    with torch.no_grad():
        activated = layer.ready()(features, w) / math.sqrt(2)
    before = torch.where(activated > 0, activated, activated / 0.2)[:, :, 1:-1, 1:-1]
    deviation = before.std((2, 3))
    # Each is an estimate from 28 x 28 pixels that neighbours share.
    assert deviation.mean().item() == pytest.approx(1, abs=0.01)
    assert 0.8 < deviation.min() < deviation.max() < 1.2


def test_the_output_layer_is_not_demodulated():
    torch.manual_seed(0)
    layer = ModulatedOutput(w_size=5, before=3, channels=2).double()
    layer.bias.data = random(2)
    features, w = random(2, 3, 4, 4, seed=1), random(2, 5, seed=2)
    style = layer.style(w)
    expected = torch.einsum("oi,bi,bihw->bohw", layer.weight / math.sqrt(3), style, features)
    expected = expected + layer.bias.view(1, 2, 1, 1)
    torch.testing.assert_close(layer.ready()(features, w), expected)


def test_equalised_layers_begin_with_unit_variance():
    torch.manual_seed(0)
    linear = EqualLinear(50, 4000, bias=1.0, rate=0.01)
    assert linear.weight.std().item() == pytest.approx(100, rel=0.02)
    rows = torch.randn(50, 50)
    with torch.no_grad():
        outputs = linear(rows)
        features = EqualConv(16, 32, 3, linear=True)(torch.randn(20, 16, 12, 12))
        w = Mapping(32, 64, depth=4)(5 * torch.randn(500, 32))
    assert outputs.mean().item() == pytest.approx(1, abs=0.05)
    assert outputs.std().item() == pytest.approx(1, rel=0.05)
    assert features[:, :, 1:-1, 1:-1].std().item() == pytest.approx(1, rel=0.1)
    # However long z is.
    assert w.square().mean().item() == pytest.approx(1, rel=0.3)


def test_styles_are_mixed_from_a_random_layer_on():
    torch.manual_seed(0)
    first, second = torch.zeros(5000, 1), torch.ones(5000, 1)
    styles = mixed(first, second, layers=6, probability=0.8).squeeze(2)
    assert bool((styles[:, 1:] >= styles[:, :-1]).all())
    counts = styles.sum(1).long().bincount(minlength=7) / 5000
    assert counts[6] == 0
    assert counts[0].item() == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(counts[1:6], torch.full((5,), 0.16), rtol=0, atol=0.02)
    assert mixed(first, second, 6, 0.0).sum() == 0
    assert mixed(first, second, 6, 1.0)[:, -1].min() == 1


def test_squared_gradient_by_hand():
    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double())

        def forward(self, images):
            return (self.weight * images.square()).sum((1, 2, 3))

    net, images = Quadratic(), random(3, 1, 2, 2).abs()
    penalty = squared_gradient(net, images)
    # The gradient is 2 w x; the distances of pixels count in [-1, 1], where they are twice as large.
    torch.testing.assert_close(penalty, (net.weight * images).square().sum((1, 2, 3)))
    (slope,) = torch.autograd.grad(penalty.sum(), net.weight)
    torch.testing.assert_close(slope, (2 * net.weight * images.square()).sum((0, 1)))


def test_the_gradient_of_r1_is_that_of_finite_differences():
    torch.manual_seed(0)
    discriminator = Discriminator(8, 1, {4: 4, 8: 3}).double()
    images = torch.rand(4, 1, 8, 8).double()
    parameters = list(discriminator.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(
        squared_gradient(discriminator, images).mean(),
        parameters,
        allow_unused=True,
        materialize_grads=True,
    )
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    values = []
    for sign in (1, -1):
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data += sign * 1e-6 * direction
        values.append(squared_gradient(discriminator, images).mean().item())
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data -= sign * 1e-6 * direction
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_deviation_by_hand():
    # Groups are images 0, 2, 4, 6 and 1, 3, 5, 7.
    features = torch.zeros(8, 2, 1, 1)
    features[1::2, 0, 0, 0] = torch.tensor([1.0, 1.0, 3.0, 3.0])
    features[1::2, 1, 0, 0] = torch.tensor([4.0, 0.0, 4.0, 0.0])
    result = with_deviation(features)
    assert result.shape == (8, 3, 1, 1)
    assert torch.equal(result[:, :2], features)
    expected = torch.tensor([0.0, 1.5] * 4)
    torch.testing.assert_close(result[:, 2, 0, 0], expected, rtol=0, atol=1e-3)
    assert with_deviation(features[:3]).shape == (3, 3, 1, 1)


def test_smaller_images_have_a_black_border():
    torch.manual_seed(0)
    discriminator = Discriminator(16, 1, {4: 4, 8: 3, 16: 2})
    images = torch.rand(4, 1, 12, 10)
    padded = F.pad(images, (3, 3, 2, 2))
    torch.testing.assert_close(discriminator(images), discriminator(padded))


class Flat(nn.Module):
    """Logits that are the sum of the pixels times a number."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return self.scale * images.sum((1, 2, 3))


def test_losses_by_hand():
    manifold = build_manifold("stylegan", seed=0, **SMALL)
    fit = StyleGANFit(r1=3.0, r1_every=4)
    images = torch.full((2, 1, 8, 8), 0.5)
    # Where all logits are zero, each loss is log 2; where they are not, the penalty is known.
    turns = list(fit.turns(step_of(manifold, {"discriminator": Flat(0.0)}, images, number=1)))
    assert [list(turn) for turn in turns] == [["generator"], ["discriminator"]]
    assert turns[0]["generator"].item() == pytest.approx(math.log(2))
    assert turns[1]["discriminator"].item() == pytest.approx(2 * math.log(2))
    step = step_of(manifold, {"discriminator": Flat(0.1)}, images, number=4)
    torch.manual_seed(0)
    generator, discriminator, penalty = (next(iter(turn.values())) for turn in fit.turns(step))
    torch.manual_seed(0)
    again = fit._generated(step).sum((1, 2, 3)) / 10
    expected = torch.log1p(torch.exp(-again)).mean()
    torch.testing.assert_close(generator, expected, rtol=1e-4, atol=1e-6)
    real = torch.tensor(0.1 * 32)
    expected = torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(again)).mean()
    torch.testing.assert_close(discriminator, expected, rtol=1e-4, atol=1e-6)
    # 64 pixels of gradient 0.1, in units twice as large; 3 / 2 of it, 4 times since it is taken once in 4.
    assert penalty.item() == pytest.approx(64 * 0.01 / 4 * 1.5 * 4)


def test_the_weight_of_r1_follows_the_resolution():
    manifold = build_manifold("stylegan", seed=0, **SMALL)
    images = torch.full((2, 1, 8, 8), 0.5)
    step = step_of(manifold, {"discriminator": Flat(0.1)}, images)
    *_, penalty = StyleGANFit().turns(step)
    weight = 2e-4 * 64 / 2
    assert penalty["discriminator"].item() == pytest.approx(0.16 * weight / 2 * 16)
    assert len(list(StyleGANFit(r1=0.0).turns(step))) == 2


def test_the_mean_style_follows_the_mapping():
    manifold = build_manifold("stylegan", seed=0, **SMALL)
    fit = StyleGANFit(mean_decay=0.9)
    images = torch.rand(64, 1, 8, 8)
    players = fit.players(manifold)
    for number in range(1, 40):
        for _ in fit.turns(step_of(manifold, players, images, number)):
            pass
    with torch.no_grad():
        w = manifold.mapping(torch.randn(20_000, 6))
    torch.testing.assert_close(manifold.mean_w, w.mean(0), rtol=0.1, atol=0.1)
    assert w.mean(0).abs().max() > 0.2


def test_a_distribution_is_learned():
    """Two kinds of images, bright at the top or at the bottom: samples come to be of both kinds."""
    images = torch.full((32, 1, 8, 8), 0.2)
    images[:16, :, :4] = images[16:, :, 4:] = 0.8
    manifold = build_manifold("stylegan", seed=0, **SMALL)
    train(StyleGANFit(r1=0.1), manifold, images, 200, 0.01)
    with torch.no_grad():
        samples = manifold.decode(manifold.sample_codes(torch.zeros(100, dtype=torch.int64)))
    distance = (samples.unsqueeze(1) - images[::16]).abs().mean((2, 3, 4))
    # Grey images would be at 0.3.
    assert distance.min(1).values.mean() < 0.18
    assert distance.argmin(1).bincount(minlength=2).min() >= 15


@pytest.mark.parametrize(
    "fields", [{"r1": -1.0}, {"r1_every": 0}, {"mixing": 1.1}, {"mean_decay": 1.0}]
)
def test_fields_of_the_fit_are_checked(fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}: expected"):
        StyleGANFit(**fields)


def test_the_fit_wants_its_own_manifold(plane):
    with pytest.raises(InputError, match="expected a StyleGAN, found Plane"):
        StyleGANFit().players(plane)
