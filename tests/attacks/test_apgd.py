"""APGD against a reference written out sample by sample, against known optima, and on every kind of ball."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onmanifold.attacks import PGD, Engine, RandomPerturbation
from onmanifold.attacks.apgd import APGD, checkpoints
from onmanifold.foundation.errors import InputError
from onmanifold.objectives import DLR, CrossEntropy, Margin, TargetedDLR
from onmanifold.threats import ImageBall, JointBall, LatentBall, TransformationBall

ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
# Large enough that the ball holds local maxima and the box is in the way.
RADII = {"linf": 0.15, "l2": 0.8, "l1": 3.0}


def test_checkpoints_of_100_steps_are_the_papers():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@given(st.integers(1, 1500))
def test_checkpoints_follow_the_windows(steps):
    window, at, expected = max(22 * steps // 100, 1), 0, []
    while at + window <= steps:
        at += window
        expected.append(at)
        window = max(window - max(3 * steps // 100, 1), max(6 * steps // 100, 1))
    assert checkpoints(steps) == expected


def from_start(seen, start, count):
    """The points of the search among all that the net saw: ``count`` of them, the start being the first."""
    for place, images in enumerate(seen):
        if images.shape == start.shape and torch.allclose(images, start, rtol=0, atol=1e-12):
            return torch.stack(seen[place : place + count])
    raise AssertionError("the start was never evaluated")


def loss_of(name):
    """The objective of one sample, from its logits (K,), written out."""

    def cross_entropy(logits, label):
        return torch.logsumexp(logits, 0) - logits[label]

    def ratio(logits, label):
        ranked = logits.sort(descending=True).values
        others = torch.cat([logits[:label], logits[label + 1 :]]).max()
        return -(logits[label] - others) / (ranked[0] - ranked[2] + 1e-12)

    return {"ce": cross_entropy, "dlr": ratio}[name]


class Reference:
    """APGD of one sample in NumPy: FACTS of the paper, and nothing shared between samples."""

    def __init__(self, net, image, label, norm, radius, loss):
        self.net, self.shape, self.label, self.norm = net, image.shape, int(label), norm
        self.image, self.radius, self.loss = image.flatten().numpy(), radius, loss_of(loss)
        self.points, self.losses, self.notes = [], [], []

    def evaluate(self, move):
        """Loss and gradient of the image moved."""
        leaf = torch.tensor(self.image + move).view(1, *self.shape).requires_grad_()
        loss = self.loss(self.net(leaf)[0], self.label)
        self.points.append(self.image + move)
        self.losses.append(loss.item())
        return loss.item(), torch.autograd.grad(loss, leaf)[0].flatten().numpy()

    def project(self, move, radius):
        """The nearest move in ball ∩ [0, 1], by bisection on the multiplier of the ball."""
        low, high = -self.image, 1 - self.image
        if self.norm == "linf":
            return np.clip(np.clip(move, -radius, radius), low, high)

        def shrunk(amount):
            if self.norm == "l2":
                return np.clip(move / (1 + amount), low, high)
            return np.clip(np.sign(move) * np.maximum(np.abs(move) - amount, 0), low, high)

        few, many = 0.0, 1e6
        if np.linalg.norm(shrunk(few), ORDERS[self.norm]) <= radius:
            return shrunk(few)
        for _ in range(200):
            middle = (few + many) / 2
            inside = np.linalg.norm(shrunk(middle), ORDERS[self.norm]) <= radius
            few, many = (few, middle) if inside else (middle, many)
        return shrunk(many)

    def direction(self, gradient):
        return np.sign(gradient) if self.norm == "linf" else gradient / np.linalg.norm(gradient)

    def run(self, start, steps):
        """All steps in linf and l2; the best loss."""
        window = max(22 * steps // 100, 1)
        loss, gradient = self.evaluate(start)
        move = before = best_move = start
        best = best_at_check = loss
        best_gradient, step = gradient, 2 * self.radius
        # At the first check nothing is known of an earlier one.
        halved, since, rises, last = True, 0, 0, loss
        for number in range(steps):
            ahead = self.project(move + step * self.direction(gradient), self.radius)
            share = 1.0 if number == 0 else 0.75
            ahead = move + share * (ahead - move) + (1 - share) * (move - before)
            before, move = move, self.project(ahead, self.radius)
            loss, gradient = self.evaluate(move)
            rises += loss > last
            last = loss
            if loss > best:
                best, best_move, best_gradient = loss, move, gradient
            since += 1
            if since < window:
                continue
            stuck = not halved and best == best_at_check
            few = rises <= 0.75 * window
            halved, best_at_check = few or stuck, best
            self.notes.append("few" if few else "stuck" if stuck else "kept")
            if halved:
                step, move, gradient = step / 2, best_move, best_gradient
            window = max(window - max(3 * steps // 100, 1), max(6 * steps // 100, 1))
            since = rises = 0
        return best

    def run_l1(self, start, steps):
        """Phases at three times, twice and once the radius; each goes on from the best move of the last."""
        lengths = [round(0.3 * steps), round(0.3 * steps)]
        lengths.append(steps - sum(lengths))
        size = len(self.image)
        share, count_before = 0.2, size
        for factor, length in zip((3, 2, 1), lengths, strict=True):
            start = self.project(start, factor * self.radius)
            if factor < 3:
                count_before = np.count_nonzero(start)
                share = count_before / size / 1.5
            start, best = self.phase_l1(start, factor * self.radius, length, share, count_before)
        return best

    def phase_l1(self, start, radius, steps, share, count_before):
        """The best move in the l1 ball of the phase, and its loss."""
        window = max(4 * steps // 100, 1)
        best, gradient = self.evaluate(start)
        move = best_move = start
        best_gradient, step = gradient, radius
        for number in range(1, steps + 1):
            # Rounded first, lest 15.000000001 be taken for 16.
            count = max(1, int(np.ceil(np.round(share * len(self.image), 6))))
            signs = np.sign(gradient) * (np.abs(gradient) >= np.sort(np.abs(gradient))[-count])
            move = self.project(move + step * signs / np.abs(signs).sum(), radius)
            loss, gradient = self.evaluate(move)
            if loss > best:
                best, best_move, best_gradient = loss, move, gradient
            if number % window:
                continue
            count = np.count_nonzero(best_move)
            share = count / len(self.image) / 1.5
            if count / count_before < 0.95:
                self.notes.append("sparser")
                step, move, gradient = radius, best_move, best_gradient
            else:
                self.notes.append("as dense")
                step = max(step / 1.5, radius / 10)
            count_before = count
        return best_move, best


def references(net, batch, norm, loss):
    return [
        Reference(net, image, label, norm, RADII[norm], loss)
        for image, label in zip(batch.images, batch.labels, strict=True)
    ]


PLAIN = Engine(fold=False, threads=1)


@pytest.mark.parametrize("steps", [30, 100])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steps_are_those_of_the_reference(small_net, images, norm, loss, steps, recorded):
    batch = images(8)
    threat = ImageBall(norm, RADII[norm])
    region = threat.around(batch.images, batch.labels)
    start = region.random("surface", 5, batch.indices, 0)
    attack = APGD(threat, steps, objective=loss_object(loss), early_stop=False, engine=PLAIN)
    result, seen = recorded(attack, small_net, batch, seed=5)
    points = from_start(seen, region.render(start), steps + 1)
    notes = []
    for row, reference in enumerate(references(small_net, batch, norm, loss)):
        best = reference.run(start["image"][row].flatten().numpy(), steps)
        expected = torch.tensor(np.stack(reference.points)).view_as(points[:, row])
        torch.testing.assert_close(points[:, row], expected, rtol=0, atol=1e-9)
        assert result.objective[row].item() == pytest.approx(best, abs=1e-9)
        fooled = small_net(expected).argmax(1) != batch.labels[row]
        assert result.success[row] == fooled.any()
        notes += reference.notes
    # Else the reference would not have shown all that it can.
    assert {"few", "kept"} <= set(notes)


def loss_object(name):
    return {"ce": CrossEntropy(), "dlr": DLR()}[name]


# Of at most 83 steps, so that 4 % of a phase and of the whole are counted alike.
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_the_steps_in_l1_are_those_of_the_reference(small_net, images, loss, recorded):
    batch, steps = images(8), 40
    threat = ImageBall("l1", RADII["l1"])
    region = threat.around(batch.images, batch.labels)
    start = region.scaled_in_l1(3).random("surface", 5, batch.indices, 0)
    attack = APGD(threat, steps, objective=loss_object(loss), early_stop=False, engine=PLAIN)
    result, seen = recorded(attack, small_net, batch, seed=5)
    points = from_start(seen, region.render(start), steps + 3)
    notes, equal = [], 0
    for row, reference in enumerate(references(small_net, batch, "l1", loss)):
        best = reference.run_l1(start["image"][row].flatten().numpy(), steps)
        expected = torch.tensor(np.stack(reference.points)).view_as(points[:, row])
        notes += reference.notes
        if torch.allclose(points[:, row], expected, rtol=0, atol=1e-9):
            # Only what lies in the ball itself counts.
            assert result.objective[row].item() == pytest.approx(best, abs=1e-9)
            equal += 1
    # A coordinate that either's rounding leaves at 1e-17 instead of 0 is counted; that may happen to one sample.
    assert equal >= 7
    assert set(notes) == {"sparser", "as dense"}


@pytest.mark.parametrize("norm", list(RADII))
def test_starts_are_at_the_radius(small_net, images, norm, recorded):
    batch = images(20)
    # Far from the box.
    batch = batch._replace(images=0.4 + 0.2 * batch.images)
    radius = 0.3 if norm == "l1" else 0.1
    attack = APGD(ImageBall(norm, radius), 3, early_stop=False, engine=PLAIN)
    _, seen = recorded(attack, small_net, batch, seed=1)
    whole = [points for points in seen if points.shape == batch.images.shape]
    far = [
        torch.linalg.vector_norm((points - batch.images).flatten(1), ORDERS[norm], dim=1)
        for points in whole
    ]
    first = next(size for size in far if (size > 0).all())
    # In l1 the ball is three times as large in the beginning.
    expected = torch.full_like(first, 3 * radius if norm == "l1" else radius)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_few_steps_stay_inside_and_never_lose_the_start(small_net, images, norm, steps, recorded):
    batch = images(30)
    threat = ImageBall(norm, RADII[norm] / 4)
    attack = APGD(threat, steps, early_stop=False, engine=PLAIN)
    result, seen = recorded(attack, small_net, batch)
    move = result.images - batch.images
    size = torch.linalg.vector_norm(move.flatten(1), ORDERS[norm], dim=1)
    assert (size <= RADII[norm] / 4 + 1e-9).all()
    # The start of the search, or in l1 of its last phase, and every later point in the ball.
    best = torch.full((30,), -torch.inf).double()
    values = []
    for points in seen[:-1]:
        if points.shape != batch.images.shape:
            continue
        change = torch.linalg.vector_norm((points - batch.images).flatten(1), ORDERS[norm], dim=1)
        with torch.no_grad():
            value = nn.functional.cross_entropy(small_net(points), batch.labels, reduction="none")
        inside = (change > 0) & (change <= RADII[norm] / 4 + 1e-9)
        values.append(torch.where(inside, value, -torch.inf))
    best = torch.stack(values).amax(0)
    torch.testing.assert_close(result.objective, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", list(RADII))
def test_more_restarts_never_report_less(small_net, images, norm):
    batch = images(30)
    before = None
    for restarts in (1, 2, 4):
        attack = APGD(
            ImageBall(norm, RADII[norm] / 3), 6, restarts=restarts, early_stop=False, engine=PLAIN
        )
        result = attack(small_net, batch.images, batch.labels, indices=batch.indices)
        if before is not None:
            assert (result.objective >= before.objective - 1e-12).all()
            assert (result.success >= before.success).all()
            assert (result.objective > before.objective + 1e-9).any()
        before = result


def test_a_fooled_sample_leaves(small_net, images):
    batch = images(60)
    threat = ImageBall("linf", 0.06)
    early = APGD(threat, 20, restarts=2)(small_net, batch.images, batch.labels)
    late = APGD(threat, 20, restarts=2, early_stop=False)(small_net, batch.images, batch.labels)
    assert torch.equal(early.success, late.success)
    assert 10 < early.success.sum() < 60
    assert (early.forwards[~early.success] == 42).all()
    assert (early.forwards[early.success] < 42).all()
    assert (late.forwards == 42).all()


@pytest.mark.parametrize("objective", ["ce", "margin", "dlr", "targeted_dlr"])
@pytest.mark.parametrize(
    ("norm", "radius", "share"), [("linf", 0.15, 1e-9), ("l2", 0.6, 1e-4), ("l1", 2.0, 0.5)]
)
def test_the_optimum_of_a_linear_model(linear_model, largest_gains, norm, radius, share, objective):
    # With two classes DLR and its targeted form are the margin.
    model = linear_model()
    generator = torch.Generator().manual_seed(1)
    images = (2 * torch.rand(8, 1, 6, 6, generator=generator).double() - 0.5).clamp(0, 1)
    labels = torch.arange(8) % 2
    weight = (model[1].weight[1] - model[1].weight[0]).detach()
    signs, flat = 1 - 2 * labels, images.flatten(1)
    gains = largest_gains(signs.unsqueeze(1) * weight, norm, [radius] * 8, -flat, 1 - flat)
    attack = APGD(ImageBall(norm, radius), 100, objective=objective, early_stop=False)
    result = attack(model, images, labels)
    with torch.no_grad():
        clean, found = (
            signs * (logits[:, 1] - logits[:, 0])
            for logits in (model(images), model(result.images))
        )
    assert (found - clean <= gains + 1e-9).all()
    missing = 1 - (found - clean) / gains
    assert missing.max() < share
    # In l1 steps may be spent on coordinates that the box holds back, so that some samples get stuck; half of
    # them do not.
    assert missing.median() < share / 20
    margin = found if objective != "ce" else nn.functional.softplus(found)
    torch.testing.assert_close(result.objective, margin, rtol=0, atol=1e-9)


def test_targets_are_taken_in_turn():
    # The runner-up cannot be reached within the box, the class after it can.
    class Second(nn.Module):
        def forward(self, images):
            first = images.flatten(1)[:, 0]
            fixed = torch.ones_like(first)
            return torch.stack([fixed, 0.9 * fixed, 4 * (first - 0.4), -fixed, -2 * fixed], dim=1)

    images, labels = torch.full((3, 1, 2, 2), 0.5).double(), torch.zeros(3, dtype=torch.int64)
    threat = ImageBall("linf", 0.2)
    one = APGD(threat, 20, objective=TargetedDLR(targets=1))(Second(), images, labels)
    two = APGD(threat, 20, objective=TargetedDLR(targets=2))(Second(), images, labels)
    assert not one.success.any()
    assert (two.predictions == 2).all()
    assert (two.forwards > one.forwards).all()
    assert (one.forwards == 21).all()


class Valley(nn.Module):
    """The wrong class is as likely as the right one at the bottom of a narrow valley only."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        turn = torch.linalg.qr(torch.randn(16, 16, generator=generator).double())[0]
        curvature = torch.logspace(0, 2, 16).double()
        self.register_buffer("form", (turn * curvature) @ turn.T)
        bottom = 0.4 + 0.2 * torch.rand(16, generator=generator).double()
        self.register_buffer("bottom", bottom)

    def forward(self, images):
        away = images.flatten(1) - self.bottom
        depth = ((away @ self.form) * away).sum(1)
        return torch.stack([torch.zeros_like(depth), -depth], dim=1)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.3), ("l2", 0.8)])
def test_it_beats_a_poor_step_size_at_the_same_cost(norm, radius):
    generator = torch.Generator().manual_seed(3)
    images = 0.4 + 0.2 * torch.rand(20, 1, 4, 4, generator=generator).double()
    labels = torch.zeros(20, dtype=torch.int64)
    threat = ImageBall(norm, radius)
    settings = {"objective": Margin(), "early_stop": False}
    fixed = PGD(threat, 60, step_size=radius / 2, **settings)(Valley(), images, labels)
    found = APGD(threat, 60, **settings)(Valley(), images, labels)
    assert torch.equal(found.forwards, fixed.forwards)
    assert torch.equal(found.backwards, fixed.backwards)
    assert (found.objective <= 0).all()
    assert (found.objective > fixed.objective).float().mean() >= 0.95
    assert found.objective.mean() > 0.5 * fixed.objective.mean()


@pytest.mark.parametrize(
    "name", ["linf", "l2", "l1", "latent_l1", "latent_l2", "joint", "transformation"]
)
def test_on_every_kind_of_ball_it_finds_more_than_chance(small_net, images, plane, name):
    threat = {
        "latent_l2": LatentBall(plane, "l2", 0.4),
        "latent_l1": LatentBall(plane, "l1", 0.6),
        "joint": JointBall(image=ImageBall("linf", 0.01), latent=LatentBall(plane, "l2", 0.3)),
        "transformation": TransformationBall(radius=0.2),
    }.get(name) or ImageBall(name, RADII[name] / 4)
    batch = images(40, on_manifold=name in ("latent_l1", "latent_l2", "joint"))
    call = (small_net, batch.images, batch.labels, batch.codes)
    found = APGD(threat, 25, early_stop=False)(*call)
    chance = RandomPerturbation(threat, restarts=25, early_stop=False)(*call)
    assert (found.objective >= chance.objective - 1e-9).float().mean() >= 0.9
    assert found.objective.mean() > chance.objective.mean()
    assert found.success.sum() >= chance.success.sum()
    region = threat.around(batch.images, batch.labels, batch.codes)
    assert found.variables.keys() == region.balls.keys()
    for variable, ball in region.balls.items():
        size = torch.linalg.vector_norm(
            found.variables[variable].flatten(1), ORDERS[ball.norm], dim=1
        )
        assert (size <= ball.radius + 1e-9).all()
        assert (size > 0).any()
    torch.testing.assert_close(
        found.images, region.render(found.variables).clamp(0, 1), rtol=0, atol=1e-9
    )


def test_passes_of_a_model_that_is_not_random_change_only_the_cost(small_net, images):
    batch = images(10)
    one, three = (
        APGD(ImageBall("l2", 0.3), 8, early_stop=False, passes=passes)(
            small_net, batch.images, batch.labels
        )
        for passes in (1, 3)
    )
    torch.testing.assert_close(three.images, one.images, rtol=0, atol=1e-9)
    assert torch.equal(three.forwards, 3 * one.forwards)
    assert torch.equal(three.backwards, 3 * one.backwards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"rising_share": 1.5}, "rising_share"),
        ({"restarts": 0}, "restarts"),
        ({"passes": 0}, "passes"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        APGD(ImageBall(), **settings)
