"""Fréchet distances and nearest images against known answers; the quality of toy manifolds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn

from onmanifold.analysis import nearest, quality_images, quality_measures
from onmanifold.analysis.frechet import Gaussian, frechet_distance, gaussian_distance, gaussian_of
from onmanifold.analysis.nearest import nearest_images
from onmanifold.analysis.quality import Measure, Quality, measure_quality
from onmanifold.data.dataset import Dataset
from onmanifold.data.fonts import embedded_folder
from onmanifold.evaluation.statistics import wilson_interval
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.perceptual import PyramidDistance

SHAPE, CLASSES = (1, 4, 4), 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size, seed):
    root = normal(size, size, seed=seed)
    return root @ root.T


# The Fréchet distance.


def test_gaussians_of_the_same_axes_have_a_closed_form():
    first = Gaussian(
        torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double()
    )
    second = Gaussian(
        torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 1.0])).double()
    )
    assert gaussian_distance(first, second) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2)


def test_other_gaussians_as_by_the_root_of_the_product():
    first = Gaussian(normal(6, seed=1), covariance(6, seed=2))
    second = Gaussian(normal(6, seed=3), covariance(6, seed=4))
    root = scipy.linalg.sqrtm((first.covariance @ second.covariance).numpy()).real
    shift = (first.mean - second.mean).square().sum()
    expected = shift + (first.covariance + second.covariance).trace() - 2 * np.trace(root)
    assert gaussian_distance(first, second) == pytest.approx(float(expected), rel=1e-9)
    assert gaussian_distance(second, first) == pytest.approx(float(expected), rel=1e-9)


def test_moments_are_those_of_numpy():
    features = normal(50, 4) + 1e3
    found = gaussian_of(features.float())
    assert found.covariance.dtype == torch.float64
    torch.testing.assert_close(
        found.covariance, torch.from_numpy(np.cov(features.float().numpy().T.astype(np.float64)))
    )


@pytest.mark.parametrize("count", [5, 200])
def test_the_same_features_are_at_distance_zero(count):
    features = normal(count, 12)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-12)
    moved = features + torch.arange(12)
    assert frechet_distance(features, moved) == pytest.approx(
        float(torch.arange(12).square().sum())
    )


def test_flat_gaussians_are_as_in_their_plane():
    # A rotation into ten dimensions changes no distance, and leaves seven of them without any spread.
    turned = torch.linalg.qr(normal(10, 10, seed=5))[0][:3]
    first, second = normal(40, 3, seed=6), 2 * normal(30, 3, seed=7) + 1
    expected = frechet_distance(first, second)
    assert frechet_distance(first @ turned, second @ turned) == pytest.approx(expected, rel=1e-7)


def test_gaussians_in_planes_at_right_angles_share_nothing():
    first = torch.cat([normal(30, 2, seed=1), torch.zeros(30, 2).double()], dim=1)
    second = first.flip(1)
    spread = gaussian_of(first).covariance.trace() + gaussian_of(second).covariance.trace()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(shift + spread), rel=1e-7)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (normal(1, 3), normal(5, 3), "at least 2"),
        (normal(5, 3), normal(5, 4), "as many columns"),
        (normal(5, 3), torch.full((5, 3), math.nan), "NaN"),
        (torch.ones(5, 3, dtype=torch.int64), normal(5, 3), "floats"),
    ],
)
def test_features_that_have_no_distance(first, second, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(first, second)


# The nearest images.


def dataset(count, seed=0, images=None, dtype=torch.float32):
    if images is None:
        images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.uint8:
        images = (images * 255).round().byte()
    labels = torch.arange(len(images)) % CLASSES
    return Dataset("toy", images, labels, tuple("abc"), f"toy-{seed}-{count}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("portions", [None, (7, 3)])
def test_nearest_images_are_those_of_a_full_comparison(dtype, portions, monkeypatch):
    if portions:
        monkeypatch.setattr(nearest, "_PORTION", portions[0])
        monkeypatch.setattr(nearest, "_ROWS", portions[1])
    train = dataset(40, seed=1, dtype=dtype)
    candidates = train.batch(torch.arange(40)).images
    images = torch.cat([dataset(10, seed=2).images, candidates[[17]]])
    distances = (images[:, None].double() - candidates[None].double()).flatten(2).norm(dim=2)
    found = nearest_images(images, train)
    assert torch.equal(found.positions, distances.argmin(1))
    torch.testing.assert_close(found.distances, distances.min(1).values, rtol=1e-12, atol=1e-12)
    assert found.positions[-1] == 17
    assert found.distances[-1] == 0


@pytest.mark.parametrize(
    ("images", "train", "message"),
    [
        (torch.zeros(2, 1, 4, 5), dataset(3), r"\(1, 4, 5\)"),
        (torch.zeros(2, *SHAPE), dataset(3).take(0), "at least one"),
        (torch.full((2, *SHAPE), 2.0), dataset(3), r"\[0, 1\]"),
    ],
)
def test_nearest_images_of_what_cannot_be_compared(images, train, message):
    with pytest.raises(InputError, match=message):
        nearest_images(images, train)


# Measures of toy manifolds.


class Toy(Manifold):
    """Codes are (position, class); reconstructions and samples are two functions of them."""

    name, fingerprint = "toy", "toy"
    code_size, latent_size = 2, 1
    image_shape = SHAPE

    def __init__(self, encoded, sampled=None, conditional=True):
        super().__init__()
        self.sampled = encoded if sampled is None else sampled
        self.encoded, self.conditional = encoded, conditional
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, images, labels):
        return torch.stack([-1 - torch.arange(len(images)), labels], dim=1).float()

    def decode(self, codes):
        places = codes[:, 0].long()
        reconstructed = self.encoded(-1 - places, codes[:, 1].long())
        drawn = self.sampled(places, codes[:, 1].long())
        return torch.where((places < 0)[:, None, None, None], reconstructed, drawn) * self.scale

    def sample_codes(self, labels, seed=0, indices=None):
        classes = labels if self.conditional else torch.zeros_like(labels)
        return torch.stack([torch.arange(len(labels)), classes], dim=1).float()


class Brightness(nn.Module):
    """The class is the mean pixel in twelfths, rounded down; its features are the first four pixels."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, affine=False)

    def features(self, images):
        return images.flatten(1)[:, :4]

    def forward(self, images):
        self.norm(images)  # In train mode it would learn from what it sees.
        numbers = (12 * images.flatten(1).mean(1)).long().clamp(0, CLASSES - 1)
        return nn.functional.one_hot(numbers, CLASSES).float()


def level(classes, shift=0):
    """Flat images of the brightness of a class."""
    return (((classes + shift) % CLASSES + 0.5) / 12)[:, None, None, None].expand(-1, *SHAPE)


def measured(manifold, train=None, test=None, **options):
    options = {"perceptual": PyramidDistance(), "count": 60} | options
    return measure_quality(manifold, train or dataset(90, 1), test or dataset(60, 2), **options)


def test_a_manifold_of_one_image_is_as_good_as_that_image():
    train, test = dataset(90, 1), dataset(60, 2)
    mean = train.images.double().mean(0).float()
    found = measured(Toy(lambda places, labels: mean.expand(len(labels), *SHAPE)), train, test)
    for name in ("reconstruction L1", "reconstruction L2", "reconstruction perceptual"):
        assert found[name].ratio == pytest.approx(1, abs=1e-6)
    differences = (test.images - mean).flatten(1).double()
    assert found["reconstruction L1"].value == pytest.approx(differences.abs().mean().item())
    assert found["reconstruction L2"].value == pytest.approx(
        differences.square().mean().sqrt().item()
    )
    per_image = differences.abs().mean(1).numpy()
    low, high = scipy.stats.norm.interval(0.95, per_image.mean(), scipy.stats.sem(per_image))
    assert found["reconstruction L1"].low == pytest.approx(low, rel=1e-5)
    assert found["reconstruction L1"].high == pytest.approx(high, rel=1e-5)
    squares = differences.square().mean(1).numpy()
    ends = scipy.stats.norm.interval(0.95, squares.mean(), scipy.stats.sem(squares))
    assert found["reconstruction L2"].low == pytest.approx(math.sqrt(ends[0]), rel=1e-5)
    assert found["reconstruction L2"].high == pytest.approx(math.sqrt(ends[1]), rel=1e-5)


def test_what_is_not_offered_is_not_measured():
    found = measured(Toy(lambda places, labels: level(labels)))
    absent = ("round trip", "bits per dimension", "Fréchet distance", "accuracy on samples")
    assert not any(name in found for name in (*absent, "codes outside the box"))
    assert found.facts["classifier"] is None


def test_accuracies_count_the_wanted_class():
    labels = torch.arange(60) % CLASSES
    test = Dataset("flat", level(labels).clone(), labels, tuple("abc"), "flat")
    test.images[::4] = level(labels[::4], 1)
    manifold = Toy(
        encoded=lambda places, classes: level(classes, (places % 5 == 0).long()),
        sampled=lambda places, classes: level(classes, (places % 2 == 0).long()),
    )
    found = measured(manifold, test=test, classifier=Brightness())
    assert found["accuracy on samples"].value == 0.5
    assert found["accuracy on reconstructions"].value == 0.8
    assert found["accuracy on samples"].reference == 0.75
    assert (
        found["accuracy on reconstructions"].low,
        found["accuracy on reconstructions"].high,
    ) == (pytest.approx(wilson_interval(48, 60)))
    blind = Toy(lambda places, classes: level(classes), conditional=False)
    assert "accuracy on samples" not in measured(blind, test=test, classifier=Brightness())


def test_the_frechet_distance_is_that_of_the_features():
    train, test = dataset(60, 1), dataset(60, 2)
    images = dataset(60, 3).images
    manifold = Toy(lambda places, labels: images[places.clamp(0, 59)])
    found = measured(manifold, train, test, classifier=Brightness())["Fréchet distance"]
    one, two, three = (item.flatten(1)[:, :4] for item in (images, test.images, train.images))
    assert found.value == pytest.approx(frechet_distance(one, two), rel=1e-6)
    assert found.reference == pytest.approx(frechet_distance(three, two), rel=1e-6)
    assert "FID" in found.note
    assert "fewer than features" not in found.note
    few = measured(manifold, train, test, classifier=Brightness(), count=4)["Fréchet distance"]
    assert "fewer than features" in few.note
    assert few.samples == 4


def test_a_copier_is_found_out():
    train, test = dataset(90, 1), dataset(60, 2)
    found = measured(Toy(lambda places, labels: train.images[places.abs() % 60]), train, test)
    assert found["distance to training images"].value == 0
    assert found["nearer than 1 % of test images"].value == 1
    # Two thirds of the training images, as many as there are test images, are candidates.
    assert found["nearer to training images"].low > 0.5
    assert found.series["sample_distances"] == (0.0,) * 60


def test_new_images_are_no_copies():
    fresh = dataset(400, 3).images
    found = measured(
        Toy(lambda places, labels: fresh[places.abs() % 400]),
        dataset(400, 1),
        dataset(400, 2),
        count=400,
    )
    assert found["distance to training images"].low < 1 < found["distance to training images"].high
    assert found["nearer to training images"].low < 0.5 < found["nearer to training images"].high
    assert found["nearer than 1 % of test images"].value < 0.05


def test_samples_that_share_a_nearest_image_count_as_one():
    grey = measured(Toy(lambda places, labels: torch.full((len(places), *SHAPE), 0.5)))
    found, ratio = grey["nearer to training images"], grey["distance to training images"]
    assert found.value in (0, 1)
    assert found.low <= 0.03
    assert found.high >= 0.97
    assert ratio.low < ratio.value < ratio.high < 1
    medians = (np.median(grey.series[f"{name}_distances"]) for name in ("sample", "test"))
    assert ratio.value == pytest.approx(next(medians) / next(medians), rel=1e-5)


def test_crowds_are_counted_image_by_image():
    # Sixteen images of one lit pixel; half of the samples are nearer to the brighter ones, half to the others.
    pixels = torch.eye(16).view(16, *SHAPE)
    train, test = dataset(0, images=pixels), dataset(0, images=pixels / 2)
    levels = torch.tensor([0.95, 0.55]).repeat_interleave(8)[:, None, None, None]
    samples = pixels[:8].repeat(2, 1, 1, 1) * levels
    found = measured(Toy(lambda places, labels: samples[places.abs() % 16]), train, test)
    entry = found["nearer to training images"]
    assert entry.value == 0.5
    # Each of the sixteen is nearest to one sample: as of 16 independent ones.
    assert entry.high - entry.value == pytest.approx(1.959964 * 0.5 / 4)


class Bits(Toy):
    def bits_per_dimension(self, images, seed=0, indices=None):
        return indices.double() / 10 + seed


def test_bits_are_averaged_over_the_test_images():
    test = replace(dataset(60, 2), indices=torch.arange(100, 160))
    found = measured(Bits(lambda places, labels: level(labels)), test=test, seed=2)[
        "bits per dimension"
    ]
    numbers = np.arange(100, 160) / 10 + 2
    assert found.value == pytest.approx(numbers.mean())
    low, high = scipy.stats.norm.interval(0.95, numbers.mean(), scipy.stats.sem(numbers))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.reference == 8


def test_an_exact_manifold_loses_rounding_alone(plane):
    labels = torch.arange(50) % CLASSES
    images = plane.decode(1.8 * torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) - 0.9)
    data = Dataset("plane", images.float(), labels, tuple("abc"), "plane")
    found = measured(plane, data, data)
    assert 0 < found["round trip"].value < 1e-6
    assert found["codes outside the box"].value == 0
    assert found["active latents"].value == 1
    # Uniform on [-0.9, 0.9] against uniform on [-1, 1].
    assert found["latent deviation"].value == pytest.approx(0.9 / math.sqrt(3), abs=0.08)
    assert found["latent deviation"].reference == pytest.approx(1 / math.sqrt(3), abs=0.08)
    # Test images that are training images have no distance to compare with.
    assert "distance to training images" not in found


def test_fonts_are_what_their_codes_say(tmp_path, monkeypatch):
    from onmanifold.data import load_dataset
    from onmanifold.manifolds import fonts_manifold

    monkeypatch.setenv("ONMANIFOLD_CACHE", str(tmp_path))
    train, test = (
        load_dataset("fonts", split, size=200, folder=embedded_folder())
        for split in ("train", "test")
    )
    fonts = fonts_manifold(embedded_folder())
    found = measured(fonts, train, test, stored_codes=True, count=100)
    assert found["round trip"].value == 0
    assert found["reconstruction L1"].value == found["reconstruction perceptual"].value == 0
    assert found["codes outside the box"].value == 0
    assert found["latent offset"].value < 3 * found["latent offset"].reference
    assert found.facts["stored_codes"]


def test_the_same_seed_gives_the_same_figures_in_any_batches(plane, monkeypatch):
    first = measured(plane, test=plane_data(), train=plane_data(3), seed=1)
    for module in (quality_images, quality_measures):
        monkeypatch.setattr(module, "BATCH", 7)
    again = measured(plane, test=plane_data(), train=plane_data(3), seed=1)
    assert first.facts == again.facts
    for one, two in zip(first.measures, again.measures, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-5, abs=1e-9)
    other = measured(plane, test=plane_data(), train=plane_data(3), seed=2)
    assert other["latent offset"].value != first["latent offset"].value


def plane_data(seed=4, count=80):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Dataset("noise", images, torch.arange(count) % CLASSES, tuple("abc"), f"noise-{seed}")


def test_manifold_and_classifier_are_left_as_they_were():
    manifold = Toy(lambda places, labels: level(labels) * torch.rand(())).train()
    classifier = Brightness().train()
    before = classifier.norm.running_mean.clone()
    state = torch.get_rng_state()
    measured(manifold, classifier=classifier)
    assert manifold.training
    assert classifier.training
    assert manifold.scale.requires_grad
    assert torch.equal(classifier.norm.running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_images_may_be_encoded_than_sampled():
    found = measured(Toy(lambda places, labels: level(labels)), count=50, encoded=20)
    assert found["reconstruction L1"].samples == found.facts["encoded"] == 20
    assert found["nearer to training images"].samples == found.facts["samples"] == 50
    assert len(found.series["test_distances"]) == 50


def test_float64_manifolds_are_measured_in_float64():
    double = Toy(lambda places, labels: level(labels).double()).double()
    single = Toy(lambda places, labels: level(labels))
    one, two = (measured(item, classifier=Brightness()) for item in (double, single))
    assert one["reconstruction L1"].value == pytest.approx(two["reconstruction L1"].value, rel=1e-6)


def test_quality_survives_json(tmp_path):
    found = measured(Bits(lambda places, labels: level(labels)))
    path = tmp_path / "quality.json"
    text = found.to_json(path)
    assert text == path.read_text()
    assert Quality.from_json(path) == found
    odd = Quality(
        (Measure("lost", math.nan, high=math.inf),), {"a": (math.inf, 1.0)}, {"x": math.nan}
    )
    odd.to_json(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    again = Quality.from_json(path)
    assert math.isnan(again["lost"].value)
    assert again["lost"].high is None
    assert math.isnan(again.series["a"][0])


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"measures": [{"value": 1}], "series": {}, "facts": {}}']
)
def test_foreign_files_are_explained(text, tmp_path):
    path = tmp_path / "quality.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"quality\.json"):
        Quality.from_json(path)


def test_measures_by_name():
    found = measured(Toy(lambda places, labels: level(labels)))
    frame = found.to_pandas()
    assert list(frame.index) == [measure.name for measure in found.measures]
    assert frame.loc["reconstruction L1", "ratio"] == found["reconstruction L1"].ratio
    with pytest.raises(InputError, match="reconstruction L1"):
        found["reconstruction L3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "count"),
        ({"encoded": 0}, "encoded"),
        ({"train": plane_data()}, "train"),
        ({"test": dataset(3).take(1)}, "at least 2 images"),
        ({"classifier": nn.Flatten()}, "features"),
        ({"stored_codes": True}, "no codes"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        measured(Toy(lambda places, labels: level(labels)), **options)
