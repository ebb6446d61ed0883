"""What an analysis is: it measures, says what it found, and draws it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from onmanifold.experiments.runner import Session, train_only
from onmanifold.experiments.summary import Trained
from onmanifold.foundation.errors import ConfigError, OnManifoldError
from onmanifold.foundation.registry import Component, Registry
from onmanifold.manifolds.base import Manifold
from onmanifold.reports.claims import Verdict

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ANALYSES: Registry[Analysis] = Registry("analysis", "onmanifold.experiments.analyses")


@dataclass(frozen=True)
class Drawing:
    """A figure with its words.

    Attributes:
        figure: Drawn in the style of `onmanifold.reports.figures`.
        title: Heading.
        caption: A sentence or two below it: what is seen, and on what scale it was measured.
    """

    figure: Figure
    title: str
    caption: str


@dataclass(frozen=True)
class Statement:
    """Something that was to be shown, and what the numbers say about it.

    Attributes:
        text: What was to be shown.
        numbers: What was measured, in words.
        verdict: "holds", "does not hold", "within noise" or "not measured".
        source: Where it was said.
    """

    text: str
    numbers: str
    verdict: Verdict
    source: str = ""


@dataclass(frozen=True)
class Findings:
    """All that an analysis found.

    Attributes:
        tables: Data, by name; each is shown, and kept as a CSV file.
        drawings: Figures, by name.
        statements: What was to be shown.
        shown: Rows of a table that are shown; the file has all.
    """

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    drawings: Mapping[str, Drawing] = field(default_factory=dict)
    statements: Sequence[Statement] = ()
    shown: int = 40


@dataclass(frozen=True)
class Workplace:
    """Where an analysis works.

    Attributes:
        out: Folder of its results, for what it keeps between calls.
        device: "auto", "cpu" or "cuda".
        say: Told in a line each what happens.
        bars: Whether to show progress bars.
        session: The experiment whose classifiers are looked at, opened; None: there is none.
    """

    out: Path
    device: str = "auto"
    say: Callable[[str], object] = lambda line: None
    bars: bool = False
    session: Session | None = None

    @property
    def experiment(self) -> Session:
        """The experiment's session.

        Raises:
            ConfigError: The analysis was given none.
        """
        if self.session is None:
            raise ConfigError("experiment: expected an experiment, whose classifiers are analysed.")
        return self.session

    @property
    def manifold(self) -> Manifold:
        """The experiment's manifold.

        Raises:
            ConfigError: It has none.
        """
        manifold = self.experiment.setup.manifold
        if manifold is None:
            raise ConfigError("experiment.manifold: expected a manifold, found none.")
        return manifold

    def trained(
        self, methods: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[Trained]:
        """The experiment's classifiers; those that are not trained yet are trained now.

        Args:
            methods: Which; None: all.
            seeds: Which of the experiment's; None: all.

        Raises:
            ConfigError: Unknown method, or a seed that the experiment does not have.
            OnManifoldError: A training failed.
        """
        own = self.experiment.setup.experiment.seeds
        for seed in seeds or ():
            if seed not in own:
                raise ConfigError(
                    f"analysis: expected seeds of the experiment, {list(own)}, found {seed}."
                )
        jobs = train_only(self.experiment, methods, seeds)
        for job in jobs:
            if job.error:
                raise OnManifoldError(f"{job.method}, seed {job.seed}: {job.error}")
        return jobs


class Analysis(Component, ABC):
    """A question to models, manifolds or theory. It holds its settings, and no state."""

    registry = ANALYSES
    needs_experiment: ClassVar[bool] = False

    def _at_least(self, **limits: int) -> None:
        """Raises ConfigError where a field is a number below its limit; None is none."""
        for name, limit in limits.items():
            found = getattr(self, name)
            if found is not None and found < limit:
                raise ConfigError(f"{name}: expected at least {limit}, found {found}.")

    def _not_empty(self, *names: str) -> None:
        """Raises ConfigError where a field is a selection of nothing; None, which selects all, is none."""
        for name in names:
            found = getattr(self, name)
            if found is not None and not found:
                raise ConfigError(f"{name}: expected at least one, found none.")

    @abstractmethod
    def run(self, place: Workplace) -> Findings:
        """Measure, judge and draw."""
