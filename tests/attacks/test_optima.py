"""On a linear model the worst case is known: attacks must reach it."""

import pytest
import torch
from torch import Tensor, nn

from onmanifold.attacks import FGSM, MIA, PGD, ProjectedAdam
from onmanifold.threats import ImageBall, JointBall, LatentBall

SHAPE = (1, 6, 6)
COUNT = 8
RADII = {"linf": 0.15, "l2": 0.6, "l1": 2.0}


@pytest.fixture(scope="module")
def model(linear_model) -> nn.Module:
    return linear_model()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Half of the pixels at 0, 1 or so near to them that the box is in the way."""
    generator = torch.Generator().manual_seed(1)
    images = (2 * torch.rand(COUNT, *SHAPE, generator=generator).double() - 0.5).clamp(0, 1)
    images[:, :, :2] = 0.05 + 0.9 * images[:, :, :2]
    return images


LABELS = torch.arange(COUNT) % 2


def slopes(model, labels):
    """Of the margin z_other − z_y, (B, 36)."""
    gap = (model[1].weight[1] - model[1].weight[0]).detach()
    return torch.where(labels.unsqueeze(1) == 0, gap, -gap)


def margins(model, images, labels):
    with torch.no_grad():
        logits = model(images)
    others = logits.gather(1, 1 - labels.unsqueeze(1))
    return (others - logits.gather(1, labels.unsqueeze(1))).squeeze(1)


@pytest.fixture(scope="module")
def optima(model, images, largest_gains):
    """The largest margin of each image in ball and box."""

    def find(labels, norm, radii):
        flat = images.flatten(1)
        gains = largest_gains(slopes(model, labels), norm, radii, -flat, 1 - flat)
        return margins(model, images, labels) + gains

    return find


# Long steps, which are fastest on a linear function. In l1 steps of fixed size end near the optimum (see
# `test_l1_nears_the_optimum_from_anywhere`), and on it where they fill the radius from the image itself.
SETTINGS = {
    "linf": lambda radius: {"step_size": 0.3 * radius, "start": "uniform"},
    "l2": lambda radius: {"step_size": 0.3 * radius, "start": "uniform"},
    "l1": lambda radius: {"start": "zero"},
}


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("attack", [PGD, MIA])
def test_the_optimum_in_ball_and_box_is_reached(model, images, optima, norm, attack):
    made = attack(
        ImageBall(norm, RADII[norm]),
        steps=100,
        objective="margin",
        early_stop=False,
        **SETTINGS[norm](RADII[norm]),
    )
    result = made(model, images, LABELS)
    best = optima(LABELS, norm, [RADII[norm]] * COUNT)
    assert (result.objective <= best + 1e-9).all()
    torch.testing.assert_close(result.objective, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", list(RADII))
def test_one_radius_per_sample(model, images, optima, norm):
    radii = RADII[norm] * torch.linspace(0, 2, COUNT).double()
    attack = PGD(
        ImageBall(norm, radii),
        steps=100,
        objective="margin",
        early_stop=False,
        **SETTINGS[norm](RADII[norm]),
    )
    result = attack(model, images, LABELS)
    best = optima(LABELS, norm, radii.tolist())
    torch.testing.assert_close(result.objective, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("steps", "share"), [(20, 0.03), (100, 0.008), (400, 0.002)])
def test_l1_nears_the_optimum_from_anywhere(model, images, optima, steps, share):
    attack = PGD(ImageBall("l1", 2.0), steps, objective="margin", early_stop=False)
    result = attack(model, images, LABELS)
    best = optima(LABELS, "l1", [2.0] * COUNT)
    clean = optima(LABELS, "l1", [0.0] * COUNT)
    assert (result.objective <= best + 1e-9).all()
    assert ((best - result.objective) / (best - clean)).max() < share


def test_the_default_step_sizes_reach_the_linf_optimum(model, images, optima):
    best = optima(LABELS, "linf", [0.15] * COUNT)
    for attack in (
        FGSM(ImageBall("linf", 0.15), objective="margin", early_stop=False),
        PGD(ImageBall("linf", 0.15), objective="margin", early_stop=False),
        MIA(ImageBall("linf", 0.15), objective="margin", early_stop=False),
        ProjectedAdam(ImageBall("linf", 0.15), 80, objective="margin", early_stop=False),
    ):
        result = attack(model, images, LABELS)
        torch.testing.assert_close(result.objective, best, rtol=0, atol=1e-9)


def test_cross_entropy_leads_to_the_same_optimum(model, images, optima):
    result = PGD(ImageBall("l2", 0.6), steps=100, step_size=0.2, early_stop=False)(
        model, images, LABELS
    )
    best = optima(LABELS, "l2", [0.6] * COUNT)
    torch.testing.assert_close(result.objective, nn.functional.softplus(best), rtol=0, atol=1e-5)


def test_early_stop_breaks_all_that_can_be_broken(model, images, optima):
    # Radii just below and just above each sample's distance to the boundary.
    with torch.no_grad():
        logits = model(images)
    labels = logits.argmax(1)
    for norm in RADII:
        low, high = torch.zeros(COUNT).double(), torch.full((COUNT,), 40.0).double()
        for _ in range(60):
            middle = (low + high) / 2
            broken = optima(labels, norm, middle.tolist()) > 0
            low, high = torch.where(broken, low, middle), torch.where(broken, middle, high)
        for factor, succeeds in ((0.99, False), (1.01, True)):
            settings = SETTINGS[norm](high.mean().item())
            attack = PGD(ImageBall(norm, factor * high), 100, **settings)
            result = attack(model, images, labels)
            assert (result.success == succeeds).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_optimum_on_a_linear_manifold_is_reached(linear_model, largest_gains, plane, norm):
    # The margin of a linear model is linear in the latents too.
    net = linear_model(size=64)
    generator = torch.Generator().manual_seed(1)
    codes = 1.9 * torch.rand(COUNT, 6, generator=generator).double() - 0.95
    images = plane.decode(codes)
    slope = slopes(net, LABELS) @ plane.weight.T
    gains = largest_gains(slope, norm, [0.5] * COUNT, -1 - codes, 1 - codes)
    best = margins(net, images, LABELS) + gains
    threat = LatentBall(plane, norm, 0.5)
    settings = SETTINGS[norm](0.5) | {"objective": "margin", "early_stop": False}
    result = PGD(threat, 100, **settings)(net, images, LABELS, codes)
    torch.testing.assert_close(result.objective, best, rtol=0, atol=1e-5)

    # With an image ball beside it, whose pixels are far from 0 and 1, the optima add up.
    with_image = JointBall(ImageBall("linf", 0.001), threat)
    step = settings.pop("step_size", 0.0125)
    steps = {"latent": step, "image": 0.0003}
    joint = PGD(with_image, 100, steps, **settings)(net, images, LABELS, codes)
    inside = (joint.images.flatten(1).min(1).values > 0) & (
        joint.images.flatten(1).max(1).values < 1
    )
    assert inside.sum() >= COUNT - 2
    both = best + 0.001 * slopes(net, LABELS).abs().sum(1)
    torch.testing.assert_close(joint.objective[inside], both[inside], rtol=0, atol=1e-5)
