import math

import pytest
import torch
from torch.nn import functional

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds import build_manifold, load_manifold, save_manifold
from onmanifold.manifolds.coding import Posterior
from onmanifold.training.fits.base import FitStep
from onmanifold.training.fits.cvae import CVAEFit

CLASSES = 3
OPTIONS = {
    "mlp": {"image_shape": (1, 6, 5), "network": "mlp", "latent_size": 4, "hidden_size": 16},
    "conv": {"image_shape": (2, 9, 12), "network": "conv", "latent_size": 4, "channels": (6, 8, 4)},
}


def make(kind, dtype=torch.float64, seed=0):
    """A small CVAE whose batch norm has seen something."""
    manifold = build_manifold("cvae", CLASSES, seed=seed, **OPTIONS[kind]).to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in manifold.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for values in (module.running_var, module.weight):
                    torch.nn.init.uniform_(values, 0.5, 1.5)
                for values in (module.running_mean, module.bias):
                    torch.nn.init.uniform_(values, -0.5, 0.5)
    return manifold


def draw(manifold, count, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *manifold.image_shape, generator=generator).to(dtype)
    return images, torch.arange(count) % CLASSES


def step_of(manifold, images, labels, number=0):
    players = CVAEFit().players(manifold)
    indices = torch.arange(len(images))
    return FitStep(manifold, players, images, labels, indices, 0, number, 100, 0)


@pytest.fixture(params=["mlp", "conv"])
def kind(request):
    return request.param


@pytest.mark.parametrize(
    ("shape", "network", "latents"),
    [((1, 28, 28), "mlp", 10), ((3, 32, 32), "conv", 128), ((1, 17, 30), "mlp", 10)],
)
def test_the_papers_networks_are_the_defaults(shape, network, latents):
    manifold = build_manifold("cvae", 10, shape, seed=0)
    assert manifold.network == network
    assert (manifold.latent_size, manifold.code_size) == (latents, latents + 1)
    labels = torch.tensor([0, 9])
    codes = manifold.encode(torch.rand(2, *shape), labels)
    assert manifold.decode(codes).shape == (2, *shape)
    weights = [tuple(weight.shape) for weight in manifold.decoder.parameters() if weight.ndim > 1]
    if network == "mlp":
        assert weights == [(256, 20), (math.prod(shape), 256)]
    else:
        assert len(weights) == 5
        assert weights[-1] == (32, 3, 4, 4)


@pytest.mark.parametrize("sides", [(28, 28), (32, 32), (56, 48), (31, 17)])
def test_convolutions_fit_any_size(sides):
    manifold = build_manifold("cvae", 2, (3, *sides), seed=0, latent_size=2, channels=(4, 4, 4, 4))
    codes = manifold.encode(torch.rand(2, 3, *sides), torch.tensor([0, 1]))
    assert manifold.decode(codes).shape == (2, 3, *sides)


def test_the_chart_is_the_decoder(kind):
    manifold = make(kind)
    codes = manifold.sample_codes(torch.tensor([2, 0, 1, 1])).double()
    expected = manifold.logits(codes[:, :4], codes[:, 4].long()).sigmoid()
    torch.testing.assert_close(manifold.decode(codes), expected, rtol=0, atol=1e-13)
    chart = manifold.chart(codes)
    moved = chart.latents + 0.3
    expected = manifold.logits(moved, codes[:, 4].long()).sigmoid()
    torch.testing.assert_close(chart.decode(moved), expected, rtol=0, atol=1e-13)
    for mask in (codes[:, 0] > 0, torch.tensor([3, 0]), torch.zeros(4).bool()):
        kept = chart.keep(mask)
        torch.testing.assert_close(kept.decode(moved[mask]), expected[mask], rtol=0, atol=1e-13)
        assert torch.equal(kept.fixed, codes[mask, 4:])
    assert chart.decode(moved).shape == (4, *manifold.image_shape)


def test_the_chart_asks_no_gradient_of_the_weights(kind):
    manifold = make(kind)
    codes = manifold.sample_codes(torch.tensor([2, 0])).double().requires_grad_()
    images = manifold.decode(codes)
    images.sum().backward()
    assert codes.grad[:, :4].abs().min() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in manifold.parameters())


def test_gradients_to_the_code(kind):
    manifold = make(kind)
    chart = manifold.chart(manifold.sample_codes(torch.tensor([2, 0])).double())
    assert torch.autograd.gradcheck(chart.decode, chart.latents.clone().requires_grad_())


def test_the_class_goes_into_encoder_and_decoder(kind):
    manifold = make(kind)
    images, _ = draw(manifold, 1)
    codes = [manifold.encode(images, torch.tensor([label])) for label in range(CLASSES)]
    latents = [code[:, :4] for code in codes]
    assert (latents[0] - latents[1]).abs().max() > 1e-3
    assert [code[0, 4].item() for code in codes] == [0, 1, 2]
    pictures = [
        manifold.decode(torch.tensor([[0.1, 0.2, 0.3, 0.4, label]]).double()) for label in (0, 1)
    ]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_one_of_a_batch_is_as_one_alone(kind):
    manifold = make(kind)
    images, labels = draw(manifold, 6)
    codes = manifold.encode(images, labels)
    torch.testing.assert_close(manifold.encode(images[4:5], labels[4:5]), codes[4:5])
    torch.testing.assert_close(manifold.decode(codes[4:5]), manifold.decode(codes)[4:5])


def test_double_precision_images_on_single_precision_weights(kind):
    manifold = make(kind, torch.float32)
    images, labels = draw(manifold, 3)
    codes = manifold.encode(images, labels)
    assert codes.dtype == torch.float64
    rebuilt = manifold.decode(codes)
    assert rebuilt.dtype == torch.float64
    torch.testing.assert_close(manifold.double().decode(codes), rebuilt, rtol=0, atol=1e-13)


def test_the_divergence_is_the_known_one():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 5, 7, generator=generator).double()
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    found = Posterior(mean, log_variance).divergence()
    torch.testing.assert_close(found, expected.sum(1))
    assert Posterior(torch.zeros(1, 2), torch.zeros(1, 2)).divergence().item() == 0


@pytest.mark.parametrize("reconstruction", ["bernoulli", "l2"])
def test_the_loss_is_the_negative_evidence_lower_bound(kind, reconstruction):
    manifold = make(kind).train()
    images, labels = draw(manifold, 6)
    fit = CVAEFit(reconstruction=reconstruction, kl_weight=0.7)
    torch.manual_seed(3)
    step = step_of(manifold, images, labels)
    (turn,) = fit.turns(step)
    torch.manual_seed(3)
    mean, log_variance = manifold.posterior(images, labels)
    latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    made = manifold.logits(latents, labels).sigmoid()
    errors = (made - images).square()
    if reconstruction == "bernoulli":
        errors = -images * made.log() - (1 - images) * (1 - made).log()
    divergence = Posterior(mean, log_variance).divergence()
    expected = errors.sum((1, 2, 3)) + 0.7 * divergence
    torch.testing.assert_close(turn["manifold"], expected.mean())
    torch.testing.assert_close(step.metrics["divergence"], divergence.mean())


def test_the_bound_is_below_the_likelihood():
    manifold = make("mlp")
    images, labels = draw(manifold, 4)
    fit, count = CVAEFit(), 4000
    bounds = torch.stack(
        [
            fit.validate(manifold, images, labels, torch.arange(4), seed)["negative_elbo"]
            for seed in range(200)
        ]
    )
    # The likelihood of binary cross-entropy by importance sampling from the posterior.
    mean, log_variance = manifold.posterior(images, labels)
    noise = torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    latents = mean + noise * (log_variance / 2).exp()
    logits = manifold.logits(latents.flatten(0, 1), labels.repeat(count)).view(count, *images.shape)
    inside = -functional.binary_cross_entropy_with_logits(
        logits, images.expand_as(logits), reduction="none"
    ).flatten(2)
    prior = -latents.square().sum(2) / 2
    posterior = -(noise.square() + log_variance).sum(2) / 2
    likelihood = (inside.sum(2) + prior - posterior).logsumexp(0) - math.log(count)
    assert bool((bounds.mean(0) > -likelihood).all())
    assert (bounds.mean(0) + likelihood).max() < 5


def test_a_draw_in_validation_is_a_samples_own(kind):
    manifold, fit = make(kind), CVAEFit()
    images, labels = draw(manifold, 6)
    indices = torch.tensor([9, 4, 7, 1, 0, 3])
    whole = fit.validate(manifold, images, labels, indices, 5)
    assert set(whole) == {
        "negative_elbo",
        "divergence",
        "reconstruction_l1",
        "reconstruction_l2",
    }
    part = fit.validate(manifold, images[2:3], labels[2:3], indices[2:3], 5)
    for name, values in part.items():
        torch.testing.assert_close(values, whole[name][2:3])
    other = fit.validate(manifold, images, labels, indices, 6)
    assert not torch.equal(other["negative_elbo"], whole["negative_elbo"])
    assert fit.score in whole


def test_extreme_logits_are_safe(kind):
    manifold = make(kind, torch.float32).train()
    images, labels = draw(manifold, 4, torch.float32)
    with torch.no_grad():
        manifold.decoder[-1].bias.fill_(500)
    (turn,) = CVAEFit().turns(step_of(manifold, images.round(), labels))
    turn["manifold"].backward()
    assert turn["manifold"].isfinite()
    assert all(bool(weight.grad.isfinite().all()) for weight in manifold.parameters())


def test_training_learns_classes(kind):
    """Each class is one image: the class alone tells it."""
    torch.manual_seed(0)
    manifold = make(kind, torch.float32).train()
    pictures, _ = draw(manifold, CLASSES, torch.float32)
    labels = torch.arange(30) % CLASSES
    optimizer = torch.optim.Adam(manifold.parameters(), lr=0.01)
    for number in range(150):
        (turn,) = CVAEFit().turns(step_of(manifold, pictures[labels], labels, number))
        optimizer.zero_grad()
        turn["manifold"].backward()
        optimizer.step()
    manifold.eval()
    drawn = manifold.decode(manifold.sample_codes(labels, seed=2))
    errors = (drawn[:, None] - pictures[None]).square().flatten(2).mean(2)
    assert torch.equal(errors.argmin(1), labels)
    assert errors.gather(1, labels[:, None]).mean() < 0.02


def test_saved_and_loaded(kind, tmp_path):
    manifold = make(kind, torch.float32)
    again = load_manifold(save_manifold(manifold, tmp_path / "cvae.safetensors"))
    assert again.fingerprint == manifold.fingerprint
    codes = manifold.sample_codes(torch.tensor([0, 2]))
    assert torch.equal(again.decode(codes), manifold.decode(codes))
    assert make(kind, torch.float32, seed=1).fingerprint != manifold.fingerprint


def test_what_does_not_fit_is_an_error(kind):
    with pytest.raises(ConfigError, match="network"):
        build_manifold("cvae", CLASSES, (1, 8, 8), network="transformer")
    with pytest.raises(ConfigError, match="4 layers halve images 15 x 40"):
        build_manifold("cvae", CLASSES, (3, 15, 40))
    manifold = make(kind)
    images, labels = draw(manifold, 2)
    with pytest.raises(InputError, match="found label 3"):
        manifold.encode(images, labels + 2)
    with pytest.raises(InputError, match="class from 0 to 2"):
        manifold.decode(torch.tensor([[0.0, 0, 0, 0, 3]]).double())
    for fields in ({"kl_weight": -1}, {"kl_weight": math.nan}, {"reconstruction": "l1"}):
        with pytest.raises(ConfigError):
            FITS.build({"type": "cvae", **fields})
    with pytest.raises(ConfigError, match="expected a CVAE, found Linear"):
        next(CVAEFit().turns(step_of(torch.nn.Linear(1, 1), images, labels)))
