"""Which eigenvalues of a class an attack lifts (Directions, section 5.1, figures 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from onmanifold.analysis.spectra import (
    VarianceComparison,
    class_directions,
    class_spectra,
    compare_variances,
)
from onmanifold.attacks import Attack
from onmanifold.classifiers import load_classifier
from onmanifold.data import Dataset
from onmanifold.evaluation.statistics import verdict
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import nearest
from onmanifold.reports.drawings.spectra import draw_all_spectra, draw_ratios, draw_spectra

_SOURCE = "Directions, section 5.1, figures 2 and 3"
Along = Literal["eigenvalues", "clean directions"]


class _Sets(NamedTuple):
    """Clean and attacked images, row by row: (N, C, H, W) on the CPU, and their labels (N,)."""

    clean: Tensor
    attacked: Mapping[str, Tensor]
    labels: Tensor


@ANALYSES.register("spectra")
@dataclass(frozen=True)
class Spectra(Analysis):
    """Spectra of the classes of clean, image-attacked and latent-attacked test images.

    Directions attacks two classifiers, each with what it was trained against, and reads from its figures that the
    attack in the image space lifts the small eigenvalues and that in the latent space the large ones. Here the
    ratios are measured, with bootstrap intervals, in two ways: eigenvalue by eigenvalue, as the paper does, which
    compares two bases and is biased with few images (see `onmanifold.analysis.spectra`); and as the variance along
    the principal directions of clean training images, which are the same for all sets and depend on none of the
    images measured.

    A latent attack starts from the reconstruction of an image, which has lost variance of its own before anything
    is attacked. With ``reconstruction`` the name of the same attack at radius 0, both are told apart.

    Attributes:
        image: Name of the experiment's attack in the image space.
        latent: That of the attack in the latent space.
        reconstruction: That of the latent attack at radius 0; None: not measured.
        image_method: On whose classifier the image attack is made; None: the experiment's first method.
        latent_method: The same for the latent attack and the reconstruction.
        leading: Number of eigenvalues that count as large.
        images: Number of test images; None: all.
        basis: Number of training images that the clean directions come from; None: all.
        draws: Bootstrap samples.
        shown: Number of classes in the large figure.
        batch_size: Images that are attacked at once.
        seed: Of the attacks and the bootstrap.
    """

    needs_experiment: ClassVar[bool] = True

    image: str = "PGD-40"
    latent: str = "VAE-FGSM"
    reconstruction: str | None = None
    image_method: str | None = None
    latent_method: str | None = None
    leading: int = 30
    images: int | None = None
    basis: int | None = None
    draws: int = 1000
    shown: int = 2
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least(leading=1, images=1, basis=1, draws=1, shown=1, batch_size=1)
        names = [self.image, self.latent, self.reconstruction]
        if len(set(names)) < len(names):
            raise ConfigError(f"latent: expected different attacks, found {names}.")

    def run(self, place: Workplace) -> Findings:
        setup = place.experiment.setup
        sets = self._sets(place)
        train = setup.train if self.basis is None else setup.train.take(self.basis)
        found = torch.unique(sets.labels)
        missing = set(found.tolist()) - set(train.labels.tolist())
        if missing:
            raise ConfigError(f"basis: expected training images of all classes, none of {missing}.")
        whole = train.batch(torch.isin(train.labels, found).nonzero().squeeze(1), "cpu")
        place.say(f"Directions of {len(whole.images):,} clean training images …")
        directions = class_directions(whole.images, whole.labels)
        measured: dict[tuple[str, Along], VarianceComparison] = {}
        options: dict[str, Any] = {
            "leading": self.leading,
            "draws": self.draws,
            "seed": self.seed,
        }
        for name, images in sets.attacked.items():
            place.say(f"Spectra under {name} …")
            pair = sets.clean, images, sets.labels
            measured[name, "eigenvalues"] = compare_variances(*pair, **options)
            measured[name, "clean directions"] = compare_variances(*pair, directions, **options)
        if self.reconstruction is not None:
            pair = sets.attacked[self.reconstruction], sets.attacked[self.latent], sets.labels
            after = f"{self.latent} after {self.reconstruction}"
            measured[after, "eigenvalues"] = compare_variances(*pair, **options)
            measured[after, "clean directions"] = compare_variances(*pair, directions, **options)
        classes = [setup.test.classes[int(label)] for label in found]
        tables = {
            "ratios": _ratio_table(measured, classes),
            "spectra": _spectra_table(sets, measured, classes),
        }
        return Findings(tables, self._draw(sets, measured, classes), self._judge(measured))

    def _sets(self, place: Workplace) -> _Sets:
        """The clean images, and each attack on the classifier that it is made for."""
        session = place.experiment
        setup, device = session.setup, session.fabric.device
        methods = list(setup.methods)
        image_method = self.image_method or methods[0]
        latent_method = self.latent_method or methods[0]
        wanted = {self.image: image_method, self.latent: latent_method}
        if self.reconstruction is not None:
            wanted[self.reconstruction] = latent_method
        for name in wanted:
            if name not in setup.attacks:
                raise ConfigError(f"Unknown attack {name!r}.{nearest(name, setup.attacks)}")
        jobs = place.trained(list(dict.fromkeys(wanted.values())), list(setup.experiment.seeds)[:1])
        files = {job.method: job.classifier for job in jobs}
        test = setup.test if self.images is None else setup.test.take(self.images)
        attacked = {}
        for name, method in wanted.items():
            place.say(f"{name} on {method}: {len(test):,} test images …")
            model = load_classifier(files[method]).to(device)
            attacked[name] = self._attacked(model, setup.attacks[name], test, device)
        clean = test.batch(torch.arange(len(test)), "cpu")
        return _Sets(clean.images, attacked, clean.labels)

    def _attacked(
        self, model: torch.nn.Module, attack: Attack, test: Dataset, device: torch.device
    ) -> Tensor:
        parts = []
        for positions in torch.split(torch.arange(len(test)), self.batch_size):
            images, labels, codes, indices = test.batch(positions, device)
            result = attack(model, images, labels, codes, seed=self.seed, indices=indices)
            parts.append(result.images.cpu())
        return torch.cat(parts)

    def _draw(
        self,
        sets: _Sets,
        measured: Mapping[tuple[str, Along], VarianceComparison],
        classes: Sequence[str],
    ) -> dict[str, Drawing]:
        spectra = {
            name: class_spectra(images, sets.labels).eigenvalues.numpy()
            for name, images in {"clean": sets.clean, **sets.attacked}.items()
        }
        count = len(sets.labels)
        few = {name: values[: self.shown] for name, values in spectra.items()}
        scale = (
            f"Covariances of each class over {count:,} test images. Of n images of a class no more than n - 1 "
            "eigenvalues are above 0; the others are not drawn."
        )
        ratios = {
            name: measured[name, "clean directions"].grouped.numpy() for name in sets.attacked
        }
        groups = measured[self.image, "clean directions"].groups.numpy()
        return {
            "spectra": Drawing(
                draw_spectra(few, classes[: self.shown], self.leading), "Eigenvalues", scale
            ),
            "classes": Drawing(
                draw_all_spectra(spectra, classes, self.leading),
                "Eigenvalues of all classes",
                scale,
            ),
            "directions": Drawing(
                draw_ratios(groups, ratios, self.leading),
                "Variance added along the clean data's own directions",
                "The variance of attacked test images over that of the clean ones, along the principal directions "
                "of clean training images, in groups of directions, of all classes together; bands are 95 % "
                f"bootstrap intervals over {count:,} test images.",
            ),
        }

    def _judge(self, measured: Mapping[tuple[str, Along], VarianceComparison]) -> list[Statement]:
        def said(text: str, name: str, part: str, sign: int) -> Statement:
            """That the eigenvalues of this part grow (1) or shrink (-1)."""
            by_value = measured[name, "eigenvalues"].ratios[part][-1].tolist()
            by_direction = measured[name, "clean directions"].ratios[part][-1].tolist()
            numbers = (
                f"sum of eigenvalues × {_shown(by_value)}; variance along clean directions × "
                f"{_shown(by_direction)}"
            )
            ends = sorted((sign * (by_value[1] - 1), sign * (by_value[2] - 1)))
            return Statement(text, numbers, verdict(*ends), _SOURCE)

        def more(text: str, name: str, sign: int) -> Statement:
            """That more variance is added in the small directions (1) or in the large ones (-1)."""
            added = measured[name, "clean directions"].added
            value, *ends = (sign * number for number in added["difference"][-1].tolist())
            parts = [100 * float(added[part][-1, 0]) for part in ("leading", "rest")]
            numbers = (
                f"added along the first {self.leading} clean directions {parts[0]:+.2f} %, along the rest "
                f"{parts[1]:+.2f} % of all variance before; difference "
                f"{_shown([100 * number for number in (value, *sorted(ends))])}"
            )
            return Statement(text, numbers, verdict(*sorted(ends)), _SOURCE)

        image, latent, first = self.image, self.latent, f"first {self.leading}"
        small = f"small eigenvalues (beyond the {first})"
        statements = [
            said(f"{image} lifts the {small}", image, "rest", 1),
            said(f"{image} lowers the large eigenvalues (the {first})", image, "leading", -1),
            said(f"{latent} lifts the large eigenvalues (the {first})", latent, "leading", 1),
            said(f"{latent} does not lift the {small}", latent, "rest", -1),
            more(f"{image} adds more variance in the clean data's small directions", image, 1),
            more(f"{latent} adds more variance in the clean data's large directions", latent, -1),
        ]
        if self.reconstruction is not None:
            name = f"{latent} after {self.reconstruction}"
            text = (
                f"{latent} lifts the large eigenvalues of the reconstructions that it starts from"
            )
            statements.append(said(text, name, "leading", 1))
            text = f"{latent} adds more to the reconstructions in the clean data's large directions"
            statements.append(more(text, name, -1))
        return statements


def _shown(interval: Sequence[float]) -> str:
    value, low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _ratio_table(
    measured: Mapping[tuple[str, Along], VarianceComparison], classes: Sequence[str]
) -> pd.DataFrame:
    """A row for each attack, way of measuring, part of the spectrum and class; all classes first."""
    rows = []
    for (name, along), found in measured.items():
        kinds = {"ratio": found.ratios, "added": found.added}
        for kind, parts in kinds.items():
            for part, intervals in parts.items():
                order = [len(classes), *range(len(classes))]
                for number in order:
                    value, low, high = intervals[number].tolist()
                    label = "all" if number == len(classes) else classes[number]
                    rows.append((name, along, kind, part, label, value, low, high))
    columns = ["attack", "along", "measure", "directions", "class", "value", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    # What is read first, all classes together, stands first.
    return table.sort_values("class", key=lambda names: names != "all", kind="stable")


def _spectra_table(
    sets: _Sets,
    measured: Mapping[tuple[str, Along], VarianceComparison],
    classes: Sequence[str],
) -> pd.DataFrame:
    """A row for each class and number: eigenvalues and variances along clean directions of each set."""
    first = next(iter(sets.attacked))
    columns: dict[str, Any] = {}
    for along in ("eigenvalues", "clean directions"):
        columns[f"clean, {along}"] = measured[first, along].clean.flatten().numpy()
        for name in sets.attacked:
            columns[f"{name}, {along}"] = measured[name, along].attacked.flatten().numpy()
    size = measured[first, "eigenvalues"].clean.shape[1]
    table = pd.DataFrame(columns)
    table.insert(0, "class", [name for name in classes for _ in range(size)])
    table.insert(1, "number", [number for _ in classes for number in range(1, size + 1)])
    return table
