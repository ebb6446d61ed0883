import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import Context, build_component, describe
from onmanifold.manifolds import fonts_manifold
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.manifolds.perceptual import FeatureDistance, PyramidDistance
from onmanifold.manifolds.project import PROJECTIONS, ProjectionConfig, project


class Generator(LearnedManifold):
    """A small network from four latents, and the class, to images; the same code as `Squashed`, learned."""

    name = "generator"

    def __init__(self, conditional=False, box=None):
        super().__init__((1, 8, 8), 3, 4, conditional)
        self.box = box
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(4, 64, generator=generator).double())
        self.shift = nn.Parameter(torch.randn(3, 64, generator=generator).double())
        self.dropout = nn.Dropout(0.5)
        self.decoded = []

    def encode(self, images, labels):
        raise NotImplementedError

    def decode(self, codes):
        self.decoded.append(len(codes))
        labels = self.labels_of(codes) if self.conditional else torch.zeros(len(codes)).long()
        # Summed row by row, so that a sample's image does not depend on its batch.
        rows = (codes[:, :4, None] * self.weight.to(codes)).sum(1)
        return torch.sigmoid(self.dropout(rows + self.shift.to(codes)[labels])).view(-1, 1, 8, 8)


def distances(first, second):
    return (first - second).flatten(1).norm(dim=1)


def search(manifold, images, codes, **fields):
    return project(manifold, images, codes, config=ProjectionConfig(**fields))


def wrong(codes, draw):
    """The same letters, elsewhere."""
    return torch.cat([draw(len(codes), seed=99)[:, :6], codes[:, 6:]], dim=1)


def test_letters_are_found_from_the_wrong_transformation(manifold, draw):
    codes = draw(60)
    images = manifold.decode(codes)
    start = wrong(codes, draw)
    assert distances(manifold.decode(start), images).mean() > 5
    found = project(manifold, images, start)
    assert (found.distance <= 0.5).float().mean() >= 0.95
    assert found.distance.mean() <= 0.5
    assert torch.equal(found.images, manifold.decode(found.codes))
    torch.testing.assert_close(found.distance, distances(found.images, images))
    assert torch.equal(found.codes[:, 6:], codes[:, 6:])
    assert found.codes[:, :6].abs().max() <= 1


def test_restarts_are_needed_and_work(manifold, draw):
    codes = draw(60)
    images, start = manifold.decode(codes), wrong(codes, draw)
    means = [
        search(manifold, images, start, steps=30, restarts=restarts, candidates=16).distance
        for restarts in (0, 1, 3)
    ]
    assert bool((means[1] <= means[0]).all())
    assert bool((means[2] <= means[1]).all())
    assert means[2].mean() < 0.5 * means[0].mean()


def test_the_projection_of_noise_is_the_image_that_was_disturbed(manifold, draw):
    codes = draw(10, reach=0.8)
    clean = manifold.decode(codes)
    noise = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    images = (clean + noise).clamp(0, 1)
    found = search(manifold, images, codes, restarts=0)
    assert bool((found.distance <= distances(clean, images)).all())
    assert distances(found.images, clean).max() < 0.25 * distances(images, clean).min()


def test_no_steps_give_the_start(manifold, draw):
    codes = draw(5)
    images = manifold.decode(draw(5, seed=1))
    found = search(manifold, images, codes, steps=0, restarts=0)
    assert torch.equal(found.codes, codes)


def test_a_start_outside_the_box_is_brought_in(manifold, draw):
    codes = draw(5)
    images = manifold.decode(codes)
    codes[:, 0] = 3.0
    found = search(manifold, images, codes, steps=5, restarts=0)
    assert found.codes[:, :6].abs().max() <= 1


def test_results_depend_on_seed_and_index_and_not_on_the_batch(manifold, draw):
    codes = draw(12).double()
    images, start = manifold.decode(codes), wrong(codes.float(), draw).double()
    indices = torch.arange(12) + 40
    options = {"config": ProjectionConfig(steps=10, restarts=2, candidates=8), "seed": 4}
    whole = project(manifold, images, start, indices=indices, **options)
    parts = [
        project(manifold, images[part], start[part], indices=indices[part], **options).codes
        for part in torch.arange(12).split(5)
    ]
    torch.testing.assert_close(torch.cat(parts), whole.codes, rtol=0, atol=1e-9)
    other = project(manifold, images, start, indices=indices, **options | {"seed": 5})
    assert not torch.equal(other.codes, whole.codes)


def test_any_manifold_will_do(plane, squashed, images):
    targets = images(8, on_manifold=True)
    start = torch.zeros_like(targets.codes)
    found = search(plane, targets.images, start, steps=200, restarts=0, tolerance=0.0)
    assert found.distance.max() < 0.01
    # Without a box, restarts are drawn from the standard normal distribution.
    codes = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()
    codes[:, 6] = 0.1
    start = torch.cat([torch.full((8, 6), 4.0).double(), codes[:, 6:]], dim=1)
    found = search(squashed, squashed.decode(codes), start, steps=200, restarts=2, tolerance=1e-3)
    assert found.distance.max() < 0.05


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("restarts", -1),
        ("candidates", 0),
        ("decay_every", 0),
        ("patience", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("decay", 1.5),
        ("l1_weight", -1.0),
        ("noise", math.inf),
        ("tolerance", math.nan),
        ("warmup", 0.9),
        ("schedule", "linear"),
    ],
)
def test_impossible_searches_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        ProjectionConfig(**{field: value})


def test_a_search_is_plain_data():
    for config in PROJECTIONS.values():
        plain = describe(config)
        assert build_component(ProjectionConfig, plain, Context(), "search") == config
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        build_component(ProjectionConfig, {"step": 3}, Context(), "search")


def test_learning_rates():
    step = ProjectionConfig(learning_rate=1.0, decay=0.5, decay_every=10)
    assert [step.rate(number) for number in (0, 9, 10, 25)] == [1.0, 1.0, 0.5, 0.25]
    cosine = ProjectionConfig(
        learning_rate=2.0, steps=1000, schedule="cosine", warmup=0.05, cooldown=0.25
    )
    rates = [cosine.rate(number) for number in range(1000)]
    assert rates[:50] == pytest.approx([2 * (number + 0.5) / 50 for number in range(50)])
    assert set(rates[50:749]) == {2.0}
    assert rates[874] + rates[875] == pytest.approx(2.0)  # half way down, between two steps
    assert all(before > after > 0 for before, after in pairwise(rates[750:]))
    flat = replace(cosine, warmup=0.0, cooldown=0.0)
    assert {flat.rate(number) for number in range(1000)} == {2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images * 255, "divide by 255"),
        (lambda images: images[:, :, :20], "images"),
        (lambda images: images * float("nan"), "NaN"),
        (lambda images: images[:1], "codes"),
    ],
)
def test_wrong_images_are_refused(manifold, draw, change, message):
    codes = draw(3)
    with pytest.raises(InputError, match=message):
        project(manifold, change(manifold.decode(codes)), codes)


def test_real_fonts_are_recovered(real_data):
    manifold = fonts_manifold(real_data("fonts"))
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(manifold.num_fonts, (100, 1), generator=generator)
    classes = torch.randint(10, (100, 1), generator=generator)
    latents = 2 * torch.rand(2, 100, 6, generator=generator) - 1
    codes, start = (torch.cat([part, letters, classes], dim=1) for part in latents)
    found = project(manifold, manifold.decode(codes), start)
    assert (found.distance <= 0.5).float().mean() >= 0.95


QUICK = ProjectionConfig(
    steps=60, learning_rate=0.2, schedule="cosine", l1_weight=10.0, restarts=0, tolerance=0.0
)


def made(generator, count, seed=0):
    """Images of the generator, their labels and codes, float64."""
    labels = torch.arange(count) % 3
    codes = generator.sample_codes(labels, seed).double()
    with torch.no_grad():
        return generator.eval().decode(codes), labels, codes


@pytest.mark.parametrize("kind", ["pyramid", "features"])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_perceptual_distance_is_minimised_from_the_mean_code(kind, conditional, small_net):
    generator = Generator(conditional)
    images, labels, _ = made(generator, 7)
    measure = PyramidDistance() if kind == "pyramid" else FeatureDistance(small_net, (1, 8, 8))
    found = project(
        generator, images, labels=labels, config=replace(QUICK, steps=200), measure=measure
    )
    assert found.measure == measure.fingerprint
    with torch.no_grad():
        assert torch.equal(found.images, generator.decode(found.codes))
        start = generator.decode(generator.codes_of(torch.zeros(7, 4).double(), labels))
    for image, value in ((found.images, found.loss), (start, None)):
        loss = measure(image, images) + 10 * (image - images).abs().flatten(1).mean(1)
        if value is None:
            assert bool((found.loss < 0.05 * loss).all())
        else:
            torch.testing.assert_close(value, loss)
    torch.testing.assert_close(found.distance, distances(found.images, images))
    if conditional:
        assert torch.equal(found.codes[:, 4].long(), labels)


def test_without_a_measure_the_distance_is_the_loss(plane, images):
    found = search(plane, images(4).images, torch.zeros(4, 6).double(), steps=5, restarts=0)
    assert found.measure == "l2"
    assert torch.equal(found.loss, found.distance)


def test_the_nearest_point_of_a_plane_is_the_orthogonal_projection(plane, images):
    # Small steps off the middle, so that the box plays no part.
    targets = 0.5 + 0.05 * (images(6).images - 0.5)
    config = ProjectionConfig(steps=600, learning_rate=0.02, schedule="cosine", restarts=0)
    found = project(plane, targets, config=replace(config, tolerance=0.0))
    basis = torch.linalg.qr(plane.weight.T)[0]
    flat = (targets - 0.5).flatten(1)
    expected = flat @ basis @ basis.T
    torch.testing.assert_close((found.images - 0.5).flatten(1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.distance, (flat - expected).norm(dim=1), rtol=1e-8, atol=0)


def test_the_gradient_followed_is_that_of_the_loss(small_net):
    from onmanifold.manifolds.descent import Goal

    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    goal = Goal(images, FeatureDistance(small_net, (1, 8, 8)), 3.0)
    found = (images * 0.8 + 0.1).requires_grad_()
    loss, gradient = goal.slope(found)
    torch.testing.assert_close(loss, goal.loss(found).detach())
    assert torch.autograd.gradcheck(goal.loss, found)
    torch.testing.assert_close(gradient, torch.autograd.grad(goal.loss(found).sum(), found)[0])
    plain, residual = Goal(images, None, 0.0).slope(found.detach())
    torch.testing.assert_close(plain, residual.flatten(1).norm(dim=1))
    assert torch.equal(residual, found.detach() - images)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": 0.1},
        {"patience": 4},
        {"restarts": 2, "candidates": 5, "noise": 0.05, "patience": 6},
        {"box": 0.5, "noise": 0.2, "restarts": 1, "candidates": 3},
    ],
    ids=str,
)
def test_a_result_does_not_depend_on_its_batch(changes, small_net):
    changes = dict(changes)
    generator = Generator(conditional=True, box=changes.pop("box", None))
    images, labels, _ = made(generator, 7)
    images = (images + 0.1 * images.roll(1, 0)).clamp(0, 1)
    indices = torch.arange(7) * 3 + 100
    config = replace(QUICK, **changes)
    shared = {"config": config, "measure": FeatureDistance(small_net, (1, 8, 8)), "seed": 3}
    whole = project(generator, images, labels=labels, indices=indices, **shared)
    for rows in torch.tensor([[6, 2, 4], [5, 0, 1]]):
        part = project(
            generator, images[rows], labels=labels[rows], indices=indices[rows], **shared
        )
        torch.testing.assert_close(part.codes, whole.codes[rows], rtol=0, atol=1e-9)
    if config.noise or config.restarts:
        other = project(generator, images, labels=labels, indices=indices, **shared | {"seed": 4})
        assert not torch.equal(other.codes, whole.codes)
    if generator.box is not None:
        assert whole.codes[:, :4].abs().max() <= generator.box


def test_more_restarts_never_give_a_larger_loss(small_net):
    generator = Generator()
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    shared = {"measure": PyramidDistance(), "seed": 2}
    losses = [
        project(generator, images, config=replace(QUICK, restarts=count), **shared).loss
        for count in (0, 1, 3)
    ]
    assert bool((losses[1] <= losses[0]).all())
    assert bool((losses[2] <= losses[1]).all())


def test_restarts_are_not_the_draws_that_images_may_be_made_of():
    generator = Generator()
    images, _, codes = made(generator, 5, seed=0)
    config = ProjectionConfig(steps=0, restarts=1, candidates=8, tolerance=0.0)
    found = project(generator, images, config=config, seed=0)
    assert not bool((found.codes == codes).all(1).any())


def test_converged_samples_leave():
    generator = Generator()
    images = (made(generator, 6)[0] + 0.2 * torch.eye(8).double()).clamp(0, 1)
    config = replace(QUICK, steps=300, l1_weight=0.0, learning_rate=0.05)
    nearest = project(generator, images, config=config)
    starts = torch.zeros(6, 4).double()
    starts[:3] = nearest.codes[:3]
    config = replace(config, patience=15)
    generator.decoded.clear()
    found = project(generator, images, starts, config=config)
    # Three start where they end: they leave after the patience, the others go on, by and by.
    batches = generator.decoded[1:-1]
    assert batches[:18] == [6] * 16 + [3] * 2
    assert len(batches) < 200
    assert batches == sorted(batches, reverse=True)
    torch.testing.assert_close(found.distance, nearest.distance, rtol=0.02, atol=0)
    assert bool((found.distance[:3] <= nearest.distance[:3]).all())


def test_each_image_has_the_best_of_its_starts():
    generator = Generator()
    images, labels, codes = made(generator, 4)
    given, encoded = codes.clone(), codes.clone()
    given[:2] = 5.0
    encoded[2:] = 5.0
    config = ProjectionConfig(steps=0, restarts=0)
    found = project(generator, images, given, config=config, encoder=lambda *_: encoded)
    assert torch.equal(found.codes, codes)
    assert found.distance.max() == 0
    seen = []

    def encoder(images, labels):
        seen.append(labels)
        return torch.full((4, 4), 5.0)

    # The mean code is nearer than what this encoder says.
    found = project(generator, images, labels=labels, config=config, encoder=encoder)
    assert torch.equal(found.codes, torch.zeros(4, 4).double())
    assert torch.equal(seen[0], labels)


def test_a_manifold_may_know_its_mean_code():
    generator = Generator(conditional=True)
    generator.mean_code = lambda labels: torch.cat(
        [torch.full((len(labels), 4), 0.25), labels.unsqueeze(1)], dim=1
    )
    images, labels, _ = made(generator, 3)
    found = project(generator, images, labels=labels, config=ProjectionConfig(steps=0, restarts=0))
    assert torch.equal(found.codes[:, :4], torch.full((3, 4), 0.25).double())
    assert torch.equal(found.codes[:, 4].long(), labels)


def test_an_encoder_says_what_cannot_be_searched(manifold, draw):
    codes = draw(3)
    found = project(
        manifold,
        manifold.decode(codes),
        config=ProjectionConfig(steps=3, restarts=0),
        encoder=lambda images, labels: codes,
    )
    assert torch.equal(found.codes[:, 6:], codes[:, 6:])
    with pytest.raises(InputError, match="codes: fonts has 2 columns"):
        project(manifold, manifold.decode(codes), labels=codes[:, 7].long())
    generator = Generator(conditional=True)
    images, labels, _ = made(generator, 3)
    with pytest.raises(InputError, match="labels"):
        project(generator, images)
    with pytest.raises(InputError, match="labels: found label 3"):
        project(generator, images, labels=labels + 1)


def test_the_manifold_is_run_in_eval_mode_and_left_as_it_was():
    generator = Generator()
    images, _, _ = made(generator, 2)
    generator.train()
    generator.shift.requires_grad_(False)
    config = replace(QUICK, steps=3)
    first, again = (
        project(generator, images, config=config, measure=PyramidDistance()) for _ in range(2)
    )
    assert torch.equal(first.codes, again.codes)
    assert generator.training
    assert generator.dropout.training
    assert generator.weight.requires_grad
    assert not generator.shift.requires_grad
    assert generator.weight.grad is None
    assert not first.codes.requires_grad

    class Failing(Generator):
        def decode(self, codes):
            assert not self.dropout.training
            raise KeyboardInterrupt

    failing = Failing().train()
    with pytest.raises(KeyboardInterrupt):
        project(failing, images)
    assert failing.dropout.training
    assert failing.weight.requires_grad


def test_noise_is_a_share_of_each_levels_spread():
    """One step: the point that is tried first is the start plus the noise."""
    tried = []

    class Levelled(Manifold):
        name, code_size, latent_size, image_shape = "levelled", 4, 4, (1, 2, 2)
        fingerprint = "levelled"
        levels = {0: slice(0, 1), 1: slice(1, 4)}  # noqa: RUF012

        def encode(self, images, labels):
            raise NotImplementedError

        def sample_codes(self, labels, seed=0, indices=None):
            return super().sample_codes(labels, seed) * torch.tensor([3.0, 1.0, 2.0, 2.0])

        def decode(self, codes):
            tried.append(codes.detach().clone())
            return torch.sigmoid(codes).view(-1, 1, 2, 2)

    images = torch.rand(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    config = ProjectionConfig(steps=8, learning_rate=1e-9, noise=0.1, restarts=0)
    project(Levelled(), images, config=config)
    # First the start itself; then steps 0 to 8, without noise from step 6 on.
    deviations = torch.stack([points.std(0) for points in tried[1:10]])
    expected = 0.1 * torch.tensor([3.0, 3.0, 3.0, 3.0]).double()
    strengths = torch.tensor([max(0.0, 1 - step / 6) ** 2 for step in range(9)]).double()
    torch.testing.assert_close(
        deviations, strengths[:, None] * expected, rtol=0.1, atol=1e-7, check_dtype=False
    )


def test_wrong_searches_are_explained(small_net):
    generator = Generator()
    images, _, _ = made(generator, 2)
    with pytest.raises(InputError, match="l1_weight: found"):
        project(generator, images, config=QUICK)
    with pytest.raises(InputError, match=r"codes: expected a float tensor \(2, 4\)"):
        project(generator, images, encoder=lambda images, labels: images)
    with pytest.raises(InputError, match="images"):
        project(generator, images[:, :, :7])


def test_no_images_are_no_error():
    generator = Generator()
    found = project(
        generator,
        torch.zeros(0, 1, 8, 8).double(),
        config=replace(QUICK, steps=2),
        measure=PyramidDistance(),
    )
    assert found.codes.shape == (0, 4)
    assert found.loss.shape == found.distance.shape == (0,)


def test_float32_gives_float32():
    generator = Generator()
    images = made(generator, 3)[0].float()
    found = project(
        generator,
        images,
        config=replace(QUICK, noise=0.1, restarts=1, candidates=2),
        measure=PyramidDistance(),
    )
    for tensor in found[:4]:
        assert tensor.dtype == torch.float32
    assert found.loss.max() < 0.5
