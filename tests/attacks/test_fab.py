"""FAB's projection on planes against linear programming, and the distances it finds where they are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from onmanifold.attacks import APGD, Engine
from onmanifold.attacks.fab import FAB, reach
from onmanifold.foundation.errors import InputError
from onmanifold.threats import ImageBall, JointBall, LatentBall, TransformationBall

NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
COUNT, SIZE = 30, 12
PLAIN = Engine(fold=False, threads=1)


def farthest(point, slope, rise):
    """The largest |<slope, move>| within [0, 1] in the direction of the rise, with its sign."""
    toward = slope * np.sign(rise)
    return np.sign(rise) * (np.maximum(toward, 0) @ (1 - point) + np.maximum(-toward, 0) @ point)


def smallest_move(point, slope, rise):
    """The smallest move within [0, 1] with <slope, move> = rise in l2; one sample, NumPy."""
    # It is clip(t · slope) for the t at which the rise is reached.
    low, high = -1e9, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        enough = slope @ np.clip(middle * slope, -point, 1 - point) >= rise
        low, high = (low, middle) if enough else (middle, high)
    return np.clip(high * slope, -point, 1 - point)


def smallest(point, slope, rise, norm):
    """The norm of the smallest move within [0, 1] with <slope, move> = rise; one sample, NumPy."""
    size = len(point)
    if norm == "l2":
        return np.linalg.norm(smallest_move(point, slope, rise))
    if norm == "linf":
        # Variables: the move, and the bound on it.
        cost = np.append(np.zeros(size), 1)
        column = np.ones((size, 1))
        upper = np.block([[np.eye(size), -column], [-np.eye(size), -column]])
        bounds = [*zip(-point, 1 - point, strict=True), (0, None)]
        found = linprog(cost, upper, np.zeros(2 * size), [np.append(slope, 0)], [rise], bounds)
    else:
        # Variables: how far up and how far down.
        bounds = [(0, room) for room in np.concatenate([1 - point, point])]
        found = linprog(
            np.ones(2 * size), A_eq=[np.append(slope, -slope)], b_eq=[rise], bounds=bounds
        )
    assert found.success
    return found.fun


def cases(seed, share):
    """Points, a third of their pixels at 0 or 1; slopes, some of them zero; rises, ``share`` of the farthest."""
    draw = np.random.default_rng(seed)
    points = np.clip(1.5 * draw.random((COUNT, SIZE)) - 0.25, 0, 1)
    slopes = draw.normal(size=(COUNT, SIZE)) * (draw.random((COUNT, SIZE)) < 0.8)
    signs = np.where(draw.random(COUNT) < 0.5, -1.0, 1.0)
    rises = np.array(
        [
            share * farthest(point, slope, sign) * part
            for point, slope, sign, part in zip(
                points, slopes, signs, 0.05 + 0.9 * draw.random(COUNT), strict=True
            )
        ]
    )
    return points, slopes, rises


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_moves_are_the_smallest(norm, share):
    points, slopes, rises = cases(0, share)
    assert (rises < 0).any()
    assert (rises > 0).any()
    moves = reach(*map(torch.tensor, (points, slopes, rises)), norm).numpy()
    assert moves.shape == points.shape
    assert (points + moves >= -1e-12).all()
    assert (points + moves <= 1 + 1e-12).all()
    np.testing.assert_allclose((slopes * moves).sum(1), rises, rtol=0, atol=1e-9)
    expected = [smallest(*case, norm) for case in zip(points, slopes, rises, strict=True)]
    found = np.linalg.norm(moves, ORDERS[norm], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", [1.0, 1.01, 3.0])
@pytest.mark.parametrize("norm", NORMS)
def test_what_cannot_be_reached_is_neared_as_far_as_it_goes(norm, factor):
    points, slopes, rises = cases(1, 1.0)
    ends = np.array([farthest(*case) for case in zip(points, slopes, rises, strict=True)])
    moves = reach(*map(torch.tensor, (points, slopes, factor * ends)), norm).numpy()
    assert (points + moves >= -1e-12).all()
    assert (points + moves <= 1 + 1e-12).all()
    np.testing.assert_allclose((slopes * moves).sum(1), ends, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_without_slope_or_rise_nothing_moves(norm):
    points, slopes, rises = map(torch.tensor, cases(2, 0.5))
    assert (reach(points, 0 * slopes, rises, norm) == 0).all()
    torch.testing.assert_close(
        reach(points, slopes, 0 * rises, norm), 0 * points, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("norm", NORMS)
def test_a_move_is_that_of_its_sample_and_its_scale(norm):
    points, slopes, rises = map(torch.tensor, cases(3, 0.5))
    whole = reach(points, slopes, rises, norm)
    for row in range(0, COUNT, 7):
        part = slice(row, row + 1)
        alone = reach(points[part], slopes[part], rises[part], norm)
        torch.testing.assert_close(alone, whole[part], rtol=0, atol=1e-12)
    for scale in (1e-8, 1e8):
        scaled = reach(points, scale * slopes, scale * rises, norm)
        torch.testing.assert_close(scaled, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_float32_moves_stay_in_the_box(norm):
    points, slopes, rises = (torch.tensor(part).float() for part in cases(4, 0.9))
    moves = reach(points, slopes, rises, norm)
    assert moves.dtype == torch.float32
    assert (points + moves).min() >= -1e-6
    assert (points + moves).max() <= 1 + 1e-6
    torch.testing.assert_close((slopes * moves).sum(1), rises, rtol=1e-4, atol=1e-4)


@pytest.fixture
def linear_case(linear_model):
    """Makes a model, images and labels, of which the model is right."""

    def make(classes, near_the_box):
        model = linear_model(classes, size=16, balanced=True)
        draw = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
        images = (1.6 * draw - 0.3).clamp(0, 1) if near_the_box else 0.4 + 0.2 * draw
        with torch.no_grad():
            labels = model(images).argmax(1)
        return model, images, labels

    return make


def distances(model, images, labels, norm):
    """The distance to the nearest other class, (B,); infinite where none is in the box."""
    weight, bias = (part.detach().numpy() for part in model[1].parameters())
    found = []
    for point, label in zip(images.flatten(1).numpy(), labels.tolist(), strict=True):
        nearest = np.inf
        for other in set(range(len(bias))) - {label}:
            slope = weight[other] - weight[label]
            rise = -(slope @ point + bias[other] - bias[label])
            if farthest(point, slope, rise) >= rise + 1e-9:
                nearest = min(nearest, smallest(point, slope, rise, norm))
        found.append(nearest)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
def test_far_from_the_box_the_distance_is_the_margin_over_the_dual_norm(norm, linear_case):
    model, images, labels = linear_case(2, near_the_box=False)
    with torch.no_grad():
        margin = (model(images) * torch.tensor([1.0, -1.0]).double()).sum(1).abs()
        slope = model[1].weight[1] - model[1].weight[0]
        dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
        expected = margin / torch.linalg.vector_norm(slope, dual)
    assert (expected < 0.4).all()
    result = FAB(ImageBall(norm, 100.0), 40, early_stop=False)(model, images, labels)
    assert (-result.objective >= expected * (1 - 1e-9)).all()
    assert (-result.objective <= expected * 1.01).all()


@pytest.mark.parametrize("targets", [9, None])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("norm", NORMS)
def test_the_distance_in_the_box(norm, classes, targets, linear_case):
    model, images, labels = linear_case(classes, near_the_box=True)
    expected = distances(model, images, labels, norm)
    assert (expected.isfinite()).sum() >= 15
    threat = ImageBall(norm, 100.0)
    result = FAB(threat, 60, targets=targets, early_stop=False)(model, images, labels)
    assert torch.equal(result.success, expected.isfinite())
    known = expected.isfinite()
    found = -result.objective[known]
    assert (found >= expected[known] * (1 - 1e-9)).all()
    near = found <= expected[known] * 1.02 + 1e-9
    # The nearest of all boundaries is chosen without regard to the box, and may be another one within it.
    assert near.all() if targets or classes == 2 else near.double().mean() >= 0.9
    size = torch.linalg.vector_norm((result.images - images).flatten(1), ORDERS[norm], dim=1)
    torch.testing.assert_close(found, size[known], rtol=0, atol=1e-9)
    torch.testing.assert_close(result.size["image"], size, rtol=0, atol=1e-9)


def test_with_and_without_targets_agree_on_three_classes(linear_case):
    model, images, labels = linear_case(3, near_the_box=False)
    for norm in NORMS:
        one, other = (
            FAB(ImageBall(norm, 100.0), 40, targets=targets, early_stop=False)(
                model, images, labels
            )
            for targets in (2, None)
        )
        torch.testing.assert_close(one.objective, other.objective, rtol=0.02, atol=1e-9)
        # As many targets as there are other classes, and no more.
        nine = FAB(ImageBall(norm, 100.0), 40, targets=9, early_stop=False)(model, images, labels)
        assert torch.equal(nine.objective, one.objective)
        assert torch.equal(nine.forwards, one.forwards)


@pytest.mark.parametrize("norm", NORMS)
def test_one_target_is_the_most_likely_other_class(norm, linear_case):
    # The nearest boundary need not be that of the most likely class.
    model, images, labels = linear_case(5, near_the_box=False)
    one, all_ = (
        FAB(ImageBall(norm, 100.0), 30, targets=targets, early_stop=False)(model, images, labels)
        for targets in (1, 4)
    )
    assert (all_.objective >= one.objective - 1e-12).all()
    assert (all_.objective > one.objective + 1e-6).any()
    assert (all_.forwards > one.forwards).all()


RADII = {"linf": 0.03, "l2": 0.16, "l1": 0.6}


@pytest.mark.parametrize("targets", [9, None])
@pytest.mark.parametrize("norm", NORMS)
def test_only_what_is_within_the_radius_is_a_success(small_net, images, norm, targets):
    batch = images(40)
    attack = FAB(ImageBall(norm, RADII[norm]), 20, targets=targets, early_stop=False)
    result = attack(small_net, batch.images, batch.labels, indices=batch.indices)
    size = torch.linalg.vector_norm((result.images - batch.images).flatten(1), ORDERS[norm], dim=1)
    assert (result.images >= 0).all()
    assert (result.images <= 1).all()
    assert (size <= RADII[norm] * (1 + 1e-6)).all()
    within = -result.objective <= RADII[norm]
    assert 5 <= within.sum() <= 35
    assert torch.equal(result.success, within)
    torch.testing.assert_close(size[within], -result.objective[within], rtol=0, atol=1e-9)
    with torch.no_grad():
        wrong = small_net(result.images).argmax(1) != batch.labels
        from_the_start = small_net(batch.images).argmax(1) != batch.labels
    assert torch.equal(result.success, wrong)
    assert from_the_start.sum() >= 4
    assert (result.objective[from_the_start] == 0).all()
    assert (size[from_the_start] == 0).all()
    assert (result.objective[~from_the_start] < 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_distance_does_not_depend_on_the_radius(small_net, images, norm):
    batch = images(20)
    narrow, wide = (
        FAB(ImageBall(norm, radius), 20, early_stop=False)(small_net, batch.images, batch.labels)
        for radius in (RADII[norm] / 4, 100.0)
    )
    torch.testing.assert_close(narrow.objective, wide.objective, rtol=0, atol=1e-9)
    assert narrow.success.sum() < wide.success.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_without_early_stop_distances_are_at_most_those_with_it(small_net, images, norm):
    batch = images(40)
    early = FAB(ImageBall(norm, RADII[norm]), 20, restarts=2)
    late = replace(early, early_stop=False)
    soon, best = (
        attack(small_net, batch.images, batch.labels, indices=batch.indices)
        for attack in (early, late)
    )
    assert torch.equal(soon.success, best.success)
    assert (best.objective >= soon.objective - 1e-12).all()
    assert (best.objective > soon.objective + 1e-6).any()
    broken = soon.success & (soon.objective < 0)
    assert (soon.forwards[broken] < best.forwards[broken]).all()
    assert torch.equal(soon.forwards[~soon.success], best.forwards[~soon.success])


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_restarts_never_find_less(small_net, images, norm):
    batch = images(30)
    first = before = None
    for steps, restarts in [(2, 1), (5, 1), (15, 1), (15, 2), (15, 3)]:
        attack = FAB(ImageBall(norm, RADII[norm]), steps, restarts=restarts, early_stop=False)
        result = attack(small_net, batch.images, batch.labels, indices=batch.indices)
        if before is not None:
            assert (result.objective >= before.objective - 1e-12).all()
        first, before = first or result, result
    assert (before.objective > first.objective).any()


def of_the_search(result, seen):
    """All that was seen but what came before the search, and what verifies its result."""
    return seen[-1 - int(result.forwards.max()) : -1]


def test_the_steps_are_those_of_the_paper(small_net, images, recorded):
    # Samples that the net is right about, towards the most likely other class.
    batch, steps = images(4), 8
    attack = FAB(ImageBall("l2", 9.0), steps, targets=1, early_stop=False, engine=PLAIN)
    rows = torch.tensor([1, 2, 3])
    result, seen = recorded(attack, small_net, batch, rows=rows)
    seen = of_the_search(result, seen)
    crossings = 0
    for place, row in enumerate(rows.tolist()):
        label, start = int(batch.labels[row]), batch.images[row].flatten().numpy()
        with torch.no_grad():
            ranked = small_net(batch.images[row : row + 1])[0].argsort(descending=True).tolist()
        target, point = ranked[1], start
        for step in range(steps):
            leaf = torch.tensor(point).view(1, 1, 8, 8).requires_grad_()
            logits = small_net(leaf)[0]
            lead = logits[target] - logits[label]
            slope = torch.autograd.grad(lead, leaf)[0].flatten().numpy()
            rise = -lead.item()
            near = smallest_move(point, slope, rise)
            far = smallest_move(start, slope, rise - slope @ (start - point))
            sizes = np.linalg.norm(near), np.linalg.norm(far)
            pull = min(0.1, sizes[0] / (sizes[0] + sizes[1]))
            ahead, anew = point + 1.05 * near, start + 1.05 * far
            point = np.clip((1 - pull) * ahead + pull * anew, 0, 1)
            # Seen: the image, and at each step the point before and after it.
            found = seen[2 + 2 * step][place].flatten().numpy()
            np.testing.assert_allclose(found, point, rtol=0, atol=1e-6)
            with torch.no_grad():
                crossed = small_net(torch.tensor(point).view(1, 1, 8, 8)).argmax() != label
            if crossed:
                point = start + 0.9 * (point - start)
                crossings += 1
    assert crossings >= 6


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_begin_half_as_far_as_what_counts(small_net, images, norm, recorded):
    batch = images(4)
    batch = batch._replace(images=0.3 + 0.4 * batch.images)
    with torch.no_grad():
        batch = batch._replace(labels=small_net(batch.images).argmax(1))
    for radius in (RADII[norm] / 50, 100.0):
        one = FAB(ImageBall(norm, radius), 5, targets=1, early_stop=False, engine=PLAIN)
        first, before = recorded(one, small_net, batch)
        second, seen = recorded(replace(one, restarts=2), small_net, batch)
        before, seen = of_the_search(first, before), of_the_search(second, seen)
        assert torch.equal(before[0], batch.images)
        assert torch.equal(seen[0], batch.images)
        start = (seen[len(before)] - batch.images).flatten(1)
        size = torch.linalg.vector_norm(start, ORDERS[norm], dim=1)
        expected = (-first.objective).clamp(max=radius) / 2
        torch.testing.assert_close(size, expected, rtol=0, atol=1e-9)
        assert (first.forwards == 11).all()
        assert (second.forwards == 21).all()
        assert (second.backwards == 10).all()


def test_it_finds_what_gradients_without_aim_do_not(small_net, images):
    # As small as the best of many radii of another search.
    batch = images(20)
    found = -FAB(ImageBall("linf", 1.0), 60, early_stop=False)(
        small_net, batch.images, batch.labels
    ).objective
    # At a tenth more than the distance found nearly all samples fall to APGD, at a tenth less few.
    more, less = (
        APGD(ImageBall("linf", factor * found), 60, objective="dlr")(
            small_net, batch.images, batch.labels
        ).success[found > 0]
        for factor in (1.1, 0.9)
    )
    assert more.float().mean() > 0.85
    assert less.float().mean() < 0.25


def test_only_images_have_the_geometry_for_it(small_net, images, plane):
    batch = images(3)
    image, latent = ImageBall("linf", 0.1), LatentBall(plane, "l2", 0.1)
    for threat in (latent, JointBall(image=image, latent=latent), TransformationBall(radius=0.1)):
        with pytest.raises(InputError, match=r"threat: .*ImageBall"):
            FAB(threat)(small_net, batch.images, batch.labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps"), ({"targets": 0}, "targets"), ({"restarts": 0}, "restarts")],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        FAB(ImageBall(), **settings)
