"""AutoAttack: which members run in which order, on whom, and that luck is no success."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from onmanifold.attacks import Engine, Square
from onmanifold.attacks.apgd import APGD
from onmanifold.attacks.autoattack import _SEED_STRIDE, AutoAttack
from onmanifold.attacks.fab import FAB
from onmanifold.foundation.errors import ConfigError, InputError, OnManifoldError
from onmanifold.foundation.registry import ATTACKS, Context, describe
from onmanifold.objectives import DLR, CrossEntropy, TargetedDLR
from onmanifold.threats import ImageBall, JointBall, LatentBall, TransformationBall

NORMS = ("linf", "l2", "l1")
RADII = {"linf": 0.03, "l2": 0.16, "l1": 0.6}


def summary(cascade):
    """What distinguishes the members, by name."""
    found = {}
    for name, attack in cascade.items():
        if isinstance(attack, APGD):
            found[name] = (type(attack.objective), attack.steps, attack.restarts, attack.passes)
        elif isinstance(attack, FAB):
            found[name] = (FAB, attack.steps, attack.restarts, attack.targets)
        else:
            found[name] = (Square, attack.queries, attack.restarts)
    return found


@pytest.mark.parametrize("norm", NORMS)
def test_the_standard_cascade(norm):
    attack = AutoAttack(ImageBall(norm, 0.1))
    restarts, targets = (5, 5) if norm == "l1" else (1, 9)
    assert list(attack.cascade) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert summary(attack.cascade) == {
        "apgd-ce": (CrossEntropy, 100, restarts, 1),
        "apgd-t": (TargetedDLR, 100, 1, 1),
        "fab-t": (FAB, 100, 1, 9),
        "square": (Square, 5000, 1),
    }
    assert attack.cascade["apgd-t"].objective.targets == targets
    assert attack.cascade["apgd-ce"].rising_share == 0.75
    square = attack.cascade["square"]
    assert square.first_share == 0.8
    assert not square.rescale_schedule
    assert all(member.threat is attack.threat for member in attack.cascade.values())


@pytest.mark.parametrize("norm", NORMS)
def test_the_larger_cascade(norm):
    attack = AutoAttack(ImageBall(norm, 0.1), version="plus")
    assert list(attack.cascade) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert summary(attack.cascade) == {
        "apgd-ce": (CrossEntropy, 100, 5, 1),
        "apgd-dlr": (DLR, 100, 5, 1),
        "fab": (FAB, 100, 5, None),
        "square": (Square, 5000, 1),
        "apgd-t": (TargetedDLR, 100, 1, 1),
        "fab-t": (FAB, 100, 1, 9),
    }
    assert attack.cascade["apgd-t"].objective.targets == 9


@pytest.mark.parametrize("norm", NORMS)
def test_the_cascade_for_random_models(norm):
    attack = AutoAttack(ImageBall(norm, 0.1), version="rand")
    assert list(attack.cascade) == ["apgd-ce", "apgd-dlr"]
    assert summary(attack.cascade) == {
        "apgd-ce": (CrossEntropy, 100, 1, 20),
        "apgd-dlr": (DLR, 100, 1, 20),
    }


def test_fab_is_for_images_only(plane):
    image, latent = ImageBall("linf", 0.01), LatentBall(plane, "l2", 0.2)
    for threat in (latent, JointBall(image=image, latent=latent), TransformationBall(radius=0.1)):
        assert list(AutoAttack(threat).cascade) == ["apgd-ce", "apgd-t", "square"]
        plus = ["apgd-ce", "apgd-dlr", "square", "apgd-t"]
        assert list(AutoAttack(threat, version="plus").cascade) == plus
        assert list(AutoAttack(threat, version="rand").cascade) == ["apgd-ce", "apgd-dlr"]
        with pytest.raises(InputError, match=r"only: .*fab-t"):
            AutoAttack(threat, only=("fab-t",))


def test_members_can_be_chosen_and_their_budgets_set():
    attack = AutoAttack(ImageBall(), only=("square", "apgd-ce"), steps=7, queries=11)
    # In the order of the version, whatever that of the choice.
    assert list(attack.cascade) == ["apgd-ce", "square"]
    assert summary(attack.cascade) == {
        "apgd-ce": (CrossEntropy, 7, 1, 1),
        "square": (Square, 11, 1),
    }
    assert set(attack.members) == {"clean", "apgd-ce", "square"}
    whole = AutoAttack(ImageBall(), steps=7, queries=11)
    assert summary(whole.cascade)["fab-t"] == (FAB, 7, 1, 9)
    engine = Engine(fold=False)
    assert replace(attack, engine=engine).engine == engine


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ("apgd-cee",)}, r"only.*'apgd-ce', .*found 'apgd-cee'"),
        ({"only": ("squares", "apgd-ce")}, r"only.*'square', found 'squares'"),
        ({"only": ("apgd-dlr",)}, r"only: .*'apgd-dlr'.*Valid: apgd-ce, apgd-t, fab-t, square"),
        ({"only": ()}, "only"),
        ({"version": "standart"}, r"version: .*'standart'"),
        ({"steps": 0}, "steps"),
        ({"queries": 0}, "queries"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        AutoAttack(ImageBall(), **settings)


def test_the_specification_of_an_experiment_file():
    spec = {
        "type": "autoattack",
        "threat": {"type": "image_ball", "norm": "l2", "radius": 0.25},
        "version": "plus",
        "only": ["apgd-ce", "fab"],
        "steps": 12,
    }
    built = ATTACKS.build(spec)
    expected = AutoAttack(ImageBall("l2", 0.25), "plus", only=("apgd-ce", "fab"), steps=12)
    assert built == expected
    described = describe(expected)
    assert described["type"] == "autoattack"
    assert ATTACKS.build(described) == expected
    assert ATTACKS.build(describe(AutoAttack(ImageBall()))) == AutoAttack(ImageBall())
    context = Context(named={"threat": {"near": ImageBall("l1", 2.0)}})
    short = ATTACKS.build({"type": "autoattack", "threat": "near"}, context)
    assert short == AutoAttack(ImageBall("l1", 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versoin": "rand"}, r"'versoin'.*version"),
        ({"version": "fast"}, "version.*'fast'"),
        ({"only": ["apgd-ec"]}, "only"),
        ({"only": ["fab"]}, r"only: .*'fab'.*Did you mean 'fab-t'"),
        ({"steps": "many"}, "steps"),
    ],
)
def test_wrong_specifications(change, message):
    with pytest.raises(ConfigError, match=message):
        ATTACKS.build({"type": "autoattack", "threat": "image_ball"} | change)


def run(attack, model, batch, rows=slice(None), seed=0):
    codes = None if batch.codes is None else batch.codes[rows]
    images, labels, indices = batch.images[rows], batch.labels[rows], batch.indices[rows]
    return attack(model, images, labels, codes, seed=seed, indices=indices)


SMALL = {"steps": 8, "queries": 40}


@pytest.mark.parametrize("norm", NORMS)
def test_found_by_is_who_fooled_the_model(small_net, images, norm):
    batch = images(60)
    attack = AutoAttack(ImageBall(norm, RADII[norm]), **SMALL)
    result = run(attack, small_net, batch)
    with torch.no_grad():
        clean = small_net(batch.images).argmax(1) != batch.labels
    by = result.found_by
    assert len(by) == 60
    assert [name is not None for name in by] == result.success.tolist()
    assert [name == "clean" for name in by] == clean.tolist()
    assert set(by) <= {*attack.members, None}
    assert {"clean", "apgd-ce", None} <= set(by)
    # Nothing is changed, and nothing spent but the pass that shows it, where none is needed.
    assert torch.equal(result.images[clean], batch.images[clean])
    assert (result.size["image"][clean] == 0).all()
    assert (result.forwards[clean] <= 1).all()
    assert (result.backwards[clean] == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_each_member_attacks_those_that_are_left(small_net, images, norm):
    batch = images(60)
    attack = AutoAttack(ImageBall(norm, RADII[norm]), **SMALL)
    result = run(attack, small_net, batch)
    # The same cascade, cut off after each of its members: the later ones cost those already broken nothing.
    before = None
    for count in range(1, 1 + len(attack.cascade)):
        shorter = replace(attack, only=tuple(list(attack.cascade)[:count]))
        part = run(shorter, small_net, batch)
        assert torch.equal(part.forwards[part.success], result.forwards[part.success])
        assert torch.equal(part.backwards[part.success], result.backwards[part.success])
        assert torch.equal(part.images[part.success], result.images[part.success])
        for name, whole, success in zip(part.found_by, result.found_by, part.success, strict=True):
            assert name == (whole if success else None)
        if before is not None:
            assert (part.success >= before.success).all()
            left = ~before.success
            assert (part.forwards[left] > before.forwards[left]).all()
        before = part
    assert torch.equal(before.success, result.success)
    assert 0 < (~result.success).sum() < 50


@pytest.mark.parametrize("norm", NORMS)
def test_robust_is_what_withstands_all_members_one_by_one(small_net, images, norm):
    batch = images(60)
    attack = AutoAttack(ImageBall(norm, RADII[norm]), **SMALL)
    result = run(attack, small_net, batch)
    left, by = torch.arange(60), [None] * 60
    with torch.no_grad():
        wrong = small_net(batch.images).argmax(1) != batch.labels
    for row in left[wrong].tolist():
        by[row] = "clean"
    left = left[~wrong]
    forwards = torch.zeros(60, dtype=torch.int32)
    backwards = forwards.clone()
    for place, (name, member) in enumerate(attack.cascade.items()):
        # Each with random numbers of its own.
        part = run(member, small_net, batch, left, seed=(place + 1) * _SEED_STRIDE)
        forwards[left] += part.forwards
        backwards[left] += part.backwards
        for row in left[part.success].tolist():
            by[row] = name
        left = left[~part.success]
    assert by == list(result.found_by)
    assert torch.equal(result.forwards, forwards)
    assert torch.equal(result.backwards, backwards)
    assert torch.equal((~result.success).nonzero().squeeze(1), left)


def test_later_members_find_what_earlier_ones_do_not():
    class Flat(nn.Module):
        """Without a gradient: only queries can fool it."""

        def forward(self, images):
            rounded = (20 * images).round() / 20
            rising = rounded.flatten(1).mean(1)
            return torch.stack([torch.full_like(rising, 0.52), rising], dim=1) + 0 * images.sum()

    images, labels = torch.full((4, 1, 6, 6), 0.5), torch.zeros(4, dtype=torch.int64)
    attack = AutoAttack(ImageBall("linf", 0.2), steps=3, queries=50, only=("apgd-ce", "square"))
    # Random starts alone might do; a single pixel's share is too small for that.
    result = attack(Flat(), images, labels)
    assert result.found_by == ("square",) * 4
    assert result.success.all()


class Net(nn.Sequential):
    """Linear, with a kink."""

    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))
        generator = torch.Generator().manual_seed(classes)
        for parameter in self.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        self.double()


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_few_classes(norm, classes, version):
    model = Net(classes)
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        labels = model(images).argmax(1)
    for factor, broken in ((0.01, False), (20, True)):
        threat = ImageBall(norm, factor * RADII[norm])
        attack = AutoAttack(threat, version, steps=4, queries=10)
        result = attack(model, images, labels)
        assert result.success.double().mean() > 0.9 if broken else result.success.sum() <= 2
        assert result.images.isfinite().all()
        assert result.objective.isfinite().all()


class Lucky(nn.Module):
    """Right about every image, but on every pass wrong about a share of them, whatever they look like."""

    def __init__(self, share, classes=4, noise=1e-3):
        super().__init__()
        self.share, self.classes, self.noise = share, classes, noise
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        flat = images.flatten(1)
        # The label is 0 as long as the image is not changed beyond recognition.
        right = torch.stack([self.scale * (2 + flat[:, 0]), *flat[:, 1 : self.classes].T], dim=1)
        right = right + self.noise * torch.randn(right.shape)
        wrong = torch.rand(len(images)) < self.share
        return torch.where(wrong.unsqueeze(1), right.roll(1, dims=1), right)


@pytest.mark.parametrize("version", ["standard", "rand"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_lucky_failure_of_a_random_model_is_no_success(share, version):
    count = 40
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(count, dtype=torch.int64)
    attack = AutoAttack(ImageBall("linf", 0.05), version, steps=6, queries=20)
    # One failure in dozens of passes is certain; to fail in most of them is not.
    result = attack(Lucky(share), images, labels)
    assert not result.success.any()
    assert result.found_by == (None,) * count
    assert (result.predictions == 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_luck_is_no_success_either_where_most_passes_agree(seed):
    # Two passes over one image often show nothing of the randomness.
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(40, dtype=torch.int64)
    attack = AutoAttack(ImageBall("linf", 0.05), steps=6, queries=20)
    result = attack(Lucky(0.1, noise=0.0), images, labels, seed=seed)
    assert not result.success.any()


@pytest.mark.parametrize("seed", [0, 1])
def test_who_fooled_a_random_model_is_named_where_it_is_fooled(seed):
    images = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(60, dtype=torch.int64)
    attack = AutoAttack(ImageBall("linf", 0.05), steps=3, queries=10)
    result = attack(Lucky(0.45), images, labels, seed=seed)
    assert [name is not None for name in result.found_by] == result.success.tolist()


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_a_random_model_that_mostly_fails_is_broken(version):
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(20, dtype=torch.int64)
    attack = AutoAttack(ImageBall("linf", 0.05), version, steps=3, queries=10)
    result = attack(Lucky(0.95), images, labels)
    assert result.success.all()
    assert result.found_by == ("clean",) * 20


class NoisyLinear(nn.Module):
    """Whose weights differ on every pass, by more than they are large."""

    def __init__(self, noise):
        super().__init__()
        draw = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
        self.slope = nn.Parameter(0.5 * draw.sign())
        self.noise = noise

    def forward(self, images):
        flat = images.flatten(1) - 0.5
        slopes = self.slope + self.noise * torch.randn(flat.shape, dtype=flat.dtype)
        rising = (flat * slopes).sum(1)
        return torch.stack([-rising, rising], dim=1)


def test_gradients_are_averaged_over_passes():
    model = NoisyLinear(1.0)
    images = 0.3 + 0.4 * torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images, labels = images.double(), torch.zeros(30, dtype=torch.int64)
    attack = AutoAttack(ImageBall("linf", 0.1), "rand", only=("apgd-ce",)).cascade["apgd-ce"]
    assert attack.passes == 20
    gains = []
    for passes in (1, 20):
        one = replace(attack, steps=4, passes=passes, early_stop=False)
        result = one(model, images, labels)
        moves = (result.images - images).flatten(1)
        gains.append((moves @ model.slope.detach()).mean().item())
        assert (result.forwards == 5 * passes).all()
        assert (result.backwards == 4 * passes).all()
    most = 0.1 * model.slope.abs().sum().item()
    # The sign of one noisy gradient is right in 69 of 100 cases, that of a mean of 20 in 99.
    assert gains[0] < 0.75 * most
    assert gains[1] > 0.85 * most


def test_a_noisy_model_is_broken_where_its_mean_is():
    model = NoisyLinear(0.3)
    images = torch.full((24, 1, 8, 8), 0.5).double()
    # Beyond the reach of 0.02 · ‖slope‖₁ = 0.64, and within.
    gap = torch.linspace(0.1, 1.6, 24).double().view(-1, 1, 1, 1)
    images = images - gap / 32 * model.slope.detach().sign().view(1, 1, 8, 8)
    labels = torch.zeros(24, dtype=torch.int64)
    attack = AutoAttack(ImageBall("linf", 0.02), "rand", steps=12)
    result = attack(model, images, labels)
    reached = gap.flatten() < 0.64
    # Apart from those near the boundary, where the noise decides.
    clear = (gap.flatten() - 0.64).abs() > 0.35
    assert torch.equal(result.success[clear], reached[clear])
    assert result.success[clear].any()
    assert not result.success[clear].all()


@pytest.mark.parametrize("name", ["latent", "joint", "transformation"])
def test_on_other_threat_models_it_finds_what_its_members_find(small_net, images, plane, name):
    threat = {
        "latent": LatentBall(plane, "l2", 0.2),
        "joint": JointBall(image=ImageBall("linf", 0.008), latent=LatentBall(plane, "l2", 0.15)),
        "transformation": TransformationBall(radius=0.1),
    }[name]
    batch = images(40, on_manifold=name != "transformation")
    attack = AutoAttack(threat, **SMALL)
    whole = run(attack, small_net, batch)
    assert 4 < whole.success.sum() < 40
    found = torch.zeros(40, dtype=torch.bool)
    for place, member in enumerate(attack.cascade.values()):
        found |= run(member, small_net, batch, seed=(place + 1) * _SEED_STRIDE).success
    assert torch.equal(whole.success, found)
    region = threat.around(batch.images, batch.labels, batch.codes)
    for variable, ball in region.balls.items():
        assert (ball.size(whole.variables[variable]) <= ball.radius + 1e-9).all()
    rendered = region.render(whole.variables).clamp(0, 1)
    torch.testing.assert_close(whole.images, rendered, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(small_net(whole.images).argmax(1) != batch.labels, whole.success)


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_is_its_samples(small_net, images, norm):
    batch = images(40)
    attack = AutoAttack(ImageBall(norm, RADII[norm]), **SMALL)
    whole = run(attack, small_net, batch, seed=3)
    rows = torch.tensor([39, 0, 17, 4, 21])
    part = run(attack, small_net, batch, rows, seed=3)
    torch.testing.assert_close(part.images, whole.images[rows], rtol=0, atol=1e-9)
    assert torch.equal(part.success, whole.success[rows])
    assert torch.equal(part.forwards, whole.forwards[rows])
    assert part.found_by == tuple(whole.found_by[row] for row in rows)


def test_the_smallest_batches(small_net, images):
    batch = images(11)
    attack = AutoAttack(ImageBall("linf", 0.03), **SMALL)
    # All wrong from the start: no member has anything to do.
    with torch.no_grad():
        wrong = (small_net(batch.images).argmax(1) != batch.labels).nonzero().squeeze(1)
    result = run(attack, small_net, batch, wrong)
    assert result.found_by == ("clean",) * len(wrong)
    assert result.success.all()
    with pytest.raises(OnManifoldError, match="empty"):
        run(attack, small_net, batch, slice(0, 0))
    with pytest.raises(InputError, match=r"targets: .*untargeted"):
        attack(small_net, batch.images, batch.labels, targets=(batch.labels + 1) % 4)
