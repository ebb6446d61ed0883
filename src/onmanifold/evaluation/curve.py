"""Accuracy against the radius of a threat model: each sample's smallest radius at which an attack breaks it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from onmanifold.attacks import RandomPerturbation
from onmanifold.attacks.base import Attack
from onmanifold.evaluation.ledger import (
    METADATA,
    SIZE,
    STANDARD,
    Evaluation,
    read_table,
    write_table,
)
from onmanifold.evaluation.progress import Report, shown
from onmanifold.evaluation.runner import check_arguments, evaluate
from onmanifold.evaluation.shards import LEDGER
from onmanifold.evaluation.statistics import Interval, wilson_interval
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.threats import JointBall
from onmanifold.threats.base import Threat

if TYPE_CHECKING:
    from onmanifold.data.dataset import Dataset

BREAKING = "breaking_radius"
_ATTACK = "attack"
_IDENTITY = ["sample", "label", "clean_prediction"]
_OUTCOME = ["adversarial_prediction", "found_by", "objective"]
_COUNTS = ["forwards", "backwards"]


class BudgetCurve:
    """Which samples withstand an attack up to which radius.

    A sample that is broken at a radius counts as broken at every larger one, since the smaller change is still
    allowed there; so accuracy never rises with the radius. A sample stands where the attack's image is classified
    correctly; unlike in `Evaluation` the clean image plays no part, which matters only where attacks start from
    something else, such as a reconstruction.

    Attributes:
        ledger: A pyarrow table, a row per sample: sample, label, clean_prediction; breaking_radius, the smallest
            tested radius at which the attack broke it (0: what the attack starts from is already misclassified;
            inf: none did); adversarial_prediction, found_by, objective and a column ``size_<variable>`` per
            variable, at that radius, or at the largest where none did; forwards and backwards, spent at all radii.
        radii: The tested radii in increasing order, 0 the first.
        samples: (N,) sample numbers.
        breaking_radius: (N,) as in the ledger.
    """

    def __init__(self, ledger: pa.Table, radii: Sequence[float]) -> None:
        self.ledger = ledger
        self.radii = tuple(radii)
        self.samples: npt.NDArray[np.int64] = ledger["sample"].to_numpy()
        self.breaking_radius: npt.NDArray[np.float64] = ledger[BREAKING].to_numpy()

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __repr__(self) -> str:
        shares = ", ".join(
            f"{radius:g}: {100 * self.accuracy(radius):.1f} %" for radius in self.radii
        )
        return f"BudgetCurve({len(self)} samples: {shares})"

    @property
    def provenance(self) -> dict[str, Any]:
        """What produced the curve: radii, and for each the dataset, model, seed and attack."""
        stored: dict[str, Any] = json.loads(
            (self.ledger.schema.metadata or {}).get(METADATA, b"{}")
        )
        return stored

    @property
    def clean_accuracy(self) -> float:
        """Accuracy on the dataset's images, in [0, 1]; see `accuracy` at 0 for what attacks start from."""
        right = self.ledger["clean_prediction"].to_numpy() == self.ledger["label"].to_numpy()
        return float(right.mean())

    @property
    def mean_radius(self) -> float:
        """Mean breaking radius; samples that withstand all radii count with the largest."""
        return float(np.minimum(self.breaking_radius, self.radii[-1]).mean())

    @property
    def median_radius(self) -> float:
        """The smallest tested radius at which at most half of the samples are right; inf where more always are."""
        return float(np.sort(self.breaking_radius)[(len(self) - 1) // 2])

    def correct(self, radius: float) -> npt.NDArray[np.bool_]:
        """Which samples withstand the attack at a radius and all smaller ones, (N,) bool.

        Raises:
            InputError: The radius was not tested; between two radii accuracy is not known.
        """
        tested = next((r for r in self.radii if math.isclose(r, radius, rel_tol=1e-6)), None)
        if tested is None:
            known = ", ".join(f"{r:g}" for r in self.radii)
            raise InputError(f"radius: expected one that was tested ({known}), found {radius}.")
        return self.breaking_radius > tested

    def accuracy(self, radius: float) -> float:
        """Share of samples that withstand the attack at a tested radius, in [0, 1]."""
        return float(self.correct(radius).mean())

    def interval(self, radius: float, confidence: float = 0.95) -> Interval:
        """Wilson's interval of the accuracy at a tested radius."""
        right = self.correct(radius)
        return wilson_interval(int(right.sum()), len(right), confidence)

    def table(self, confidence: float = 0.95) -> pd.DataFrame:
        """A row per radius; columns: n, accuracy, low and high (Wilson), broken: samples broken at it first."""
        rows = []
        for radius in self.radii:
            broken = int((self.breaking_radius == radius).sum())
            interval = self.interval(radius, confidence)
            rows.append((len(self), self.accuracy(radius), *interval, broken))
        return pd.DataFrame(
            rows,
            index=pd.Index(self.radii, name="radius"),
            columns=["n", "accuracy", "low", "high", "broken"],
        )

    def to_pandas(self) -> pd.DataFrame:
        """The ledger as a data frame, a row per sample."""
        frame: pd.DataFrame = self.ledger.to_pandas()
        return frame

    def save(self, path: str | Path) -> Path:
        """Write the ledger as one Parquet file, atomically."""
        return write_table(path, self.ledger)

    @classmethod
    def load(cls, path: str | Path) -> BudgetCurve:
        """Read a ledger that `save` wrote.

        Raises:
            DataError: The file is missing, truncated, or no ledger of a curve.
        """
        table = read_table(path)
        if BREAKING not in table.column_names:
            raise DataError(
                f"{path} is no ledger of a budget curve: it has no column {BREAKING!r}."
            )
        facts = json.loads((table.schema.metadata or {})[METADATA])
        return cls(table, facts["radii"])


def budget_curve(
    model: nn.Module,
    dataset: Dataset,
    attack: Attack | Callable[[float], Attack],
    radii: Sequence[float],
    batch_size: int = 256,
    seed: int = 0,
    *,
    directory: str | Path | None = None,
    progress: bool | Report = False,
) -> BudgetCurve:
    """Accuracy against radius, from one search per radius on the samples that withstood all smaller ones.

    Every other sample gets at each radius what an evaluation at that radius alone would give it: the same
    starts, from ``seed`` and its index. With a ``directory`` each finished batch is kept as by `evaluate`; a call
    that was stopped at any moment goes on where it stopped, and larger radii may be added later.

    Radius 0 always comes first. It is no attack: it asks whether the model is right on what the attack starts
    from, which on a manifold without exact codes is the reconstruction.

    Args:
        model: Images (B, C, H, W) in [0, 1] to logits (B, K); it is left as it was.
        dataset: What to attack.
        attack: One whose threat model has a ``radius``, which is replaced, or is a `JointBall`, whose two radii
            are multiplied by each of ``radii``; or a function from a radius to an attack. A step size that is
            given as a number stays the same at all radii: use a function where it should grow.
        radii: Increasing, in the threat model's units.
        batch_size: Samples per batch; only one batch at a time is on the device.
        seed: Of all that is random in the attack.
        directory: Where to keep finished batches, ledgers and the curve; None: nowhere.
        progress: True: a bar per radius on standard error; or a function (radius as text, samples done, all
            samples), called after each batch; samples that are broken before count as done.

    Raises:
        InputError: Radii that do not increase, an attack without a radius, or anything that `evaluate` refuses.
        DataError: The disk is full or cannot be written; finished batches are kept.
    """
    check_arguments(
        model, dataset, cast("Any", {_ATTACK: attack}), batch_size, directory, save_images=False
    )
    steps = _steps(attack, radii)
    root = None if directory is None else Path(directory)
    standing = torch.arange(len(dataset))
    frames, facts = [], []
    with shown(progress, [_name(radius) for radius, _ in steps], len(dataset)) as report:
        for radius, member in steps:
            if not len(standing):
                break
            evaluation = evaluate(
                model,
                dataset if len(standing) == len(dataset) else dataset.subset(standing),
                {_ATTACK: member},
                batch_size,
                seed,
                directory=None if root is None else root / f"radius-{radius!r}",
                progress=_told(report, _name(radius), len(dataset)),
            )
            frame = _outcome(evaluation, radius, standing)
            frames.append(frame)
            facts.append({"radius": radius, **evaluation.provenance})
            standing = standing[torch.from_numpy(np.isinf(frame[BREAKING].to_numpy()))]
    tested = [radius for radius, _ in steps]
    curve = BudgetCurve(_ledger(frames, {"radii": tested, "evaluations": facts}), tested)
    if root is not None:
        curve.save(root / LEDGER)
    return curve


def _name(radius: float) -> str:
    return f"radius {radius:.4g}"


def _told(report: Report, name: str, count: int) -> Report:
    """The samples that are not attacked any more are done; the clean predictions are no part of the work."""

    def tell(task: str, done: int, total: int) -> None:
        if task != STANDARD:
            report(name, count - total + done, count)

    return tell


def _outcome(evaluation: Evaluation, radius: float, standing: torch.Tensor) -> pd.DataFrame:
    """The rows of the samples that were attacked at a radius, by their positions in the dataset."""
    frame = evaluation.to_pandas().set_index(standing.numpy())
    broken = frame["adversarial_prediction"] != frame["label"]
    frame[BREAKING] = np.where(broken, radius, np.inf)
    return frame


def _ledger(frames: list[pd.DataFrame], facts: dict[str, Any]) -> pa.Table:
    """Each sample's last row, with the passes of all."""
    rows = pd.concat(frames)
    last = rows[~rows.index.duplicated(keep="last")].sort_index()
    last[_COUNTS] = rows.groupby(level=0)[_COUNTS].sum().astype("int64")
    sizes = [name for name in last.columns if name.startswith(SIZE)]
    columns = [*_IDENTITY, BREAKING, *_OUTCOME, *sizes, *_COUNTS]
    arrays = {
        name: pa.array(last[name], pa.string() if name == "found_by" else None, from_pandas=True)
        for name in columns
    }
    return pa.table(arrays).replace_schema_metadata({METADATA: json.dumps(facts)})


def _steps(
    attack: Attack | Callable[[float], Attack], radii: Sequence[float]
) -> list[tuple[float, Attack]]:
    """Radii and attacks; radius 0 first, where nothing is searched."""
    made = [(radius, _at(attack, radius)) for radius in [0.0, *_checked(radii)]]
    start = RandomPerturbation(made[0][1].threat, start="zero")
    return [(0.0, start), *made[1:]]


def _checked(radii: Sequence[float]) -> list[float]:
    """The radii above 0."""
    try:
        numbers = [float(radius) for radius in radii]
    except (TypeError, ValueError):
        raise InputError(f"radii: expected increasing numbers >= 0, found {radii!r}.") from None
    rising = all(low < high for low, high in pairwise(numbers))
    if not numbers or not rising or not all(0 <= number < math.inf for number in numbers):
        raise InputError(f"radii: expected increasing numbers >= 0, found {radii!r}.")
    return [number for number in numbers if number > 0]


def _at(attack: Attack | Callable[[float], Attack], radius: float) -> Attack:
    if not isinstance(attack, Attack):
        made = attack(radius)
        if not isinstance(made, Attack):
            raise InputError(
                f"attack: the function gave {made!r} for radius {radius:g}, expected an attack."
            )
        return made
    return replace(attack, threat=_resized(attack.threat, radius))


def _resized(threat: Threat, radius: float) -> Threat:
    if isinstance(threat, JointBall):
        image = replace(threat.image, radius=radius * threat.image.radius)
        latent = replace(threat.latent, radius=radius * threat.latent.radius)
        return replace(threat, image=image, latent=latent)
    if not hasattr(threat, "radius"):
        raise InputError(
            f"attack: its threat model {type(threat).__name__} has no radius; expected one that has, or a "
            "function from a radius to an attack."
        )
    return cast("Threat", replace(cast("Any", threat), radius=radius))
