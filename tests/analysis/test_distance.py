import numpy as np
import pytest
import torch

from onmanifold.analysis.distance import distance_by_neighbours, distance_by_projection
from onmanifold.data.fonts import embedded_folder
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds import fonts_manifold
from onmanifold.manifolds.project import ProjectionConfig


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONMANIFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield fonts_manifold(embedded_folder())


def pictures(count, shape=(1, 5, 4), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator, dtype=torch.float64).to(dtype)


def subspace(count, dimension, seed=0):
    """Points of an affine subspace near the middle of the cube, and a basis of the directions off it."""
    generator = torch.Generator().manual_seed(11)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator).double())[0]
    along, off = basis[:, :dimension], basis[:, dimension:]
    middle = 0.5 + 0.1 * (torch.rand(20, generator=generator).double() - 0.5)
    generator = torch.Generator().manual_seed(seed)
    places = 0.2 * (torch.rand(count, dimension, generator=generator).double() - 0.5)
    return (middle + places @ along.T).view(-1, 1, 5, 4), along, off


def plain(train, images, k, originals=None, centre="mean", allowed=None):
    """Distances sample by sample, by numpy's own least squares."""
    train, images = train.flatten(1).double().numpy(), images.flatten(1).double().numpy()
    distances = []
    for row, image in enumerate(images):
        pool = train if allowed is None else train[allowed[row]]
        near = pool[np.argsort(((pool - image) ** 2).sum(1), kind="stable")[:k]]
        origin = near.mean(0)
        if originals is not None:
            origin = originals[row].flatten().double().numpy()
        columns = (near - (near.mean(0) if centre == "mean" else origin)).T
        fit = np.linalg.lstsq(columns, image - origin, rcond=None)[0]
        distances.append(np.linalg.norm(image - origin - columns @ fit))
    return torch.tensor(np.array(distances))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_of_an_affine_subspace_are_at_distance_zero_others_at_theirs(dtype):
    train = subspace(200, 4)[0].to(dtype)
    inside, _, off = subspace(10, 4, seed=1)
    lengths = torch.linspace(0.0, 0.2, 10).double()
    away = off[:, 3] * 0.6 + off[:, 7] * 0.8
    images = (inside.flatten(1) + lengths[:, None] * away).view_as(inside)
    found = distance_by_neighbours(train, images.to(dtype), k=12)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.distance.double(), lengths, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.points.double(), inside, rtol=0, atol=tolerance)
    assert found.distance.dtype == found.points.dtype == dtype


def test_through_the_sample_only_the_part_off_the_directions_counts():
    train = subspace(300, 3)[0]
    originals, along, off = subspace(8, 3, seed=2)
    # The clean images are themselves off the subspace: that does not count, the perturbation does.
    originals = (originals.flatten(1) + 0.05 * off[:, 0]).view_as(originals)
    step = 0.03 * along[:, 1] + 0.04 * off[:, 5]
    images = (originals.flatten(1) + step).view_as(originals)
    found = distance_by_neighbours(train, images, k=20, centre="mean", originals=originals)
    torch.testing.assert_close(
        found.distance, torch.full((8,), 0.04, dtype=torch.float64), rtol=1e-10, atol=0
    )
    moved = originals.flatten(1) + 0.03 * along[:, 1]
    torch.testing.assert_close(found.points.flatten(1), moved, rtol=0, atol=1e-12)
    # Directions x_i - x also have what the clean image is off the subspace.
    through = distance_by_neighbours(train, images, k=20, centre="sample", originals=originals)
    torch.testing.assert_close(
        through.distance, torch.full((8,), 0.04, dtype=torch.float64), rtol=1e-10, atol=0
    )
    off_again = (originals.flatten(1) + 0.02 * off[:, 0]).view_as(originals)
    by_sample, by_mean = (
        distance_by_neighbours(train, off_again, k=20, centre=centre, originals=originals).distance
        for centre in ("sample", "mean")
    )
    assert by_sample.max() < 1e-12
    torch.testing.assert_close(
        by_mean, torch.full((8,), 0.02, dtype=torch.float64), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("centre", ["mean", "sample"])
def test_against_plain_least_squares(k, centre):
    train, images, originals = pictures(60), pictures(9, seed=1), pictures(9, seed=2)
    clean = originals if centre == "sample" else None
    found = distance_by_neighbours(train, images, k=k, centre=centre, originals=clean)
    expected = plain(train, images, k, clean, centre)
    torch.testing.assert_close(found.distance, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        (images - found.points).flatten(1).norm(dim=1), found.distance, rtol=1e-9, atol=1e-12
    )
    if k == 40:  # more directions than pixels
        assert found.distance.max() < 1e-12


def test_neighbours_of_the_same_class():
    train, images = pictures(90), pictures(11, seed=1)
    train_labels, labels = torch.arange(90) % 3, torch.arange(11) % 3
    found = distance_by_neighbours(
        train, images, k=6, train_labels=train_labels, labels=labels
    ).distance
    allowed = [(train_labels == label).numpy() for label in labels]
    torch.testing.assert_close(found, plain(train, images, 6, allowed=allowed))
    assert not torch.allclose(found, distance_by_neighbours(train, images, k=6).distance)


def test_dependent_neighbours_span_what_they_span():
    # Each training image twice, and the clean image among them: ranks far below the number of columns.
    once = pictures(12)
    train, images = torch.cat([once, once]), pictures(5, seed=1)
    originals = once[:5]
    found = distance_by_neighbours(train, images, k=10, centre="sample", originals=originals)
    torch.testing.assert_close(found.distance, plain(train, images, 10, originals, "sample"))
    doubled = distance_by_neighbours(train, images, k=10).distance
    torch.testing.assert_close(doubled, distance_by_neighbours(once, images, k=5).distance)
    assert distance_by_neighbours(train, once, k=4).distance.max() < 1e-12


def test_a_result_does_not_depend_on_its_batch(monkeypatch):
    train, images = pictures(300, dtype=torch.float32), pictures(13, seed=1, dtype=torch.float32)
    whole = distance_by_neighbours(train, images, k=9)
    monkeypatch.setattr("onmanifold.analysis.distance._NUMBERS", 4000)
    for rows in (slice(0, 13), slice(4, 5)):
        part = distance_by_neighbours(train, images[rows], k=9)
        torch.testing.assert_close(part.distance, whole.distance[rows], rtol=1e-6, atol=0)
        torch.testing.assert_close(part.points, whole.points[rows], rtol=0, atol=1e-6)


def test_no_images_are_no_error():
    found = distance_by_neighbours(pictures(9), pictures(0), k=3)
    assert found.distance.shape == (0,)
    assert found.points.shape == (0, 1, 5, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected at least 1"),
        ({"k": 31}, "only 30 training images"),
        ({"centre": "median"}, "centre: expected"),
        ({"centre": "sample"}, "originals: needed"),
        ({"originals": pictures(2)}, "originals: expected shape"),
        ({"images": pictures(3, (1, 4, 4))}, "train_images: expected shape"),
        ({"train_images": pictures(30) * 255}, "train_images"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "both train_labels and labels"),
        (
            {
                "labels": torch.zeros(3, dtype=torch.int64),
                "train_labels": torch.arange(30),
            },
            "only 1 training images",
        ),
    ],
)
def test_wrong_arguments_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        distance_by_neighbours(
            **{"train_images": pictures(30), "images": pictures(3), "k": 5} | options
        )


def test_fonts_are_at_distance_zero_from_their_manifold(fonts):
    labels = torch.arange(12) % 10
    codes = fonts.sample_codes(labels, seed=3).double()
    images = fonts.decode(codes)
    found = distance_by_projection(fonts, images, labels, codes)
    assert found.distance.max() == 0
    assert torch.equal(found.points, images)


def test_a_normal_perturbation_of_fonts_is_its_own_distance(fonts):
    """A small step orthogonal to the tangent space leads straight away from the manifold."""
    labels = torch.arange(10)
    codes = fonts.sample_codes(labels, seed=3).double()
    codes[:, :6] *= 0.5
    images = fonts.decode(codes)
    chart = fonts.chart(codes)
    columns = []
    for latent in range(6):
        move = torch.zeros_like(chart.latents)
        move[:, latent] = 1e-6
        difference = chart.decode(chart.latents + move) - chart.decode(chart.latents - move)
        columns.append(difference.flatten(1))
    tangent = torch.linalg.qr(torch.stack(columns, dim=2))[0]
    # Inside [0, 1]: black pixels turn brighter, white ones darker, before the tangent part goes.
    noise = pictures(10, (1, 28, 28), seed=4)
    step = torch.where(images > 0.5, -noise, noise).flatten(1)
    step = step - (tangent @ (tangent.mT @ step.unsqueeze(2))).squeeze(2)
    step = 0.2 * step / step.norm(dim=1, keepdim=True)
    attacked = images + step.view_as(images)
    inside = ((attacked >= 0) & (attacked <= 1)).flatten(1).double().mean(1)
    assert inside.min() > 0.9
    attacked = attacked.clamp(0, 1)
    length = (attacked - images).flatten(1).norm(dim=1)
    config = ProjectionConfig(restarts=0, tolerance=0.0, steps=200, learning_rate=0.01)
    found = distance_by_projection(fonts, attacked, labels, codes, config=config)
    assert bool((found.distance <= length + 1e-12).all())
    assert bool((found.distance > 0.97 * length).all())
    assert (found.points - images).flatten(1).norm(dim=1).max() < 0.25 * length.max()


def test_projecting_in_batches_changes_nothing(fonts):
    labels = torch.arange(7)
    codes = fonts.sample_codes(labels, seed=1).double()
    images = fonts.decode(codes)
    start = torch.cat([fonts.sample_codes(labels, seed=9)[:, :6].double(), codes[:, 6:]], dim=1)
    config = ProjectionConfig(steps=10, restarts=1, candidates=4)
    whole, parts = (
        distance_by_projection(fonts, images, labels, start, config=config, batch_size=size)
        for size in (256, 3)
    )
    torch.testing.assert_close(parts.distance, whole.distance, rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="batch_size"):
        distance_by_projection(fonts, images, labels, start, batch_size=0)
    with pytest.raises(InputError, match="codes"):
        distance_by_projection(fonts, images, labels)


def test_real_attacked_images_leave_the_manifold(real_data):
    from onmanifold.data import load_dataset

    real_data("fashion_mnist")
    data = load_dataset("fashion_mnist", "test")
    train, test = data.batch(torch.arange(40, 2040)), data.batch(torch.arange(40))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(test.images.shape, generator=generator).sign()
    noisy = (test.images + 0.1 * signs).clamp(0, 1)
    clean, attacked = (
        distance_by_neighbours(train.images, images).distance for images in (test.images, noisy)
    )
    assert (attacked > clean).double().mean() > 0.9
    assert attacked.mean() > 1.1 * clean.mean()
    through = distance_by_neighbours(
        train.images, noisy, centre="sample", originals=test.images
    ).distance
    # Nearly orthogonal: most of the length is off the 50 directions.
    length = (noisy - test.images).flatten(1).norm(dim=1)
    share = (through / length).mean().item()
    assert 0.9 < share < 1
