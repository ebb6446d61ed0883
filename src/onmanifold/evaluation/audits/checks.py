"""What a check is, and what all checks judge by: shares and differences beyond the noise of a small sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from onmanifold.evaluation.audits.report import Finding, Verdict
from onmanifold.evaluation.audits.study import Bools, Study
from onmanifold.evaluation.statistics import compare_paired, wilson_interval

# Below this many samples a share is an anecdote, whatever the interval says.
_FEWEST = 3

Scope = Literal["model", "threat"]
Answer = tuple[Verdict, dict[str, float], str]
"""A verdict, the numbers, and the sentence."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its name in findings.
        scope: "model": it is about the model alone, and done once; "threat": done in each threat model.
        function: What does it.
    """

    name: str
    scope: Scope
    function: Callable[[Study], Answer]

    def __call__(self, study: Study) -> Finding:
        """Do it."""
        verdict, numbers, sentence = self.function(study)
        return Finding(
            self.name, verdict, numbers, sentence, study.label if self.scope == "threat" else ""
        )


def check(name: str, scope: Scope = "threat") -> Callable[[Callable[[Study], Answer]], Check]:
    """Decorator that makes a function a check."""
    return lambda function: Check(name, scope, function)


def skipped(reason: str) -> Answer:
    """The answer of a check that does not apply."""
    return "not applicable", {}, reason


def verdict_of(alarm: bool) -> Verdict:
    """The verdict of a check that was done."""
    return "alarm" if alarm else "ok"


def surely_above(hits: Bools, share: float) -> bool:
    """Whether the share of hits (M,) is above a threshold, beyond the noise of a small sample."""
    count = int(hits.sum())
    return count >= _FEWEST and wilson_interval(count, len(hits)).low > share


def surely_below(hits: Bools, share: float) -> bool:
    """Whether the share of hits (M,) is below a threshold, beyond the noise of a small sample."""
    return surely_above(~hits, 1 - share)


def surely_more(first: Bools, second: Bools, by: float) -> bool:
    """Whether ``first`` (M,) holds more often than ``second``, by more than a share and beyond the noise."""
    if int((first & ~second).sum()) < _FEWEST:
        return False
    return compare_paired(first, second).low > by


def percent(share: float) -> str:
    """A share in [0, 1] as text.

    >>> percent(0.123)
    '12.3 %'
    """
    return f"{100 * share:.1f} %"
