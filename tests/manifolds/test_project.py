import pytest
import torch

from onmanifold.foundation.errors import InputError
from onmanifold.manifolds import fonts_manifold, project


def distances(first, second):
    return (first - second).flatten(1).norm(dim=1)


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
        project(manifold, images, start, steps=30, restarts=restarts, candidates=16).distance
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
    found = project(manifold, images, codes, restarts=0)
    assert bool((found.distance <= distances(clean, images)).all())
    assert distances(found.images, clean).max() < 0.25 * distances(images, clean).min()


def test_no_steps_give_the_start(manifold, draw):
    codes = draw(5)
    images = manifold.decode(draw(5, seed=1))
    found = project(manifold, images, codes, steps=0, restarts=0)
    assert torch.equal(found.codes, codes)


def test_a_start_outside_the_box_is_brought_in(manifold, draw):
    codes = draw(5)
    images = manifold.decode(codes)
    codes[:, 0] = 3.0
    found = project(manifold, images, codes, steps=5, restarts=0)
    assert found.codes[:, :6].abs().max() <= 1


def test_results_depend_on_seed_and_index_and_not_on_the_batch(manifold, draw):
    codes = draw(12).double()
    images, start = manifold.decode(codes), wrong(codes.float(), draw).double()
    indices = torch.arange(12) + 40
    options = {"steps": 10, "restarts": 2, "candidates": 8, "seed": 4}
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
    found = project(plane, targets.images, start, steps=200, restarts=0, tolerance=0.0)
    assert found.distance.max() < 0.01
    # Without a box, restarts are drawn from the standard normal distribution.
    codes = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()
    codes[:, 6] = 0.1
    start = torch.cat([torch.full((8, 6), 4.0).double(), codes[:, 6:]], dim=1)
    found = project(squashed, squashed.decode(codes), start, steps=200, restarts=2, tolerance=1e-3)
    assert found.distance.max() < 0.05


@pytest.mark.parametrize("options", [{"steps": -1}, {"restarts": -1}, {"candidates": 0}])
def test_impossible_counts_are_refused(manifold, draw, options):
    codes = draw(2)
    with pytest.raises(InputError, match="expected steps"):
        project(manifold, manifold.decode(codes), codes, **options)


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
