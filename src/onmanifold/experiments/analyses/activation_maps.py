"""Where classifiers see the class, and how far that moves under attack (IJSAT, figures 5 and 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onmanifold.analysis.activation_maps import (
    activation_maps,
    agreement,
    last_convolution,
    share_inside,
)
from onmanifold.attacks import Attack
from onmanifold.classifiers import load_classifier
from onmanifold.data.dataset import Batch
from onmanifold.evaluation.statistics import mean_interval, verdict
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.setup import Setup, chosen_attacks
from onmanifold.experiments.summary import Trained
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import nearest
from onmanifold.reports.drawings.activation_maps import MapExamples, draw_maps, draw_movement

OTHER_IMAGE = "another image"
"""In place of an attack: the clean maps of two images, as far apart as a classifier's maps come by chance."""
_CLEAN = ""
_SOURCE = "IJSAT, section 6.6 and appendix E, figures 5 and 9"


@ANALYSES.register("activation_maps")
@dataclass(frozen=True)
class ActivationMaps(Analysis):
    """Grad-CAM on clean and on attacked test images, for an experiment's classifiers, and what the two share.

    The papers show maps; here a number stands beside them: how much the map under attack has in common with
    that of the clean image, as cosine and as rank correlation over places, at the layer's own resolution.

    Attributes:
        attacks: Which of the experiment's attacks; None: all.
        methods: Which of the experiment's methods; None: all.
        baseline: The method that the others are compared with; None: the first.
        images: Number of test images.
        shown: Number of images in the figure.
        layer: Name of the layer whose maps are taken; None: the last convolution's features.
        explained: Whose evidence the maps show: that of the image's own class ("label"), so that clean and
            attacked maps answer the same question, or of the class that the classifier sees ("prediction").
        foreground: Pixels of the clean image above this value, in the mean over channels, are the object, on
            data whose background is black: the table then says which share of each map lies there, beside the
            share of the image that the object takes, which a map that is the same everywhere would reach. An
            attack that moves the object is judged by where it was. None: nothing is said about the object.
        batch_size: Images at once.
        seed: Of the attacks.
    """

    needs_experiment: ClassVar[bool] = True

    attacks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    baseline: str | None = None
    images: int = 200
    shown: int = 4
    layer: str | None = None
    explained: Literal["label", "prediction"] = "label"
    foreground: float | None = None
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least(images=2, shown=1, batch_size=1)
        self._not_empty("methods", "attacks")
        if self.foreground is not None and not 0 <= self.foreground < 1:
            raise ConfigError(f"foreground: expected a number in [0, 1), found {self.foreground}.")

    def run(self, place: Workplace) -> Findings:
        setup = place.experiment.setup
        attacks = chosen_attacks(setup.attacks, self.attacks)
        jobs = place.trained(self.methods)
        methods = list(dict.fromkeys(job.method for job in jobs))
        baseline = self.baseline or methods[0]
        if baseline not in methods:
            raise ConfigError(f"baseline: unknown method {baseline!r}.{nearest(baseline, methods)}")
        looks = []
        for job in jobs:
            place.say(f"{job.method}, seed {job.seed}: maps under {', '.join(attacks) or 'none'} …")
            looks.append(self._look(setup, job, attacks, place.experiment.fabric.device))
        samples = pd.concat([look.samples for look in looks], ignore_index=True)
        summary = _summary(samples)
        drawings = {
            "maps": Drawing(
                draw_maps(self._examples(setup, jobs, looks)),
                "Class activation maps",
                "Grad-CAM over test images, clean and under each attack: bright is where the features speak for "
                f"{'the class of the image' if self.explained == 'label' else 'the class that is seen'}. Each map "
                f"has its own scale; the layer is {looks[0].layer}. Below: the class that the classifier sees, "
                "✗ where it is wrong.",
            ),
            "movement": Drawing(
                draw_movement(summary[summary.attack != "standard"]),
                "How far maps move",
                f"What the map under attack has in common with that of the clean image, mean over "
                f"{samples['sample'].nunique():,} test images with 95 % intervals. {OTHER_IMAGE.capitalize()}: "
                "the clean maps of two different images, which is what is in common by chance.",
            ),
        }
        statements = self._statements(samples, methods, baseline, list(attacks))
        return Findings({"movement": summary, "samples": samples}, drawings, statements, shown=12)

    def _look(
        self, setup: Setup, job: Trained, attacks: Mapping[str, Attack], device: torch.device
    ) -> _Look:
        model = load_classifier(job.classifier).to(device)
        count = min(self.images, len(setup.test))
        parts = [
            self._look_at(model, setup.test.batch(positions, device), attacks)
            for positions in torch.split(torch.arange(count), self.batch_size)
        ]
        frame = pd.concat([part.samples for part in parts], ignore_index=True)
        clean = torch.cat([part.small for part in parts])
        # Neighbours in the data set: of another class almost always, of another object always.
        other = agreement(clean, clean.roll(1, 0))
        by_chance = pd.DataFrame(
            {"sample": frame["sample"].unique(), "attack": OTHER_IMAGE, **other._asdict()}
        )
        frame = pd.concat([frame, by_chance], ignore_index=True)
        layer = (
            self.layer
            or last_convolution(model, setup.test.batch(torch.arange(1), device).images).name
        )
        frame.insert(0, "method", job.method)
        frame.insert(1, "seed", job.seed)
        shown = {
            key: {name: values[name] for name in (_CLEAN, *attacks)}
            for key, values in parts[0].shown.items()
        }
        return _Look(frame, clean, shown, layer)

    def _look_at(self, model: nn.Module, batch: Batch, attacks: Mapping[str, Attack]) -> _Look:
        shown: dict[str, dict[str, Tensor]] = {"images": {}, "maps": {}, "predictions": {}}
        inside = {}
        if self.foreground is not None:
            inside["mask"] = batch.images.mean(1) > self.foreground
        frames = []
        clean_maps = self._maps(model, batch.images, batch.labels)
        for name in (_CLEAN, *attacks):
            images, small = batch.images, clean_maps
            if name:
                images = attacks[name](
                    model,
                    batch.images,
                    batch.labels,
                    batch.codes,
                    seed=self.seed,
                    indices=batch.indices,
                ).images
                small = self._maps(model, images, batch.labels)
            large = _upsampled(small, images)
            with torch.no_grad():
                seen = model(images).argmax(1)
            columns: dict[str, Any] = {
                "sample": batch.indices.numpy(force=True),
                "attack": name or "standard",
                "right": (seen == batch.labels).numpy(force=True),
                **agreement(clean_maps, small)._asdict(),
            }
            if self.foreground is not None:
                columns["on_object"] = share_inside(large, inside["mask"])
                columns["object_area"] = inside["mask"].double().mean((1, 2)).numpy(force=True)
            frames.append(pd.DataFrame(columns))
            for key, values in (("images", images), ("maps", large), ("predictions", seen)):
                shown[key][name] = values.cpu()
        return _Look(pd.concat(frames, ignore_index=True), clean_maps.cpu(), shown)

    def _maps(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        classes = labels if self.explained == "label" else None
        return activation_maps(model, images, classes, self.layer, upsample=False)

    def _examples(self, setup: Setup, jobs: list[Trained], looks: list[_Look]) -> MapExamples:
        """Of the first seed: images of different classes that all methods see right when clean come first."""
        seed = jobs[0].seed
        first = {
            job.method: look for job, look in zip(jobs, looks, strict=True) if job.seed == seed
        }
        any_look = next(iter(first.values()))
        count = len(any_look.shown["images"][_CLEAN])
        batch = setup.test.batch(torch.arange(count), "cpu")
        right = torch.stack(
            [look.shown["predictions"][_CLEAN] == batch.labels for look in first.values()]
        ).all(0)
        chosen = _different(batch.labels, right)[: self.shown]
        names = setup.test.classes

        def of(key: str) -> dict[str, dict[str, NDArray[np.float32]]]:
            return {
                method: {
                    name: values[chosen].float().numpy() for name, values in look.shown[key].items()
                }
                for method, look in first.items()
            }

        predictions = {
            method: {
                name: [names[int(seen)] for seen in values[chosen]]
                for name, values in look.shown["predictions"].items()
            }
            for method, look in first.items()
        }
        labels = [names[int(label)] for label in batch.labels[chosen]]
        clean = batch.images[chosen].float().numpy()
        return MapExamples(clean, labels, of("images"), of("maps"), predictions)

    def _statements(
        self, samples: pd.DataFrame, methods: list[str], baseline: str, attacks: list[str]
    ) -> list[Statement]:
        statements = []
        for method in methods:
            if method == baseline:
                continue
            than = f"than those of {baseline}"
            statements += [
                _compared(
                    *(samples, method, baseline, attack, "cosine"),
                    f"Under {attack} the maps of {method} stay nearer to the clean ones {than}",
                )
                for attack in attacks
            ]
            if self.foreground is not None:
                text = f"On clean images the maps of {method} lie more on the object {than}"
                pair = (samples, method, baseline, "standard", "on_object")
                statements.append(_compared(*pair, text))
        return statements


@dataclass(frozen=True)
class _Look:
    """What was seen of a classifier.

    Attributes:
        samples: A row for each image and attack.
        small: (B, h, w) the maps of the clean images.
        shown: "images", "maps" and "predictions" by attack, of the first images.
        layer: Whose maps they are.
    """

    samples: pd.DataFrame
    small: Tensor
    shown: Mapping[str, Mapping[str, Tensor]]
    layer: str = ""


def _upsampled(maps: Tensor, images: Tensor) -> Tensor:
    size = (images.shape[2], images.shape[3])
    return nn.functional.interpolate(
        maps.unsqueeze(1), size, mode="bilinear", align_corners=False
    ).squeeze(1)


def _different(labels: Tensor, right: Tensor) -> Tensor:
    """Positions, one of each class first, and of images that are seen right before others."""
    order = torch.argsort((~right).int(), stable=True)
    counts: dict[int, int] = {}
    rank = torch.zeros_like(order)
    for place, position in enumerate(order.tolist()):
        label = int(labels[position])
        counts[label] = counts.get(label, 0) + 1
        rank[place] = counts[label]
    return order[torch.argsort(rank, stable=True)]


def _summary(samples: pd.DataFrame) -> pd.DataFrame:
    """Means with intervals for each method and attack: over seeds where there are several, else over images."""
    rows = []
    for (method, attack), part in samples.groupby(["method", "attack"], sort=False):
        row: dict[str, object] = {
            "method": method,
            "attack": attack,
            "images": part["sample"].nunique(),
            "accuracy": part["right"].astype(float).mean(),
        }
        for name in ("cosine", "rank", "on_object"):
            if name in part and part[name].notna().any():
                estimate = mean_interval(_values(part, name))
                row |= {
                    name: estimate.mean,
                    f"{name}_low": estimate.low,
                    f"{name}_high": estimate.high,
                }
        if "object_area" in part and part["object_area"].notna().any():
            row["object_area"] = part["object_area"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def _values(part: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A mean for each seed, or of one seed the values of its images."""
    values = part.dropna(subset=[column])
    if part["seed"].nunique() > 1:
        return values.groupby("seed")[column].mean().to_numpy(dtype=np.float64)
    return values[column].to_numpy(dtype=np.float64)


def _compared(
    samples: pd.DataFrame, method: str, baseline: str, attack: str, column: str, text: str
) -> Statement:
    """A method above the baseline, image by image, as far as both have a map."""
    part = samples[samples.attack == attack]
    one, other = (part[part.method == name] for name in (method, baseline))
    pairs = one.merge(other, on=["seed", "sample"])
    pairs = pairs.dropna(subset=[f"{column}_x", f"{column}_y"])
    words = {"cosine": "Cosine", "on_object": "Share on the object"}[column]
    if len(pairs) < 2:
        return Statement(text, "No images have maps of both.", "not measured", _SOURCE)
    pairs["excess"] = pairs[f"{column}_x"] - pairs[f"{column}_y"]
    estimate = mean_interval(_values(pairs, "excess"))
    over = f"{len(pairs):,} images" if pairs["seed"].nunique() == 1 else f"{estimate.runs} seeds"
    area = ""
    if column == "on_object":
        area = f" The object takes {pairs['object_area_x'].mean():.3f} of the image."
    numbers = (
        f"{words} {pairs[f'{column}_x'].mean():.3f} against {pairs[f'{column}_y'].mean():.3f}, difference "
        f"{estimate.mean:+.3f} (95 % interval over {over}: {estimate.low:+.3f} to {estimate.high:+.3f}).{area}"
    )
    return Statement(text, numbers, verdict(estimate.low, estimate.high), _SOURCE)
