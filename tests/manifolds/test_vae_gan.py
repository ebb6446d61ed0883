import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from onmanifold.attacks import PGD
from onmanifold.data.dataset import Dataset
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import FITS, Context, build_component
from onmanifold.manifolds import build_manifold, load_manifold, save_manifold
from onmanifold.manifolds.coding import Routing
from onmanifold.threats import LatentBall
from onmanifold.training import fit as learn
from onmanifold.training.config import TrainingConfig
from onmanifold.training.fits.base import FitStep
from onmanifold.training.fits.vae_gan import VAEGANFit

SHAPE, CLASSES = (1, 10, 9), 3
EXACT = {"rtol": 0, "atol": 1e-13}


def make(class_specific=True, dtype=torch.float64, seed=0, **options):
    """A small VAE-GAN with weights and statistics as after some training."""
    options = {"latent_size": 4, "channels": (5, 6, 4)} | options
    manifold = build_manifold(
        "vae_gan", CLASSES, SHAPE, seed=seed, class_specific=class_specific, **options
    )
    stir(manifold, seed)
    return manifold.to(dtype)


def stir(module, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                for values in (part.running_var, part.weight):
                    nn.init.uniform_(values, 0.5, 1.5)
                for values in (part.running_mean, part.bias):
                    nn.init.uniform_(values, -0.5, 0.5)
            elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                part.reset_parameters()


def draw(count, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=generator).to(dtype), torch.arange(count) % CLASSES


def begin(fit, manifold, images, labels):
    """A step of a fit, its discriminators drawn from seed 0."""
    torch.manual_seed(0)
    players = {name: part.to(images.dtype).train() for name, part in fit.players(manifold).items()}
    indices = torch.arange(len(images))
    return FitStep(manifold.train(), players, images, labels, indices, 0, 0, 100, 0)


def gradients(step, losses, name):
    """Of a player's loss to its own parameters; None where there is none."""
    parameters = list(step.players[name].parameters())
    return torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)


@pytest.fixture(params=[True, False], ids=["class_specific", "class_agnostic"])
def manifold(request):
    return make(request.param)


@pytest.mark.parametrize("sides", [(28, 28), (32, 32), (56, 48), (31, 9)])
@pytest.mark.parametrize("kernel", [4, 6])
def test_layers_fit_any_size(sides, kernel):
    manifold = build_manifold(
        "vae_gan", 2, (3, *sides), seed=0, channels=(4, 4, 4), decoder_kernel=kernel
    )
    images, labels = torch.rand(3, 3, *sides), torch.tensor([1, 0, 1])
    codes = manifold.encode(images, labels)
    assert codes.shape == (3, 11)
    assert manifold.decode(codes).shape == images.shape
    discriminators = manifold.discriminators()
    assert len(discriminators) == 2
    assert discriminators[0](images).shape == (3, 1)


def test_the_papers_networks_are_the_defaults():
    manifold = build_manifold("vae_gan", 2, (1, 28, 28), seed=0)

    def weights(network):
        return [tuple(weight.shape) for weight in network.parameters() if weight.ndim > 1]

    convolutions = [(64, 1, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4)]
    code = (10, 256 * 9)
    assert weights(manifold.encoders[1]) == [*convolutions, code, code]
    assert weights(manifold.decoders[1]) == [code[::-1], *reversed(convolutions)]
    assert weights(manifold.discriminators()[1]) == [*convolutions, code, (1, 10)]
    assert (manifold.box, manifold.latent_size, manifold.code_size) == (2.0, 10, 11)
    for layer in (manifold.encoders[0].trunk[3], manifold.decoders[0][2]):
        assert layer.weight.std().item() == pytest.approx(0.001, rel=0.05)


def test_each_class_has_its_own_networks():
    manifold = make()
    images, labels = draw(7)
    labels = torch.tensor([2, 0, 0, 2, 1, 0, 2])
    codes = manifold.encode(images, labels)
    assert torch.equal(codes[:, -1], labels.double())
    moved = codes[:, :4] + 0.2
    found = manifold.chart(codes).decode(moved)
    for place, label in enumerate(labels.tolist()):
        mean = manifold.encoders[label](images[place, None]).mean.clamp(-2, 2)
        torch.testing.assert_close(codes[place, None, :4], mean, **EXACT)
        expected = manifold.decoders[label](moved[place, None]).sigmoid()
        torch.testing.assert_close(found[place, None], expected, **EXACT)


def test_one_network_for_all_knows_no_class():
    manifold = make(False)
    images, labels = draw(4)
    codes = manifold.encode(images, labels)
    assert codes.shape == (4, 4)
    assert torch.equal(codes, manifold.encode(images, labels.flip(0)))
    expected = manifold.decoders[0](codes).sigmoid()
    torch.testing.assert_close(manifold.decode(codes), expected, **EXACT)


def test_routing_puts_all_back():
    labels = torch.tensor([4, 1, 1, 4, 0, 4])
    networks = {label: lambda part, label=label: part * 10 + label for label in (0, 1, 4)}
    inputs = torch.arange(12).view(6, 2)
    assert torch.equal(Routing(labels)(networks, inputs), inputs * 10 + labels[:, None])
    assert Routing(labels).present == [0, 1, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_do_not_depend_on_their_batch(manifold, dtype):
    manifold = manifold.to(dtype)
    labels = torch.tensor([2, 0, 0, 1, 2, 2])
    codes = manifold.sample_codes(labels, seed=1).to(dtype)
    whole = manifold.decode(codes)
    assert whole.dtype == dtype
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 0, "atol": 1e-6}
    single = torch.cat([manifold.decode(code[None]) for code in codes])
    torch.testing.assert_close(single, whole, **tolerance)
    chart = manifold.chart(codes)
    for mask in (codes[:, 0] > 0, torch.tensor([5, 1, 3]), torch.zeros(6).bool()):
        kept = chart.keep(mask)
        torch.testing.assert_close(kept.decode(kept.latents), whole[mask], **tolerance)
        torch.testing.assert_close(kept.keep(mask[:0].long()).decode(codes[:0, :4]), whole[:0])
        assert torch.equal(kept.fixed, codes[mask, 4:])


def test_gradients_to_the_code_and_not_to_the_weights(manifold):
    codes = manifold.sample_codes(torch.tensor([2, 0, 2])).double()
    chart = manifold.chart(codes)
    assert torch.autograd.gradcheck(chart.decode, chart.latents.clone().requires_grad_())
    manifold.decode(codes.requires_grad_()).sum().backward()
    assert codes.grad[:, :4].abs().min() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in manifold.parameters())


def test_codes_stay_in_the_box(manifold):
    images, labels = draw(6)
    with torch.no_grad():
        for encoder in manifold.encoders:
            encoder.mean.bias += 5
    assert torch.equal(manifold.encode(images, labels)[:, :4], torch.full((6, 4), 2.0).double())
    drawn = manifold.sample_codes(torch.arange(200) % CLASSES)[:, :4]
    assert drawn.abs().max() == 2
    assert (drawn.abs() == 2).double().mean() < 0.1


def test_an_attack_in_the_latent_ball(manifold):
    images, labels = draw(6, torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, CLASSES)).eval()
    threat = LatentBall(manifold.float(), "linf", 0.3)
    codes = manifold.encode(images, labels)
    result = PGD(threat, steps=3, early_stop=False)(model, images, labels, codes, seed=0)
    assert result.size["latent"].max() <= 0.3 + 1e-6
    clean = nn.functional.cross_entropy(model(manifold.decode(codes)), labels, reduction="none")
    attacked = nn.functional.cross_entropy(model(result.images), labels, reduction="none")
    assert bool((attacked > clean).all())


@pytest.mark.parametrize("encoder_adversarial", [False, True])
def test_the_losses_are_equations_7_to_9(encoder_adversarial):
    manifold, (images, labels) = make(False), draw(5)
    fit = VAEGANFit(
        reconstruction_weight=3.5,
        adversarial_weight=0.8,
        encoder_adversarial=encoder_adversarial,
    )
    step = begin(fit, manifold, images, labels)
    torch.manual_seed(7)
    (losses,) = fit.turns(step)

    torch.manual_seed(7)
    encoder, decoder, discriminator = (step.players[name][0] for name in losses)
    mean, log_variance = encoder(images)
    noise = torch.randn(5, 4, dtype=torch.float64)
    made = torch.sigmoid(decoder(mean + noise * torch.exp(log_variance / 2)))
    real_share, made_share = (discriminator(part).sigmoid()[:, 0] for part in (images, made))
    distance = 3.5 * (images - made).abs().sum((1, 2, 3))
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
    fooling = -0.8 * made_share.log()
    expected = {
        "encoder": distance + divergence + (fooling if encoder_adversarial else 0),
        "decoder": distance + fooling,
        "discriminator": -real_share.log() - (1 - made_share).log(),
    }
    assert list(losses) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss.mean())
    torch.testing.assert_close(step.metrics["reconstruction"], distance.mean() / 3.5)
    torch.testing.assert_close(step.metrics["real"], real_share.mean())
    torch.testing.assert_close(step.metrics["made"], made_share.mean())


def test_each_player_follows_its_own_loss():
    manifold, (images, labels) = make(False), draw(5)
    plain, other = VAEGANFit(adversarial_weight=0.0), VAEGANFit(adversarial_weight=100.0)
    found = {}
    for fit in (plain, other):
        step = begin(fit, manifold, images, labels)
        torch.manual_seed(7)
        (losses,) = fit.turns(step)
        found[fit] = {name: gradients(step, losses, name) for name in losses}
    for name, changes in (("encoder", False), ("decoder", True), ("discriminator", False)):
        pairs = zip(found[plain][name], found[other][name], strict=True)
        same = all(torch.allclose(first, second, rtol=1e-9) for first, second in pairs)
        assert same is not changes


def test_a_class_learns_from_its_own_images_alone():
    manifold, fit = make(), VAEGANFit(reconstruction_weight=(1.0, 2.0, 3.0))
    images, _ = draw(7)
    labels = torch.tensor([2, 0, 2, 0, 2, 0, 1])
    step = begin(fit, manifold, images, labels)
    torch.manual_seed(7)
    (losses,) = fit.turns(step)
    whole = {name: gradients(step, losses, name) for name in losses}

    # The first class draws its noise first, so that alone it draws the same.
    step = begin(fit, make(), images[labels == 0], labels[labels == 0])
    torch.manual_seed(7)
    (losses,) = fit.turns(step)
    for name, found in whole.items():
        alone = gradients(step, losses, name)
        size = len(found) // CLASSES
        for first, second in zip(found[:size], alone[:size], strict=True):
            torch.testing.assert_close(first, second * 3 / 6)
        # The second class has one image, which batch norm cannot normalise.
        assert all(part is None for part in found[size : 2 * size])
        assert all(part is not None for part in found[2 * size :])


def test_the_weights_of_classes():
    manifold, (images, labels) = make(), draw(6)
    found = []
    for weight in ((1.0, 2.0, 4.0), 1.0):
        fit = VAEGANFit(reconstruction_weight=weight, adversarial_weight=0.0)
        step = begin(fit, manifold, images, labels)
        torch.manual_seed(7)
        (losses,) = fit.turns(step)
        found.append(gradients(step, losses, "decoder"))
    size = len(found[0]) // CLASSES
    for place, (first, second) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(first, second * 2.0 ** (place // size))


def test_a_batch_of_single_images_moves_nothing():
    fit, (images, labels) = VAEGANFit(), draw(3)
    step = begin(fit, make(), images, labels)
    (losses,) = fit.turns(step)
    assert list(losses) == ["encoder", "decoder", "discriminator"]
    for name, loss in losses.items():
        assert loss.item() == 0
        parts = [part for part in gradients(step, losses, name) if part is not None]
        assert parts
        assert all(not part.any() for part in parts)


def test_extreme_logits_are_safe(manifold):
    fit, (images, labels) = VAEGANFit(encoder_adversarial=True), draw(6, torch.float32)
    for sign in (-1, 1):
        step = begin(fit, manifold.float(), images, labels)
        for network in step.players["discriminator"]:
            nn.init.constant_(network[-1].bias, sign * 1e4)
        (losses,) = fit.turns(step)
        for name, loss in losses.items():
            assert bool(loss.isfinite())
            found = gradients(step, losses, name)
            assert all(bool(part.isfinite().all()) for part in found if part is not None)


def test_training_rebuilds_images():
    """Stripes at a place of their own; a few steps already beat the mean image."""
    manifold = make(dtype=torch.float32, channels=(16, 16, 16))
    fit = VAEGANFit()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    images = torch.zeros(60, *SHAPE)
    for image, place in zip(images, torch.randint(8, (60,), generator=generator), strict=True):
        image[:, :, place : place + 2] = 1
    step = begin(fit, manifold, images, labels)
    optimizers = {
        name: torch.optim.Adam(player.parameters(), lr=0.01, betas=(0.5, 0.9))
        for name, player in step.players.items()
    }
    for _ in range(60):
        (losses,) = fit.turns(step)
        found = {name: gradients(step, losses, name) for name in losses}
        for name, optimizer in optimizers.items():
            for weight, part in zip(step.players[name].parameters(), found[name], strict=True):
                weight.grad = part
            optimizer.step()
    manifold.eval()
    figures = fit.validate(manifold, images, labels, step.indices, 0)
    mean_image = (images - images.mean(0)).abs().mean()
    assert figures["reconstruction_l1"].mean() < mean_image / 2


def test_the_loop_fits_it_with_few_and_no_images_of_a_class():
    images, _ = draw(24, torch.float32)
    labels = torch.tensor([0] * 23 + [1])
    dataset = Dataset("made", images, labels, ("a", "b", "c"), "made")
    config = {"epochs": 1, "batch_size": 12, "validation_fraction": 0}
    spec = {"type": "vae_gan", "latent_size": 4, "channels": [5, 6, 4]}
    start = build_manifold(spec, CLASSES, SHAPE, seed=3)
    end = learn(spec, dataset, config, seed=3).manifold
    for part, other in ((start.encoders, end.encoders), (start.decoders, end.decoders)):
        moved = [
            any(
                not torch.equal(first, second)
                for first, second in zip(
                    part[label].parameters(), other[label].parameters(), strict=True
                )
            )
            for label in range(CLASSES)
        ]
        assert moved == [True, False, False]


def test_the_defaults_are_a_training():
    config = build_component(TrainingConfig, VAEGANFit.defaults, Context(), "training")
    assert (config.batch_size, config.learning_rate, config.betas) == (100, 0.005, (0.5, 0.9))
    assert config.schedule.factor(2.5, 60) == pytest.approx(0.81)
    fit = FITS.build({"type": "vae_gan", "reconstruction_weight": [2.75, 5.6, 2.5]})
    assert fit.reconstruction_weight == (2.75, 5.6, 2.5)


def test_saved_and_loaded(manifold, tmp_path):
    manifold = manifold.float()
    again = load_manifold(save_manifold(manifold, tmp_path / "vae_gan.safetensors"))
    assert again.fingerprint == manifold.fingerprint
    codes = manifold.sample_codes(torch.tensor([0, 2]))
    assert torch.equal(again.decode(codes), manifold.decode(codes))


def test_what_does_not_fit_is_an_error():
    for options in ({"decoder_kernel": 5}, {"channels": (4,) * 4}, {"latent_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(options)).removeprefix("decoder_")):
            make(**options)
    manifold, (images, labels) = make(), draw(2)
    with pytest.raises(InputError, match=r"expected floats \(B, 1, 10, 9\) for vae_gan"):
        manifold.encode(images[..., 1:], labels)
    with pytest.raises(InputError, match="found label 3"):
        manifold.encode(images, labels + 2)
    with pytest.raises(InputError, match="class from 0 to 2"):
        manifold.decode(torch.full((1, 5), 3.0).double())
    for fields in (
        {"reconstruction_weight": -1.0},
        {"reconstruction_weight": ()},
        {"adversarial_weight": math.inf},
    ):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            VAEGANFit(**fields)
    with pytest.raises(ConfigError, match="expected one number, or 3"):
        VAEGANFit(reconstruction_weight=(1.0, 2.0)).players(manifold)
    with pytest.raises(ConfigError, match="expected a VAEGAN, found Linear"):
        next(VAEGANFit().turns(SimpleNamespace(manifold=nn.Linear(1, 1), images=images)))
