"""What every manifold promises, and that every latent and joint attack runs on it."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from onmanifold.attacks import (
    APGD,
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
from onmanifold.classifiers import build_classifier
from onmanifold.data.dataset import Dataset
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds import (
    FontsManifold,
    Manifold,
    build_manifold,
    load_manifold,
    save_manifold,
)
from onmanifold.threats import ImageBall, JointBall, LatentBall
from onmanifold.training import fit

CLASSES = 3
COUNT = 6


@dataclass(frozen=True)
class Case:
    """A small manifold to test: how it is made, and whether a tiny fit comes before."""

    options: dict
    shape: tuple[int, int, int]
    fitted: dict | None = None
    searches: bool = False


# Options that make each as small as its kind allows. Those that encode by search are given codes.
CASES = {
    "ppca": Case({"type": "ppca", "latent_size": 4, "conditional": False}, (1, 6, 6), {}),
    "ppca_conditional": Case(
        {"type": "ppca", "latent_size": 3, "conditional": True}, (3, 5, 4), {}
    ),
    "cvae_mlp": Case(
        {"type": "cvae", "network": "mlp", "latent_size": 3, "hidden_size": 16}, (1, 28, 28)
    ),
    "cvae_conv": Case(
        {"type": "cvae", "network": "conv", "latent_size": 3, "channels": [4, 8, 8, 8]}, (3, 32, 32)
    ),
    "vae_gan": Case(
        {"type": "vae_gan", "class_specific": False, "latent_size": 3, "channels": [4, 8, 8]},
        (1, 28, 28),
    ),
    "vae_gan_classes": Case(
        {"type": "vae_gan", "class_specific": True, "latent_size": 3, "channels": [4, 8, 8]},
        (1, 28, 28),
    ),
    "glow": Case({"type": "glow", "levels": 2, "steps": 2, "width": 8}, (3, 8, 8)),
    "glow_padded": Case({"type": "glow", "levels": 3, "steps": 1, "width": 4}, (1, 28, 28)),
    "sngan": Case({"type": "sngan", "width": 8, "latent_size": 6}, (3, 32, 32), searches=True),
    "sngan_grey": Case({"type": "sngan", "width": 8, "latent_size": 6}, (1, 28, 28), searches=True),
    "stylegan": Case(
        {"type": "stylegan", "channel_base": 128, "channel_max": 8, "w_size": 8, "z_size": 8},
        (3, 32, 32),
        searches=True,
    ),
}
NAMES = ("fonts", *CASES)


def toy_dataset(shape: tuple[int, int, int], count: int = 40) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(count) % CLASSES
    base = torch.rand(CLASSES, *shape, generator=generator)
    images = (base[labels] + 0.3 * torch.rand(count, *shape, generator=generator) - 0.15).clamp(
        0, 1
    )
    return Dataset("toy", images, labels, ("a", "b", "c"), f"toy-{shape}")


def fonts() -> FontsManifold:
    generator = torch.Generator().manual_seed(2)
    letters = torch.randint(0, 256, (2, CLASSES, 10, 10), generator=generator)
    return FontsManifold(letters.to(torch.uint8))


@pytest.fixture(scope="module")
def make() -> dict[str, Manifold]:
    """The manifolds, each made once; float64 so that claims can be sharp."""
    made: dict[str, Manifold] = {}

    def get(name: str) -> Manifold:
        if name not in made:
            made[name] = _made(name).double()
        return made[name]

    return get


def _made(name: str) -> Manifold:
    if name == "fonts":
        return fonts()
    case = CASES[name]
    manifold = build_manifold(case.options, CLASSES, case.shape, seed=3)
    if case.fitted is not None:
        manifold = fit(manifold, toy_dataset(case.shape), case.fitted).manifold
    # Off their starts, at which couplings are the identity and biases are 0.
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in manifold.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return manifold


@pytest.fixture(params=NAMES)
def manifold(request, make) -> Manifold:
    request.node.manifold_name = request.param
    return make(request.param)


def codes_of(manifold: Manifold, count: int = COUNT) -> Tensor:
    return manifold.sample_codes(torch.arange(count) % CLASSES, seed=7).double()


def images_of(manifold: Manifold, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.rand(count, *manifold.image_shape, generator=generator).double()


@torch.no_grad()
def test_shapes_and_ranges(manifold):
    codes = codes_of(manifold)
    assert codes.shape == (COUNT, manifold.code_size)
    images = manifold.decode(codes)
    assert images.shape == (COUNT, *manifold.image_shape)
    assert images.dtype == torch.float64
    assert images.min() >= 0
    assert images.max() <= 1
    columns = torch.cat(
        [torch.arange(manifold.latent_size)[part] for part in manifold.levels.values()]
    )
    assert torch.equal(columns.sort().values, torch.arange(manifold.latent_size))
    far = codes.clone()
    far[:, : manifold.latent_size] *= 5
    if manifold.box is not None:
        assert codes[:, : manifold.latent_size].abs().max() <= manifold.box
        far[:, : manifold.latent_size].clamp_(-manifold.box, manifold.box)
    extreme = manifold.decode(far)
    assert bool(((extreme >= 0) & (extreme <= 1)).all())
    assert manifold.decode(codes[:0]).shape == (0, *manifold.image_shape)


@torch.no_grad()
def test_encode(manifold, request):
    name = request.node.manifold_name
    if name == "fonts" or CASES[name].searches:
        pytest.skip("encodes by search, which its own tests cover")
    images, labels = images_of(manifold), torch.arange(COUNT) % CLASSES
    codes = manifold.encode(images, labels)
    assert codes.shape == (COUNT, manifold.code_size)
    assert codes.dtype == torch.float64
    assert bool(codes.isfinite().all())
    alone = torch.cat([manifold.encode(images[i : i + 1], labels[i : i + 1]) for i in range(COUNT)])
    torch.testing.assert_close(codes, alone, rtol=0, atol=1e-9)
    assert torch.equal(codes, manifold.encode(images, labels))


@torch.no_grad()
def test_exact_says_what_the_round_trip_does(manifold, request):
    name = request.node.manifold_name
    if name == "fonts":
        # Its datasets bring their codes, of which the images are the decoded ones.
        assert manifold.exact
        return
    if CASES[name].searches:
        assert not manifold.exact
        return
    images, labels = images_of(manifold), torch.arange(COUNT) % CLASSES
    error = (manifold.decode(manifold.encode(images, labels)) - images).abs().max().item()
    assert error < 1e-9 if manifold.exact else error > 1e-2


@torch.no_grad()
def test_the_chart_decodes_as_the_manifold_does(manifold):
    codes = codes_of(manifold)
    chart = manifold.chart(codes)
    moved = codes[:, : manifold.latent_size] + 0.01
    torch.testing.assert_close(
        chart.decode(chart.latents), manifold.decode(codes), rtol=0, atol=1e-9
    )
    whole = torch.cat([moved, codes[:, manifold.latent_size :]], dim=1)
    expected = manifold.decode(whole)
    torch.testing.assert_close(chart.decode(moved), expected, rtol=0, atol=1e-9)
    mask = torch.tensor([True, False, True, True, False, False])
    torch.testing.assert_close(
        chart.keep(mask).decode(moved[mask]), expected[mask], rtol=0, atol=1e-9
    )
    rows = torch.tensor([4, 1])
    kept = chart.keep(rows).keep(torch.tensor([False, True]))
    torch.testing.assert_close(kept.decode(moved[rows[1:]]), expected[rows[1:]], rtol=0, atol=1e-9)
    for row in range(COUNT):
        one = manifold.chart(codes[row : row + 1]).decode(moved[row : row + 1])
        torch.testing.assert_close(one, expected[row : row + 1], rtol=0, atol=1e-9)


def test_gradients_to_the_code(manifold):
    """Along random directions, against central differences; ReLUs and clamps may kink for a few pixels."""
    codes = codes_of(manifold, 2)
    chart = manifold.chart(codes)
    generator = torch.Generator().manual_seed(9)
    start = chart.latents.detach()
    if manifold.box is not None:
        start = start * 0.9
    weights = torch.randn(2, *manifold.image_shape, generator=generator).double()
    for _ in range(3):
        direction = torch.randn(start.shape, generator=generator).double()
        latents = start.clone().requires_grad_()
        (chart.decode(latents) * weights).sum().backward()
        slope = (latents.grad * direction).sum(1)
        step = 1e-6
        with torch.no_grad():
            ahead, behind = (
                (chart.decode(start + sign * step * direction) * weights).flatten(1).sum(1)
                for sign in (1, -1)
            )
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_saved_and_loaded(manifold, tmp_path):
    plain = copy.deepcopy(manifold).float()
    codes = codes_of(manifold).float()
    path = save_manifold(plain, tmp_path / "manifold.safetensors", {"note": 1})
    loaded = load_manifold(path)
    assert type(loaded) is type(manifold)
    assert not any(part.training for part in loaded.modules())
    assert torch.equal(loaded.decode(codes), plain.decode(codes))
    assert loaded.fingerprint == plain.fingerprint
    assert loaded.spec == plain.spec
    assert (loaded.box, loaded.levels) == (manifold.box, manifold.levels)
    changed = copy.deepcopy(plain)
    next(tensor for tensor in changed.state_dict().values() if tensor.numel()).flatten()[0] += 1
    assert changed.fingerprint != plain.fingerprint


@torch.no_grad()
def test_determinism_and_draws_per_sample(manifold):
    codes = codes_of(manifold)
    assert torch.equal(manifold.decode(codes), manifold.decode(codes))
    assert torch.equal(codes, codes_of(manifold))
    labels, rows = torch.arange(COUNT) % CLASSES, torch.tensor([5, 2])
    some = manifold.sample_codes(labels[rows], seed=7, indices=rows)
    assert torch.equal(some.double(), codes[rows])
    assert not torch.equal(manifold.sample_codes(labels, seed=8).double(), codes)


@torch.no_grad()
def test_moves_of_dtype(manifold):
    single = copy.deepcopy(manifold).float()
    codes = codes_of(manifold)
    images = single.decode(codes.float())
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), manifold.decode(codes), rtol=0, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_moves_of_device(manifold):
    there = copy.deepcopy(manifold).cuda()
    codes = codes_of(manifold)
    torch.testing.assert_close(
        there.decode(codes.cuda()).cpu(), manifold.decode(codes), rtol=0, atol=1e-9
    )


def test_wrong_codes(manifold):
    codes = codes_of(manifold)
    with pytest.raises(InputError, match="codes"):
        manifold.check_codes(codes[:, 1:], COUNT)
    if manifold.code_size > manifold.latent_size:
        codes[0, -1] = CLASSES
        with pytest.raises(InputError, match=r"codes: expected a .*class"):
            manifold.chart(codes)


ATTACKS = {
    "fgsm": FGSM,
    "pgd": lambda threat: PGD(threat, steps=2),
    "mia": lambda threat: MIA(threat, steps=2),
    "adam": lambda threat: ProjectedAdam(threat, steps=2),
    "random": lambda threat: RandomPerturbation(threat, restarts=2),
    "apgd": lambda threat: APGD(threat, steps=3),
    "square": lambda threat: Square(threat, queries=6),
    "rays": lambda threat: RayS(threat, queries=8),
    "carlini_wagner": lambda threat: CarliniWagner(threat, steps=2, rounds=1),
    "autoattack": lambda threat: AutoAttack(threat, steps=2, queries=4),
}


@pytest.fixture(scope="module")
def make_net():
    nets: dict[tuple[int, int, int], torch.nn.Module] = {}

    def get(shape):
        if shape not in nets:
            net = build_classifier("mlp", CLASSES, shape, seed=1, hidden=[8])
            nets[shape] = net.double().eval()
        return nets[shape]

    return get


@pytest.mark.parametrize("joint", [False, True], ids=["latent", "joint"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", NAMES)
def test_every_latent_and_joint_attack_runs(name, attack, joint, make, make_net):
    manifold = make(name)
    net, codes = make_net(manifold.image_shape), codes_of(manifold, 4)
    with torch.no_grad():
        images = manifold.decode(codes)
        labels = net(images).argmax(1)
    threat = LatentBall(manifold, radius=0.1)
    if joint:
        threat = JointBall(image=ImageBall("linf", 0.02), latent=threat)
    one: Attack = ATTACKS[attack](threat)
    result = one(net, images, labels, codes, seed=0)
    assert bool(result.size["latent"].le(0.1 + 1e-9).all())
    assert bool(((result.images >= 0) & (result.images <= 1)).all())
    with torch.no_grad():
        assert torch.equal(result.success, net(result.images).argmax(1) != labels)
        moved = codes.clone()
        moved[:, : manifold.latent_size] += result.variables["latent"]
        expected = manifold.decode(moved)
    if joint:
        expected = (expected + result.variables["image"]).clamp(0, 1)
        assert bool(result.size["image"].le(0.02 + 1e-9).all())
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-9)
    assert all(parameter.grad is None for parameter in manifold.parameters())


def test_levels_move_alone(make):
    for name in ("glow", "stylegan"):
        manifold = make(name)
        codes = codes_of(manifold, 2)
        with torch.no_grad():
            images = manifold.decode(codes)
        net = build_classifier("mlp", CLASSES, manifold.image_shape, seed=1, hidden=[8]).double()
        for level, columns in manifold.levels.items():
            threat = LatentBall(manifold, radius=0.1, levels=(level,))
            result = PGD(threat, steps=1)(net.eval(), images, torch.zeros(2).long(), codes)
            moved = codes.clone()
            moved[:, columns] += result.variables["latent"]
            with torch.no_grad():
                expected = manifold.decode(moved)
            torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-9)


def test_a_manifold_in_train_mode_is_refused(make):
    manifold = copy.deepcopy(make("sngan")).train()
    codes = codes_of(manifold, 2)
    with pytest.raises(InputError, match=r"sngan is in train mode; expected `manifold.eval\(\)`"):
        LatentBall(manifold).around(torch.rand(2, 3, 32, 32).double(), torch.zeros(2).long(), codes)


@pytest.mark.parametrize("name", NAMES)
def test_pushes_are_the_adjoint_of_gradients(make, name):
    """Of any two vectors ``<J v, u> = <v, J^T u>``; and ``J v`` is what differences say."""
    manifold = make(name)
    labels = torch.arange(COUNT) % CLASSES
    codes = manifold.sample_codes(labels, seed=1).double()
    chart = manifold.chart(codes)
    generator = torch.Generator().manual_seed(7)
    latents = chart.latents.clone().requires_grad_()
    images = chart.decode(latents)
    directions = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    vectors = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    (gradients,) = torch.autograd.grad(images, latents, vectors)
    moved = chart.push(chart.latents, directions)
    assert not moved.requires_grad
    inner = (moved * vectors).flatten(1).sum(1)
    torch.testing.assert_close(inner, (gradients * directions).sum(1), rtol=1e-9, atol=1e-12)
    step = 1e-6 * directions
    with torch.no_grad():
        difference = chart.decode(chart.latents + step) - chart.decode(chart.latents - step)
    # A pixel in a thousand may lie at a kink.
    far = (difference / 2e-6 - moved).abs() > 1e-5 * (1 + moved.abs())
    assert far.double().mean() < 2e-3
