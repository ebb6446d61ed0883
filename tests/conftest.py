"""A small net, small manifolds, and every threat model and attack by name, for the tests of all rooms."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from onmanifold.attacks import (
    APGD,
    FAB,
    FGSM,
    MIA,
    PGD,
    Attack,
    AutoAttack,
    CarliniWagner,
    ProjectedAdam,
    RandomPerturbation,
    RayS,
    Square,
)
from onmanifold.manifolds.base import Manifold
from onmanifold.threats import (
    JPEG,
    Elastic,
    Fog,
    Gabor,
    ImageBall,
    JointBall,
    LatentBall,
    Snow,
    Threat,
    TransformationBall,
)

# The same examples in every run: what fails here fails again.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same numbers for a test whatever ran before it, or beside it in another process."""
    torch.manual_seed(0)


SHAPE = (1, 8, 8)
LATENTS = 6
CLASSES = 4


class Plane(Manifold):
    """Images 1/2 + W z of latents z in [-1, 1], W with orthogonal columns: exact, and inside (0, 1)."""

    name, exact, box, fingerprint = "plane", True, 1.0, "plane"
    code_size = latent_size = LATENTS
    image_shape = SHAPE
    levels = {0: slice(0, 2), 1: slice(2, 5), 2: slice(5, 6)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(64, LATENTS, generator=generator).double())[0]
        self.register_buffer("weight", basis.T * (0.5 / basis.abs().sum(1).max()))

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ torch.linalg.pinv(self.weight).to(images)

    def decode(self, codes: Tensor) -> Tensor:
        # Summed row by row, so that a sample's image does not depend on its batch.
        return (0.5 + (codes.unsqueeze(2) * self.weight.to(codes)).sum(1)).view(-1, *SHAPE)


class Squashed(Plane):
    """Images sigmoid(W z): most images are not on it; two more columns of a code never move."""

    name, exact, box, fingerprint = "squashed", False, None, "squashed"
    code_size = LATENTS + 2

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = torch.logit(images.clamp(0.01, 0.99)) - 0.1
        latents = logits.flatten(1) @ torch.linalg.pinv(4 * self.weight).to(images)
        fixed = torch.full_like(latents[:, :1], 0.1)
        return torch.cat([latents, fixed, labels.to(latents).unsqueeze(1)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        rows = codes[:, :LATENTS, None] * (4 * self.weight.to(codes))
        return torch.sigmoid(rows.sum(1) + codes[:, LATENTS, None]).view(-1, *SHAPE)


class Images(NamedTuple):
    images: Tensor
    labels: Tensor
    codes: Tensor | None
    indices: Tensor


def make_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Convolutions with and without batch norm, of running statistics that are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(54, CLASSES),
        )
        nn.init.uniform_(net[1].weight, 0.5, 1.5)
        nn.init.uniform_(net[1].bias, -0.5, 0.5)
        net(torch.rand(100, *SHAPE))
        # No class is preferred, so that all of them occur.
        net[-1].bias.data -= net.eval()(torch.rand(100, *SHAPE)).mean(0).detach()
        # Logits of a trained net's size, so that values and gradients are of the usual size too.
        for parameter in net[-1].parameters():
            parameter.data *= 8
    return net.eval().to(dtype)


NET, PLANE, SQUASHED = make_net(torch.float64), Plane(), Squashed()


def make_images(count: int, *, on_manifold: bool = False) -> Images:
    """float64 images, a tenth of their pixels at 0 or 1 unless on the plane; one label in ten is wrong.

    Only images on the plane come with their codes.
    """
    generator = torch.Generator().manual_seed(1)
    codes = 1.6 * torch.rand(count, LATENTS, generator=generator).double() - 0.8
    images = (1.2 * torch.rand(count, *SHAPE, generator=generator).double() - 0.1).clamp(0, 1)
    if on_manifold:
        images = PLANE.decode(codes)
    with torch.no_grad():
        labels = NET(images).argmax(1)
    labels[::10] = (labels[::10] + 1) % CLASSES
    indices = 10_000 + torch.randperm(count, generator=generator)
    return Images(images, labels, codes if on_manifold else None, indices)


def scaled(threat: type[Threat], **fields: object) -> Callable[[float], Threat]:
    """The threat model as a function of a factor on its radius."""
    radius = fields.pop("radius")
    return lambda factor: threat(radius=radius * factor, **fields)


THREATS: dict[str, Callable[[float], Threat]] = {
    "image_linf": scaled(ImageBall, norm="linf", radius=0.045),
    "image_l2": scaled(ImageBall, norm="l2", radius=0.27),
    "image_l1": scaled(ImageBall, norm="l1", radius=0.9),
    "latent_linf": scaled(LatentBall, manifold=PLANE, norm="linf", radius=0.2),
    "latent_l2": scaled(LatentBall, manifold=PLANE, norm="l2", radius=0.4),
    "latent_l1": scaled(LatentBall, manifold=PLANE, norm="l1", radius=0.6),
    "latent_levels": scaled(LatentBall, manifold=PLANE, norm="linf", radius=0.35, levels=(2, 0)),
    "latent_residual": scaled(
        LatentBall, manifold=SQUASHED, norm="l2", radius=1.0, keep_residual=True
    ),
    "joint": lambda factor: JointBall(
        image=ImageBall("linf", 0.008 * factor), latent=LatentBall(PLANE, "l2", 0.2 * factor)
    ),
    "transformation_linf": scaled(TransformationBall, radius=0.2),
    "transformation_l2": scaled(TransformationBall, norm="l2", radius=0.4),
    "elastic": scaled(Elastic, radius=0.25),
    "jpeg_l1": scaled(JPEG, norm="l1", radius=8.0),
    "fog": scaled(Fog, radius=0.25),
    "snow": scaled(Snow, radius=0.4),
    "gabor": scaled(Gabor, radius=0.12),
}

ON_PLANE = ("latent_linf", "latent_l2", "latent_l1", "latent_levels", "joint")

ATTACKS: dict[str, Callable[[Threat], Attack]] = {
    "fgsm": FGSM,
    "pgd": lambda threat: PGD(threat, steps=6),
    "pgd_margin": lambda threat: PGD(
        threat, steps=4, restarts=2, early_stop=False, objective="margin"
    ),
    "mia": lambda threat: MIA(threat, steps=6),
    "adam": lambda threat: ProjectedAdam(threat, steps=6, step_size=0.03, restarts=2),
    "random": lambda threat: RandomPerturbation(threat, restarts=4),
    "apgd": lambda threat: APGD(threat, steps=8),
    "apgd_t": lambda threat: APGD(threat, steps=6, objective="targeted_dlr"),
    "fab": lambda threat: FAB(threat, steps=6, targets=2),
    "autoattack": lambda threat: AutoAttack(threat, steps=4, queries=20),
    "square": lambda threat: Square(threat, queries=60),
    "rays": lambda threat: RayS(threat, queries=50),
    "carlini_wagner": lambda threat: CarliniWagner(
        threat, steps=8, rounds=2, step_size=0.2, first_constant=0.1
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"threat_name", "attack_name"} <= set(metafunc.fixturenames):
        pairs = [
            (threat, attack)
            for threat in THREATS
            for attack in ATTACKS
            # FAB measures distances between images.
            if attack != "fab" or threat.startswith("image")
        ]
        metafunc.parametrize(("threat_name", "attack_name"), pairs)
        return
    for fixture, names in (("threat_name", THREATS), ("attack_name", ATTACKS)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(names))


@pytest.fixture
def make_threat(threat_name: str) -> Callable[[float], Threat]:
    """The threat model under test, its radius times a factor."""
    return THREATS[threat_name]


@pytest.fixture
def threat(threat_name: str) -> Threat:
    return THREATS[threat_name](1.0)


@pytest.fixture
def batch(threat_name: str) -> Callable[[int], Images]:
    """Images for the threat model under test."""
    return lambda count: make_images(count, on_manifold=threat_name in ON_PLANE)


@pytest.fixture
def make_attack(attack_name: str) -> Callable[[Threat], Attack]:
    """The attack under test, on a threat model."""
    return ATTACKS[attack_name]


@pytest.fixture(scope="session")
def small_net() -> nn.Module:
    """The net that labels the images, float64; tests leave it as it is."""
    return NET


@pytest.fixture(scope="session")
def small_net_32() -> nn.Module:
    """The same in float32."""
    return make_net(torch.float32)


@pytest.fixture
def own_net() -> Callable[..., nn.Module]:
    """Makes a small net that a test may change."""
    return make_net


@pytest.fixture
def images() -> Callable[..., Images]:
    """Makes images with labels, codes and indices."""
    return make_images


@pytest.fixture(scope="session")
def plane() -> Manifold:
    """An exact manifold, its latents in [-1, 1]."""
    return PLANE


@pytest.fixture(scope="session")
def squashed() -> Manifold:
    """A manifold that most images are not on, with two fixed columns in its codes."""
    return SQUASHED


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The folder of a real dataset under $ONMANIFOLD_DATA; tests that ask for an absent one are skipped."""

    def folder(name: str) -> Path:
        root = os.environ.get("ONMANIFOLD_DATA")
        if not root or not (Path(root) / name).is_dir():
            pytest.skip(f"needs $ONMANIFOLD_DATA/{name}")
        return Path(root) / name

    return folder
