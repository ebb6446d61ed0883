"""How a model fares on corrupted images: the fifteen corruptions at five severities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import nn

from onmanifold.data.corruptions import CORRUPTIONS, SEVERITIES, check_corruption, corrupted
from onmanifold.evaluation.ledger import STANDARD, Evaluation
from onmanifold.evaluation.progress import Report, shown
from onmanifold.evaluation.runner import evaluate
from onmanifold.evaluation.statistics import Estimate, Interval, mean_interval
from onmanifold.foundation.errors import InputError

if TYPE_CHECKING:
    from onmanifold.data.dataset import Dataset


@dataclass(frozen=True)
class CorruptionResult:
    """Accuracies of a model on clean and on corrupted images of the same samples.

    Attributes:
        clean: On the images as they are.
        evaluations: By corruption and severity; every corruption has the same severities.
    """

    clean: Evaluation
    evaluations: Mapping[tuple[str, int], Evaluation]

    def __repr__(self) -> str:
        return (
            f"CorruptionResult({len(self.clean)} samples: clean {100 * self.clean.accuracy():.1f} %, "
            f"mean over {len(self.evaluations)} settings {100 * self.mean_accuracy:.1f} %)"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The corruptions, in the order in which they were run."""
        return tuple(dict.fromkeys(name for name, _ in self.evaluations))

    @property
    def severities(self) -> tuple[int, ...]:
        """The severities, in the order in which they were run."""
        return tuple(dict.fromkeys(severity for _, severity in self.evaluations))

    def accuracy(self, name: str | None = None, severity: int | None = None) -> float:
        """Accuracy in [0, 1], the mean over all corruptions or severities that are left out.

        Raises:
            InputError: Such a setting was not evaluated.
        """
        return float(np.mean([part.accuracy() for part in self._chosen(name, severity)]))

    @property
    def mean_accuracy(self) -> float:
        """Mean over all corruptions and severities, in [0, 1]."""
        return self.accuracy()

    def mean_error(self, baseline: CorruptionResult | None = None) -> float:
        """The mean corruption error (Hendrycks and Dietterich, section 4.2).

        Args:
            baseline: Of the model to compare with, over the same settings; AlexNet in the paper. The errors of
                each corruption, summed over severities, are divided by those of the baseline. None: they are
                not, as is usual on CIFAR-10-C, and the result is 1 − `mean_accuracy`.

        Raises:
            InputError: The baseline has other settings, or makes no error on a corruption.
        """
        if baseline is None:
            return 1 - self.mean_accuracy
        if set(baseline.evaluations) != set(self.evaluations):
            raise InputError("baseline: expected the same corruptions and severities.")
        theirs = {name: 1 - baseline.accuracy(name) for name in self.names}
        faultless = [name for name, error in theirs.items() if error == 0]
        if faultless:
            raise InputError(
                f"baseline: it makes no error on {faultless[0]}; nothing to divide by."
            )
        return float(np.mean([(1 - self.accuracy(name)) / theirs[name] for name in self.names]))

    def interval(self, name: str, severity: int, confidence: float = 0.95) -> Interval:
        """Wilson's interval of one setting's accuracy."""
        (part,) = self._chosen(name, severity)
        return part.interval(STANDARD, confidence)

    def mean_interval(
        self, name: str | None = None, severity: int | None = None, confidence: float = 0.95
    ) -> Estimate:
        """A mean accuracy as `accuracy` gives it, with Student's interval over the samples.

        The settings share their samples, so that they are no independent trials: each sample counts once, with
        the share of the settings in which it is right.
        """
        right = np.mean([part.correct() for part in self._chosen(name, severity)], axis=0)
        return mean_interval(right, confidence)

    def table(self) -> pd.DataFrame:
        """Accuracies in [0, 1]: a row per corruption and their mean, a column per severity and their mean."""
        rows = [*self.names, None]
        columns = [*self.severities, None]
        values = [[self.accuracy(name, severity) for severity in columns] for name in rows]
        return pd.DataFrame(
            values,
            index=pd.Index([*self.names, "mean"], name="corruption"),
            columns=pd.Index([*self.severities, "mean"], name="severity"),
        )

    def to_pandas(self, confidence: float = 0.95) -> pd.DataFrame:
        """A row per setting, the clean images first with severity 0.

        Columns: corruption, severity, n, accuracy, low and high (Wilson).
        """
        settings = {("clean", 0): self.clean, **self.evaluations}
        rows = []
        for (name, severity), part in settings.items():
            low, high = part.interval(STANDARD, confidence)
            rows.append((name, severity, len(part), part.accuracy(), low, high))
        return pd.DataFrame(
            rows, columns=["corruption", "severity", "n", "accuracy", "low", "high"]
        )

    def _chosen(self, name: str | None, severity: int | None) -> list[Evaluation]:
        chosen = [
            part
            for (its_name, its_severity), part in self.evaluations.items()
            if name in (None, its_name) and severity in (None, its_severity)
        ]
        if not chosen:
            raise InputError(
                f"name, severity: {name!r} at {severity!r} was not evaluated, only "
                f"{', '.join(self.names)} at {', '.join(map(str, self.severities))}."
            )
        return chosen


def evaluate_corruptions(
    model: nn.Module,
    dataset: Dataset,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 256,
    seed: int = 0,
    *,
    directory: str | Path | None = None,
    progress: bool | Report = False,
) -> CorruptionResult:
    """Accuracy of a model under corruptions of a dataset's images (Hendrycks and Dietterich, ICLR 2019).

    Images are corrupted batch by batch, as they are needed. With a ``directory`` finished batches are kept and
    not computed again; see `evaluate`.

    Args:
        model: Images (B, C, H, W) in [0, 1] to logits (B, K); it is left as it was.
        dataset: Clean images, of 1 or 3 channels and of at least 16 pixels a side.
        names: Of `CORRUPTIONS`; None: all fifteen.
        severities: Of 1 to 5.
        batch_size: Samples per batch.
        seed: Of all that is random in the corruptions.
        directory: Where to keep finished batches and ledgers, in a folder per setting; None: nowhere.
        progress: True: a bar per corruption on standard error; or a function (name, samples done, all samples),
            called after each batch. The clean images are called "clean".

    Raises:
        InputError: Unknown or repeated names or severities, or anything that `evaluate` or `corrupt` refuses.
        DataError: The disk is full or cannot be written; finished batches are kept.
    """
    names, severities = _checked(names, severities)
    root = None if directory is None else Path(directory)
    count = len(dataset)

    def run(data: Dataset, folder: str, row: str, before: int, total: int) -> Evaluation:
        return evaluate(
            model,
            data,
            {},
            batch_size,
            seed,
            directory=None if root is None else root / folder,
            progress=lambda _, done, __: report(row, before + done, total),
        )

    evaluations = {}
    # A row of the progress report has the samples of all its severities.
    with shown(progress, ["clean", *names], len(severities) * count) as report:
        clean = run(dataset, "clean", "clean", 0, count)
        for name in names:
            for number, severity in enumerate(severities):
                evaluations[name, severity] = run(
                    corrupted(dataset, name, severity, seed),
                    f"{name}-{severity}",
                    name,
                    number * count,
                    len(severities) * count,
                )
    return CorruptionResult(clean, evaluations)


def _checked(
    names: Sequence[str] | None, severities: Sequence[int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if isinstance(names, str):
        raise InputError(f"names: expected several names, such as [{names!r}], found one string.")
    chosen = CORRUPTIONS if names is None else tuple(names)
    if isinstance(severities, int):
        raise InputError(
            f"severities: expected several, such as [{severities}], found one integer."
        )
    levels = tuple(severities)
    for label, values in (("names", chosen), ("severities", levels)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{label}: expected at least one, none of them twice, found {values}.")
    for name in chosen:
        for severity in levels:
            check_corruption(name, severity)
    return chosen, levels
