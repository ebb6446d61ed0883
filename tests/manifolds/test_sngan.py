import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrize import is_parametrized

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.manifolds import build_manifold, load_manifold, save_manifold
from onmanifold.manifolds.resampling import down_conv, up_conv, up_kernel
from onmanifold.manifolds.sngan import SNGAN
from onmanifold.training.fits.base import FitStep
from onmanifold.training.fits.sngan import Discriminator, SNGANFit, hinge

SMALL = {"image_shape": (1, 16, 8), "num_classes": 3, "latent_size": 5, "width": 6}


def small(seed=0, **options):
    """A generator whose batch norms have statistics, scales and shifts of their own."""
    manifold = build_manifold("sngan", seed=seed, **SMALL | options).double()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in manifold.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return manifold


def draw(manifold, count, seed=0):
    return manifold.sample_codes(torch.arange(count) % manifold.num_classes, seed).double()


def step_of(manifold, players, images, number=0, labels=None):
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return FitStep(manifold, players, images, labels, torch.arange(len(images)), 0, number, 1000, 0)


def train(fit, manifold, images, steps, rates):
    """The losses of each turn; what the training loop does, without its comforts."""
    torch.manual_seed(0)
    players = fit.players(manifold)
    optimizers = {
        name: torch.optim.Adam(player.parameters(), rates[name], fit.defaults["betas"])
        for name, player in players.items()
    }
    for player in players.values():
        player.train()
    history = []
    for number in range(steps):
        for turn in fit.turns(step_of(manifold, players, images, number)):
            for name, loss in turn.items():
                optimizers[name].zero_grad()
                loss.backward(inputs=list(players[name].parameters()))
                optimizers[name].step()
                history.append((name, loss.item()))
    manifold.eval()
    return players, history


@pytest.fixture
def features():
    return torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def weight():
    return torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1)).double()


def test_up_conv_is_a_convolution_of_repeated_pixels(features, weight):
    bias = torch.arange(5).double()
    expected = F.conv2d(F.interpolate(features, scale_factor=2.0), weight, bias, padding=1)
    torch.testing.assert_close(up_conv(features, up_kernel(weight), bias), expected)


def test_down_conv_is_the_mean_of_a_convolution(features, weight):
    bias = torch.arange(5).double()
    expected = F.avg_pool2d(F.conv2d(features, weight, bias, padding=1), 2)
    torch.testing.assert_close(down_conv(features, weight, bias), expected)


@pytest.mark.parametrize(
    ("image_shape", "start", "doublings"),
    [
        ((1, 28, 28), [7, 7], 2),
        ((3, 32, 32), [4, 4], 3),
        ((2, 64, 64), [4, 4], 4),
        ((1, 48, 32), [6, 4], 3),
    ],
)
def test_images_of_many_shapes(image_shape, start, doublings):
    manifold = build_manifold("sngan", image_shape=image_shape, seed=0, width=4, latent_size=3)
    assert manifold.start == start
    assert len(manifold.blocks) == doublings
    images = manifold.decode(manifold.sample_codes(torch.zeros(2, dtype=torch.int64)))
    assert images.shape == (2, *image_shape)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    discriminator = Discriminator(image_shape, width=4)
    assert discriminator(images, torch.zeros(2, dtype=torch.int64)).shape == (2,)


@pytest.mark.parametrize("side", [4, 30, 36, 72])
def test_sides_that_no_doubling_makes_are_refused(side):
    with pytest.raises(ConfigError, match=r"4 to 8 times the same power of two.*found"):
        build_manifold("sngan", image_shape=(1, side, side), width=4)


@pytest.mark.parametrize("name", ["width", "latent_size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        build_manifold("sngan", **SMALL | {name: 0})


@pytest.mark.parametrize("conditional", [False, True])
def test_decoding_is_the_network_in_eval_mode(conditional):
    manifold = small(conditional=conditional)
    codes = draw(manifold, 6)
    torch.testing.assert_close(manifold.decode(codes), manifold(codes).detach(), rtol=0, atol=1e-12)
    # In train mode too: decoding neither sees the batch nor changes the statistics.
    before = copy.deepcopy(manifold.state_dict())
    expected = manifold.decode(codes)
    manifold.train()
    assert torch.equal(manifold.decode(codes), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in manifold.state_dict().items())


@pytest.mark.parametrize("conditional", [False, True])
def test_an_image_does_not_depend_on_its_batch(conditional):
    manifold = small(conditional=conditional)
    codes = draw(manifold, 7)
    whole = manifold.decode(codes)
    parts = torch.cat([manifold.decode(part) for part in codes.split(2)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    mask = torch.tensor([True, False, True, True, False, False, True])
    kept = manifold.chart(codes).keep(mask)
    torch.testing.assert_close(kept.decode(kept.latents), whole[mask], rtol=0, atol=1e-12)
    assert torch.equal(torch.cat([kept.latents, kept.fixed], 1), codes[mask])


def test_the_precision_is_that_of_the_codes():
    manifold = small().float()
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


def test_only_a_conditional_generator_knows_the_class():
    conditional, plain = small(conditional=True), small()
    latents = draw(plain, 2)
    first, second = torch.tensor([0, 0]), torch.tensor([1, 2])
    assert conditional.code_size == plain.code_size + 1
    assert torch.equal(plain.codes_of(latents, first), plain.codes_of(latents, second))
    images = [conditional.decode(conditional.codes_of(latents, row)) for row in (first, second)]
    assert (images[0] - images[1]).abs().max() > 0.01
    with pytest.raises(InputError, match="class from 0 to 2"):
        conditional.decode(conditional.codes_of(latents, second + 1))


@pytest.mark.parametrize("conditional", [False, True])
def test_gradients_of_decoding(conditional):
    manifold = small(conditional=conditional)
    chart = manifold.chart(draw(manifold, 2))
    latents = chart.latents.clone().requires_grad_()
    assert torch.autograd.gradcheck(chart.decode, latents, fast_mode=True)
    (gradient,) = torch.autograd.grad(chart.decode(latents).sum(), latents)
    assert gradient.abs().min() > 0


def test_decoding_wants_no_gradient_of_the_weights():
    manifold = small(conditional=True)
    codes = draw(manifold, 2)
    assert not manifold.decode(codes).requires_grad
    manifold.decode(codes.requires_grad_()).sum().backward()
    assert all(parameter.grad is None for parameter in manifold.parameters())
    assert manifold(codes).requires_grad


def test_codes_of_a_wrong_shape_are_refused():
    with pytest.raises(InputError, match=r"expected a float tensor \(2, 5\) for sngan"):
        small().decode(torch.zeros(2, 4))


def test_round_trip_through_a_file(tmp_path):
    manifold = small(conditional=True).float()
    loaded = load_manifold(save_manifold(manifold, tmp_path / "sngan.safetensors"))
    assert isinstance(loaded, SNGAN)
    assert loaded.fingerprint == manifold.fingerprint
    codes = draw(manifold, 3)
    assert torch.equal(loaded.decode(codes), manifold.decode(codes))
    assert small(seed=1).fingerprint != small().fingerprint


def test_encoding_finds_what_was_generated():
    manifold = small(seed=2)
    with torch.no_grad():
        # A fresh network hardly looks at its code.
        manifold.plant.weight.mul_(3)
    images = manifold.decode(draw(manifold, 4))
    labels = torch.zeros(4, dtype=torch.int64)
    mean = manifold.decode(manifold.mean_code(labels).double())
    found = manifold.decode(manifold.encode(images, labels))
    error, start = ((other - images).abs().flatten(1).mean(1) for other in (found, mean))
    assert (error / start).max() < 0.25


def test_the_mean_code_is_the_middle_of_the_draws():
    manifold = small(conditional=True)
    labels = torch.tensor([2, 0])
    assert manifold.mean_code(labels).tolist() == [[0.0] * 5 + [2.0], [0.0] * 5 + [0.0]]


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    # (0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3
    assert hinge(real, fake).item() == pytest.approx(5.5 / 3)


def test_weights_of_the_discriminator_have_spectral_norm_one():
    fit = SNGANFit(width=6, critic_steps=1)
    manifold = build_manifold("sngan", seed=0, **SMALL | {"conditional": True})
    images = torch.rand(8, 1, 16, 8, generator=torch.Generator().manual_seed(0))
    players, _ = train(fit, manifold, images, 15, {"generator": 1e-3, "discriminator": 1e-3})
    layers = [part for part in players["discriminator"].modules() if is_parametrized(part)]
    assert len(layers) == 2 * 3 + 2 * 2 + 1 + 1
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert norm.item() == pytest.approx(1, abs=0.05)


def test_the_discriminator_adds_up_its_features():
    torch.manual_seed(0)
    discriminator = Discriminator((1, 16, 16), width=4, num_classes=3).eval().double()
    images = torch.rand(2, 1, 16, 16).double()
    labels = torch.tensor([0, 2])
    features = F.relu(discriminator.blocks(2 * images - 1)).flatten(2).sum(2)
    expected = [
        sample @ discriminator.head.weight[0]
        + discriminator.head.bias[0]
        + sample @ discriminator.classes.weight[label]
        for sample, label in zip(features, labels, strict=True)
    ]
    torch.testing.assert_close(discriminator(images, labels), torch.stack(expected))


def test_the_generator_moves_in_every_nth_step():
    manifold = build_manifold("sngan", seed=0, **SMALL)
    fit = SNGANFit(width=4, critic_steps=3, generator_batch=2)
    players = fit.players(manifold)
    images = torch.rand(4, 1, 16, 8)
    turns = [list(fit.turns(step_of(manifold, players, images, number))) for number in range(6)]
    names = [[name for turn in step for name in turn] for step in turns]
    critic, both = ["discriminator"], ["discriminator", "generator"]
    assert names == [critic, critic, both] * 2
    # The discriminator's loss has no graph through the generator.
    loss = turns[0][0]["discriminator"]
    parameters = list(manifold.parameters())
    assert set(torch.autograd.grad(loss, parameters, allow_unused=True)) == {None}
    gradients = torch.autograd.grad(turns[2][1]["generator"], parameters)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_distribution_is_learned():
    """Two kinds of images, bright at the top or at the bottom: samples come to be of both kinds."""
    images = torch.full((32, 1, 8, 8), 0.2)
    images[:16, :, :4] = images[16:, :, 4:] = 0.8
    manifold = build_manifold("sngan", image_shape=(1, 8, 8), seed=0, latent_size=4, width=8)
    fit = SNGANFit(width=8, critic_steps=1, generator_batch=1)
    train(fit, manifold, images, 200, {"generator": 2e-3, "discriminator": 2e-3})
    with torch.no_grad():
        samples = manifold.decode(manifold.sample_codes(torch.zeros(100, dtype=torch.int64)))
    distance = (samples.unsqueeze(1) - images[::16]).abs().mean((2, 3, 4))
    # Grey images would be at 0.3.
    assert distance.min(1).values.mean() < 0.15
    assert distance.argmin(1).bincount(minlength=2).min() >= 15


@pytest.mark.parametrize("name", ["critic_steps", "width", "generator_batch"])
def test_counts_of_the_fit_are_checked(name):
    with pytest.raises(ConfigError, match=f"{name}: expected at least 1, found 0"):
        SNGANFit(**{name: 0})


def test_the_fit_wants_its_own_manifold(plane):
    with pytest.raises(InputError, match="expected an SNGAN, found Plane"):
        SNGANFit().players(plane)
