"""How good a manifold is, in one report: `measure_quality`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from onmanifold.analysis import quality_measures as figures
from onmanifold.analysis.quality_images import Seen, chosen_images
from onmanifold.analysis.quality_measures import Measure, describe_classifier
from onmanifold.attacks.engine import full_float32, untouched
from onmanifold.data.dataset import Dataset
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.foundation.files import read_json, write_atomically
from onmanifold.foundation.registry import nearest
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.perceptual import PerceptualDistance, perceptual_distance


@dataclass(frozen=True)
class Quality:
    """What was measured of a manifold.

    Attributes:
        measures: One after the other.
        series: Numbers behind them, by name: "sample_distances" and "test_distances" to the nearest training
            image; mean and deviation of each latent over test codes and over draws, "code_mean",
            "code_deviation", "draw_mean" and "draw_deviation".
        facts: What was measured on what: manifold, datasets, classifier, perceptual distance, seed.
    """

    measures: tuple[Measure, ...]
    series: Mapping[str, tuple[float, ...]]
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Measure:
        """The measure of that name.

        Raises:
            InputError: There is none; the message shows the nearest.
        """
        found = {measure.name: measure for measure in self.measures}
        if name not in found:
            raise InputError(f"name: unknown measure {name!r}.{nearest(str(name), found)}")
        return found[name]

    def __contains__(self, name: object) -> bool:
        return any(measure.name == name for measure in self.measures)

    def to_pandas(self) -> pd.DataFrame:
        """A row per measure, by name: value, low, high, reference, ratio, against, samples, note."""
        rows = [asdict(measure) | {"ratio": measure.ratio} for measure in self.measures]
        order = ["value", "low", "high", "reference", "ratio", "against", "samples", "note"]
        return pd.DataFrame(rows, columns=["name", *order]).set_index("name")

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON, from which `from_json` makes it again; with a path also written there, atomically.

        Numbers that are not finite are null.
        """
        whole = {
            "facts": dict(self.facts),
            "measures": [asdict(measure) for measure in self.measures],
            "series": {name: list(values) for name, values in self.series.items()},
        }
        text = json.dumps(_without_infinities(whole), indent=1) + "\n"
        if path is not None:
            write_atomically(path, text.encode())
        return text

    @staticmethod
    def from_json(path: str | Path) -> Quality:
        """Read the file that `to_json` wrote; a value that is null is NaN.

        Raises:
            DataError: It is missing, truncated or foreign.
        """
        found = read_json(path)
        try:
            measures = tuple(
                Measure(**entry | {"value": _or_nan(entry["value"])}) for entry in found["measures"]
            )
            series = {
                str(name): tuple(_or_nan(value) for value in values)
                for name, values in found["series"].items()
            }
            return Quality(measures, series, dict(found["facts"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} holds no quality of a manifold ({error}).") from None


def measure_quality(
    manifold: Manifold,
    train: Dataset,
    test: Dataset,
    *,
    classifier: nn.Module | None = None,
    perceptual: PerceptualDistance | None = None,
    count: int = 1000,
    encoded: int | None = None,
    stored_codes: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Quality:
    """Measure how well a manifold reconstructs test images, how its samples compare with them, and its codes.

    Manifold and classifier are left as they were. Samples are of the classes of the test images. Which figures
    there are depends on what the manifold offers: bits per dimension where it has a density, the round trip where
    it is exact, accuracy on samples where it knows classes; and without a classifier neither accuracies nor a
    Fréchet distance. docs/concepts/quality.md says what each of them means, and what not.

    Args:
        manifold: Any; the work is done on its device, in its precision.
        train: What it was fitted to.
        test: Images that it has not seen.
        classifier: One for these images, with `features`, best one trained on ``train``; None: none.
        perceptual: How reconstructions are compared; None: the best that can be had, see `perceptual_distance`.
        count: Test images and samples, at most; which ones depends on the seed.
        encoded: Test images that are reconstructed, at most; None: all of them. For encoders that search.
        stored_codes: Whether ``test.codes`` are codes of this manifold, to take in place of encoding.
        seed: Of samples, of the choice of images, and of what is random in encoding.
        progress: Whether to show progress bars on standard error.

    Raises:
        InputError: Something does not fit together, or there are too few images.
    """
    for name, number in (("count", count), ("encoded", count if encoded is None else encoded)):
        if number < 2:
            raise InputError(f"{name}: expected at least 2, found {number}.")
    _check(manifold, train, test, classifier, stored_codes)
    networks = nn.ModuleList([manifold] if classifier is None else [manifold, classifier])
    with untouched(networks, seed), full_float32(), torch.no_grad():
        measure = perceptual or perceptual_distance(
            "auto", classifier=classifier, image_shape=manifold.image_shape
        )
        chosen = chosen_images(test, count, seed)
        part = chosen.take(len(chosen) if encoded is None else encoded)
        seen = Seen(manifold, train, test, chosen, part, stored_codes, seed, progress)
        parts = [
            figures.reconstruction(seen, measure),
            figures.round_trip(seen),
            figures.likelihood(seen),
            [] if classifier is None else figures.recognition(seen, classifier),
            [] if classifier is None else figures.frechet(seen, classifier),
            figures.copies(seen),
            figures.latents(seen),
        ]
        facts = _facts(seen, classifier, measure)
        series = _series(seen)
    return Quality(tuple(entry for entries in parts for entry in entries), series, facts)


def _series(seen: Seen) -> dict[str, tuple[float, ...]]:
    columns: dict[str, Any] = {
        "sample_distances": seen.distances.samples,
        "test_distances": seen.distances.tests,
        "code_mean": seen.moments.mean,
        "code_deviation": seen.moments.deviation,
        "draw_mean": seen.drawn_moments.mean,
        "draw_deviation": seen.drawn_moments.deviation,
    }
    # Six digits are enough to draw.
    return {
        name: tuple(float(f"{value:.6g}") for value in values.tolist())
        for name, values in columns.items()
    }


def _facts(seen: Seen, classifier: nn.Module | None, measure: PerceptualDistance) -> dict[str, Any]:
    return {
        "manifold": seen.manifold.name,
        "fingerprint": seen.manifold.fingerprint,
        "exact": seen.manifold.exact,
        "train": {"name": seen.train.name, "fingerprint": seen.train.fingerprint}
        | {"images": len(seen.train)},
        "test": {"name": seen.test.name, "fingerprint": seen.test.fingerprint}
        | {"images": len(seen.test)},
        "samples": len(seen.chosen),
        "encoded": len(seen.part),
        "stored_codes": seen.stored_codes,
        "classifier": None if classifier is None else describe_classifier(classifier),
        "perceptual": measure.fingerprint,
        "seed": seen.seed,
    }


def _check(
    manifold: Manifold,
    train: Dataset,
    test: Dataset,
    classifier: nn.Module | None,
    stored_codes: bool,
) -> None:
    for name, dataset in (("train", train), ("test", test)):
        if dataset.image_shape != manifold.image_shape:
            raise InputError(
                f"{name}: expected images {manifold.image_shape} as the manifold makes, "
                f"found {dataset.image_shape}."
            )
        if len(dataset) < 2:
            raise InputError(f"{name}: expected at least 2 images, found {len(dataset)}.")
    classes = getattr(manifold, "num_classes", test.num_classes)
    if classes < test.num_classes:
        raise InputError(
            f"test: expected at most {classes} classes as the manifold has, found {test.num_classes}."
        )
    if classifier is not None and not callable(getattr(classifier, "features", None)):
        raise InputError(
            "classifier: expected one with a method `features`, as `build_classifier` makes, "
            f"found {type(classifier).__name__}."
        )
    if stored_codes:
        if test.codes is None:
            raise InputError("stored_codes: the test images have no codes.")
        manifold.check_codes(test.codes, len(test))


def _without_infinities(value: object) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_nan(value: object) -> float:
    return math.nan if value is None else float(value)  # type: ignore[arg-type]
