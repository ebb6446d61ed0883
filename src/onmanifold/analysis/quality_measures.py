"""The figures of a manifold's quality: reconstructions, likelihood, samples and codes, against real images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from onmanifold.analysis.frechet import frechet_distance
from onmanifold.analysis.nearest import nearest_images
from onmanifold.analysis.quality_images import BATCH, Seen, chosen_images, knows_classes
from onmanifold.data.dataset import Dataset
from onmanifold.foundation.modules import device_of, dtype_of
from onmanifold.foundation.weights import weights_digest
from onmanifold.manifolds.perceptual import PerceptualDistance

_CONFIDENCE = 0.95
_RESAMPLES = 2000
# Burda et al. 2016, section 5.2: a latent is active if the variance of its posterior mean is above 0.01.
_ACTIVE = 0.1


@runtime_checkable
class Likelihood(Protocol):
    """A manifold with a density."""

    def bits_per_dimension(
        self, images: Tensor, seed: int = 0, indices: Tensor | None = None
    ) -> Tensor:
        """Bits (B,) that an 8-bit image (B, C, H, W) takes per value."""
        ...


@dataclass(frozen=True)
class Measure:
    """One figure of a quality report.

    Attributes:
        name: Such as "reconstruction L1".
        value: What was measured.
        low: Lower end of its 95 % interval over images; None where there is none.
        high: Upper end.
        reference: The same of something known, which says what is good or bad.
        against: What that is, such as "mean training image".
        samples: Images it was measured on.
        note: What it is, in a sentence.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    against: str = ""
    samples: int = 0
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Value by reference; None without a reference, or where that is 0."""
        return self.value / self.reference if self.reference else None


def describe_classifier(classifier: nn.Module) -> str:
    """Its architecture and a digest of its weights."""
    kind = getattr(classifier, "spec", {}).get("type", type(classifier).__name__)
    return f"{kind} {weights_digest(classifier)[:12]}"


def reconstruction(seen: Seen, measure: PerceptualDistance) -> list[Measure]:
    """How far reconstructions are from the images, beside how far the mean training image is."""
    mean = _mean_image(seen.train).to(seen.originals)
    found: list[dict[str, Tensor]] = []
    for rows in torch.split(torch.arange(len(seen.part), device=mean.device), BATCH):
        originals = seen.originals[rows]
        found += [
            _differences(seen.reconstructions[rows], originals, measure),
            _differences(mean.expand_as(originals), originals, measure),
        ]
    own, baseline = (
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for parts in (found[::2], found[1::2])
    )
    notes: dict[str, tuple[str, Callable[[float], float]]] = {
        "L1": ("mean absolute difference of the pixels", float),
        "L2": ("root mean square difference of the pixels", math.sqrt),
        "perceptual": (f"mean distance by {measure.name}", float),
    }
    return [
        Measure(
            f"reconstruction {name}",
            *_mean(own[name], scale),
            reference=scale(float(baseline[name].mean())),
            against="mean training image",
            samples=len(own[name]),
            note=note,
        )
        for name, (note, scale) in notes.items()
    ]


def round_trip(seen: Seen) -> list[Measure]:
    """What an exact manifold loses by rounding."""
    if not seen.manifold.exact:
        return []
    errors = (seen.reconstructions - seen.originals[: len(seen.part)]).abs()
    note = f"largest difference of a pixel, in {str(seen.dtype).removeprefix('torch.')}"
    return [Measure("round trip", float(errors.max()), samples=len(seen.part), note=note)]


def likelihood(seen: Seen) -> list[Measure]:
    """Bits per dimension, of manifolds with a density."""
    if not isinstance(seen.manifold, Likelihood):
        return []
    indices = seen.chosen.indices.to(seen.originals.device)
    parts = []
    for rows in seen.batches(len(seen.chosen), "likelihood"):
        rows = rows.to(indices.device)
        images = seen.originals[rows]
        parts.append(seen.manifold.bits_per_dimension(images, seen.seed, indices[rows]))
    bits = torch.cat(parts)
    return [
        Measure(
            "bits per dimension",
            *_mean(bits),
            reference=8.0,
            against="a byte as it is",
            samples=len(bits),
            note="bits that a value of a test image takes",
        )
    ]


def recognition(seen: Seen, classifier: nn.Module) -> list[Measure]:
    """How often a classifier sees the wanted class."""
    labels = seen.chosen.labels.to(seen.originals.device)

    def right(images: Tensor) -> Tensor:
        logits = _outputs(classifier, classifier, images)
        return logits.argmax(1) == labels[: len(images)]

    kinds = {"reconstructions": (seen.reconstructions, "of the image")}
    if knows_classes(seen.manifold, seen.test.num_classes):
        kinds["samples"] = seen.samples, "asked for"
    on_test = float(right(seen.originals).double().mean())
    return [
        Measure(
            f"accuracy on {name}",
            *_share(right(images)),
            reference=on_test,
            against="test images",
            samples=len(images),
            note=f"{name} in which the classifier sees the class {wanted}",
        )
        for name, (images, wanted) in kinds.items()
    ]


def frechet(seen: Seen, classifier: nn.Module) -> list[Measure]:
    """The distance of samples from test images, beside that of as many training images."""
    extract: Any = classifier.features
    count = min(len(seen.chosen), len(seen.train))
    training = seen.images_of(chosen_images(seen.train, count, seen.seed))
    real, test, samples = (
        _outputs(extract, classifier, images[:count]).flatten(1)
        for images in (training, seen.originals, seen.samples)
    )
    columns = test.shape[1]
    few = ", fewer than features" if count <= columns else ""
    return [
        Measure(
            "Fréchet distance",
            frechet_distance(samples, test),
            reference=frechet_distance(real, test),
            against="training images",
            samples=count,
            note=(
                f"of samples from test images, squared, on {columns} features of "
                f"{describe_classifier(classifier)}; {count} images each{few}: "
                "comparable at equal numbers only; not FID"
            ),
        )
    ]


def copies(seen: Seen) -> list[Measure]:
    """Whether samples come nearer to training images than new images do."""
    sampled, tested = seen.distances
    near = torch.from_numpy(sampled < np.quantile(tested, 0.01))
    return [
        *_distance_ratio(seen),
        Measure(
            "nearer than 1 % of test images",
            *_share(near),
            reference=0.01,
            against="test images",
            samples=len(near),
            note="samples nearer to a training image than all but the nearest hundredth of test images",
        ),
        _membership(seen),
    ]


def _membership(seen: Seen) -> Measure:
    """Whose nearest images samples are nearer to: equally many of either set, else the larger one wins."""
    count = min(len(seen.train), len(seen.test))
    train, test = (
        nearest_images(seen.samples, chosen_images(dataset, count, seen.seed))
        for dataset in (seen.train, seen.test)
    )
    nearer = train.distances < test.distances
    share = float(nearer.double().mean())
    # Few images are nearest to many samples. Were it chance which of the 2 count images are training images, each
    # would move the share by all of its samples at once.
    crowds = torch.where(nearer, train.positions, count + test.positions).bincount().double()
    half = _quantile() * float(crowds.norm()) / 2 / len(nearer)
    return Measure(
        "nearer to training images",
        share,
        max(share - half, 0.0),
        min(share + half, 1.0),
        reference=0.5,
        against="no copying",
        samples=len(nearer),
        note=f"samples nearer to one of {count} training images than to one of {count} test images",
    )


def _distance_ratio(seen: Seen) -> list[Measure]:
    sampled, tested = seen.distances
    if np.median(tested) == 0:
        return []  # Test images are training images.
    return [
        Measure(
            "distance to training images",
            float(np.median(sampled) / np.median(tested)),
            *_ratio_interval(sampled, tested, seen.seed),
            reference=1.0,
            against="test images",
            samples=len(sampled),
            note="median L2 distance to the nearest training image, of samples by that of test images",
        )
    ]


def latents(seen: Seen) -> list[Measure]:
    """How the codes of test images compare with codes that are drawn."""
    drawn = seen.drawn_moments
    count, unit = len(seen.codes), float(drawn.deviation.square().mean().sqrt())
    offset = float((seen.moments.mean - drawn.mean).square().mean().sqrt())
    return [
        *_outside(seen),
        Measure(
            "latent deviation",
            float(seen.moments.deviation.square().mean().sqrt()),
            reference=unit,
            against="draws",
            samples=count,
            note="standard deviation of a latent over test images, root mean square over the latents",
        ),
        Measure(
            "latent offset",
            offset / unit,
            reference=math.sqrt(1 / count + 1 / len(seen.drawn)),
            against="chance",
            samples=count,
            note="a latent's mean over test images less that over draws, in deviations, root mean square",
        ),
        Measure(
            "active latents",
            float((seen.moments.deviation > _ACTIVE * drawn.deviation).double().mean()),
            reference=1.0,
            against="draws",
            samples=count,
            note="latents whose deviation over test images is above a tenth of that over draws",
        ),
    ]


def _outside(seen: Seen) -> list[Measure]:
    box = seen.manifold.box
    if box is None:
        return []
    outside = (seen.codes[:, : seen.manifold.latent_size].abs() > box).any(1)
    return [
        Measure(
            "codes outside the box",
            *_share(outside),
            samples=len(outside),
            note=f"codes of test images with a latent beyond ±{box:g}",
        )
    ]


def _differences(
    images: Tensor, originals: Tensor, measure: PerceptualDistance
) -> dict[str, Tensor]:
    """Of each image (B,) float64; "L2" is squared still."""
    difference = (images - originals).flatten(1).double()
    return {
        "L1": difference.abs().mean(1),
        "L2": difference.square().mean(1),
        "perceptual": measure(images, originals).double(),
    }


def _mean_image(dataset: Dataset) -> Tensor:
    total = torch.zeros(dataset.image_shape, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(dataset)), BATCH):
        total += dataset.batch(rows, "cpu").images.double().sum(0)
    return total / len(dataset)


def _outputs(function: Callable[[Tensor], Tensor], network: nn.Module, images: Tensor) -> Tensor:
    """What a network's function gives for images, on their device; computed on the network's, in its precision."""
    place = device_of(network), dtype_of(network)
    parts = [function(part.to(*place)) for part in torch.split(images, BATCH)]
    return torch.cat(parts).to(images.device)


def _mean(values: Tensor, scale: Callable[[float], float] = float) -> tuple[float, float, float]:
    """Mean and the ends of its normal interval, cut at 0, all scaled."""
    wide = values.double()
    mean = float(wide.mean())
    half = _quantile() * float(wide.std()) / math.sqrt(len(wide))
    return scale(mean), scale(max(mean - half, 0.0)), scale(mean + half)


def _quantile() -> float:
    """How many deviations a normal interval reaches."""
    from scipy.special import ndtri

    return float(ndtri((1 + _CONFIDENCE) / 2))


def _share(hits: Tensor) -> tuple[float, float, float]:
    """Share and the ends of its Wilson interval."""
    from scipy.stats import binomtest

    found, count = int(hits.sum()), len(hits)
    low, high = binomtest(found, count).proportion_ci(_CONFIDENCE, method="wilson")
    return found / count, float(low), float(high)


def _ratio_interval(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], seed: int
) -> tuple[float, float]:
    """The percentile bootstrap interval of the ratio of two independent medians."""
    generator = np.random.default_rng(seed)
    medians = [
        np.median(values[generator.integers(len(values), size=(_RESAMPLES, len(values)))], axis=1)
        for values in (first, second)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.quantile(medians[0] / medians[1], [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(ends[0]), float(ends[1])
