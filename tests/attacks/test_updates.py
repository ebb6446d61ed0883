"""The attacks against plain loops written here, and against a peer."""

import pytest
import torch
from torch import nn

from onmanifold.attacks import FGSM, MIA, PGD, ProjectedAdam
from onmanifold.threats import ImageBall

STEPS = 7


def gradient(net, images, labels):
    leaf = images.detach().clone().requires_grad_()
    loss = nn.functional.cross_entropy(net(leaf), labels, reduction="none")
    return torch.autograd.grad(loss.sum(), leaf)[0], loss.detach()


def nearest(images, moved, norm, radius):
    """Onto the ball, for images far from 0 and 1."""
    change = moved - images
    if norm == "linf":
        return images + change.clamp(-radius, radius)
    length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return images + change * (radius / length.clamp(min=radius))


def along(direction, norm):
    if norm == "linf":
        return direction.sign()
    return direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def best_of(net, trail, labels):
    """Of the visited points, each sample's of largest loss."""
    losses = torch.stack([gradient(net, images, labels)[1] for images in trail])
    return torch.stack(trail)[losses.argmax(0), torch.arange(len(labels))], losses.amax(0)


@pytest.fixture
def middle(images):
    """Images between 0.3 and 0.7, whose ball is inside [0, 1], and labels."""
    good = images(12)
    return 0.3 + 0.4 * good.images, good.labels


def momentum_loop(net, images, labels, norm, radius, step, decay):
    moved, momentum, trail = images, torch.zeros_like(images), [images]
    for _ in range(STEPS):
        slope, _ = gradient(net, moved, labels)
        momentum = decay * momentum + slope / slope.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
        moved = nearest(images, moved + step * along(momentum, norm), norm, radius)
        trail.append(moved)
    return trail


def adam_loop(net, images, labels, norm, radius, step):
    moved, trail = images, [images]
    first, second = torch.zeros_like(images), torch.zeros_like(images)
    for count in range(1, STEPS + 1):
        slope, _ = gradient(net, moved, labels)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        mean, spread = first / (1 - 0.9**count), second / (1 - 0.999**count)
        moved = moved + step * mean / (spread.sqrt() + 1e-8)
        moved = nearest(images, moved, norm, radius)
        trail.append(moved)
    return trail


BALLS = [("linf", 0.04, 0.015), ("l2", 0.3, 0.1)]


@pytest.mark.parametrize(("norm", "radius", "step"), BALLS)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mia_against_a_plain_loop(small_net, middle, norm, radius, step, decay):
    trail = momentum_loop(small_net, *middle, norm, radius, step, decay)
    expected, values = best_of(small_net, trail, middle[1])
    attack = MIA(ImageBall(norm, radius), STEPS, step, decay, early_stop=False)
    result = attack(small_net, *middle)
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.objective, values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("norm", "radius", "step"), BALLS)
def test_momentum_matters(small_net, middle, norm, radius, step):
    # Else the test above could not tell the decays apart.
    with_it = momentum_loop(small_net, *middle, norm, radius, step, 1.0)[-1]
    without = momentum_loop(small_net, *middle, norm, radius, step, 0.0)[-1]
    assert (with_it - without).abs().max() > 0.01


@pytest.mark.parametrize(("norm", "radius", "step"), BALLS)
def test_pgd_from_the_image_is_mia_without_momentum(small_net, middle, norm, radius, step):
    ball = ImageBall(norm, radius)
    one = PGD(ball, STEPS, step, start="zero", early_stop=False)(small_net, *middle)
    two = MIA(ball, STEPS, step, decay=0.0, early_stop=False)(small_net, *middle)
    torch.testing.assert_close(one.images, two.images, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "radius", "step"), BALLS)
def test_adam_against_a_plain_loop_and_torch(small_net, middle, norm, radius, step):
    trail = adam_loop(small_net, *middle, norm, radius, step)
    expected, values = best_of(small_net, trail, middle[1])
    attack = ProjectedAdam(
        ImageBall(norm, radius), STEPS, step, start="zero", restarts=1, early_stop=False
    )
    result = attack(small_net, *middle)
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.objective, values, rtol=1e-9, atol=1e-9)

    leaf = middle[0].clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=step, maximize=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(small_net(leaf), middle[1], reduction="sum").backward()
        optimizer.step()
        with torch.no_grad():
            leaf.copy_(nearest(middle[0], leaf, norm, radius))
    torch.testing.assert_close(leaf.detach(), trail[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_step_of_pgd_from_the_image_is_fgsm(small_net, images, norm):
    good = images(20)
    ball = ImageBall(norm, 0.1)
    fgsm = FGSM(ball)(small_net, good.images, good.labels)
    pgd = PGD(ball, 1, 0.1, start="zero")(small_net, good.images, good.labels)
    mia = MIA(ball, 1, 0.1)(small_net, good.images, good.labels)
    assert torch.equal(fgsm.images, pgd.images)
    torch.testing.assert_close(mia.images, fgsm.images, rtol=0, atol=1e-12)
    assert torch.equal(fgsm.success, pgd.success)


def test_default_step_sizes(small_net, images):
    good = images(20)
    ball = ImageBall("linf", 0.08)
    for default, explicit in (
        (FGSM(ball), FGSM(ball, 0.08)),
        (PGD(ball, 20), PGD(ball, 20, 2.5 * 0.08 / 20)),
        (MIA(ball, 10), MIA(ball, 10, 2.5 * 0.08 / 10)),
    ):
        one, two = (made(small_net, good.images, good.labels) for made in (default, explicit))
        torch.testing.assert_close(one.images, two.images, rtol=0, atol=1e-12)


def test_the_best_point_is_kept_not_the_last(small_net, images):
    # Steps far too long: the search jumps about, and its last point is worse than its best one.
    good = images(40)
    attack = PGD(ImageBall("linf", 0.1), 8, 0.2, start="zero", early_stop=False)
    result = attack(small_net, good.images, good.labels)
    moved, trail = good.images, [good.images]
    for _ in range(8):
        slope, _ = gradient(small_net, moved, good.labels)
        moved = good.images + (moved + 0.2 * slope.sign() - good.images).clamp(-0.1, 0.1)
        trail.append(moved.clamp(0, 1))
        moved = trail[-1]
    expected, values = best_of(small_net, trail, good.labels)
    assert (values > gradient(small_net, trail[-1], good.labels)[1] + 0.01).any()
    torch.testing.assert_close(result.objective, values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.05), ("l2", 0.4)])
def test_foolbox_finds_the_same_images(small_net, middle, norm, radius):
    foolbox = pytest.importorskip("foolbox")
    steps, step = 4, radius / 6  # inside the ball, where the best point is the last one
    peer = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    model = foolbox.PyTorchModel(small_net, bounds=(0, 1))
    expected = peer(abs_stepsize=step, steps=steps, random_start=False).run(
        model, middle[0], foolbox.criteria.Misclassification(middle[1]), epsilon=radius
    )
    result = PGD(ImageBall(norm, radius), steps, step, start="zero", early_stop=False)(
        small_net, *middle
    )
    value = gradient(small_net, expected, middle[1])[1]
    last = (value - result.objective).abs() < 1e-9
    assert last.float().mean() > 0.7
    torch.testing.assert_close(result.images[last], expected[last], rtol=0, atol=1e-6)
    assert (result.objective >= value - 1e-9).all()
