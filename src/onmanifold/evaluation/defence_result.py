"""What is read from the evaluation of a test-time defence: its worst case beside that of its static model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from onmanifold.evaluation.ledger import STANDARD, WORST_CASE, Evaluation
from onmanifold.evaluation.statistics import PairedComparison, wilson_interval
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import nearest

WHITE_BOX = "white box"
"""Protocol: the static model under attacks on itself."""
BLACK_BOX = "black box"
"""Protocol: attacks that ask for outputs only."""
TRANSFER = "transfer from static"
"""Protocol: images made for the static model, then shown to the defence."""

Verdict = Literal["better", "not better", "worse"]


class Cost(NamedTuple):
    """What an inference costs.

    Attributes:
        passes: Forward passes of the static classifier for each image.
        time: Relative to the static classifier, measured on this machine.
    """

    passes: float
    time: float


@dataclass(frozen=True)
class DefenceEvaluation:
    """What attacks do to a defence, and to its static model.

    Attributes:
        static: The static classifier under attacks on itself.
        defence: One ledger of the defence: attacks are named ``"<attack>, <protocol>"``. Clean predictions are,
            for random defences, the most frequent ones.
        protocols: Names in ``defence`` by protocol: "transfer from static", "differentiable", "BPDA", "BPDA with
            <surrogate>", "unrolled", "black box".
        left_out: What could not be done, and why.
        cost: Of an inference.
        random: Whether the defence gives other logits each time.
    """

    static: Evaluation
    defence: Evaluation
    protocols: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, str]
    cost: Cost
    random: bool

    def accuracy(self, protocol: str = WORST_CASE) -> float:
        """Share of samples on which the defence withstands all attacks of a protocol, in [0, 1].

        Args:
            protocol: One of ``protocols``, "standard" or "worst case".

        Raises:
            InputError: Unknown protocol.
        """
        return float(self.correct(protocol).mean())

    def correct(self, protocol: str = WORST_CASE) -> npt.NDArray[np.bool_]:
        """The same sample by sample, (N,) bool."""
        if protocol in (STANDARD, WORST_CASE):
            return self.defence.correct(protocol)
        if protocol not in self.protocols:
            known = [STANDARD, WORST_CASE, *self.protocols]
            raise InputError(f"protocol: unknown {protocol!r}.{nearest(protocol, known)}")
        return _withstood(self.defence, self.protocols[protocol])

    def comparison(self, confidence: float = 0.95) -> PairedComparison:
        """Worst case of the defence minus that of the static model, on the same samples."""
        return self.defence.compare(self.static, WORST_CASE, confidence=confidence)

    @property
    def verdict(self) -> Verdict:
        """Whether the defence's worst case is better than the static model's, beyond chance (95 %)."""
        comparison = self.comparison()
        return "better" if comparison.low > 0 else "worse" if comparison.high < 0 else "not better"

    def missed(self) -> int:
        """Samples broken by black box or transferred images but by no attack through the defence.

        Many of them say that the gradients through the defence mislead, and that its worst case is lower still.
        """
        ways = [
            self.correct(name)
            for name in self.protocols
            if name != BLACK_BOX and not name.startswith("transfer from ")
        ]
        through = np.logical_and.reduce([self.correct(STANDARD), *ways])
        return int((through & ~self.correct(WORST_CASE)).sum())

    def summary(self) -> str:
        """The verdict with its numbers, in plain sentences."""
        own, alone = _percent(self.correct()), _percent(self.static.correct(WORST_CASE))
        comparison = self.comparison()
        points = [100 * value for value in (comparison.difference, comparison.low, comparison.high)]
        sentences = [
            f"Worst case with the defence: {own}; of its static model alone: {alone}.",
            f"Under these attacks it is {self.verdict} than its static model: {points[0]:+.1f} points "
            f"({points[1]:+.1f} to {points[2]:+.1f}) on {comparison.samples} samples.",
            f"Under images made for the static model it scores {_percent(self.correct(TRANSFER))}.",
            f"An inference costs {self.cost.passes:.3g} forward pass(es) of the static model and "
            f"{self.cost.time:.3g} times its time.",
        ]
        if self.missed():
            sentences.append(
                f"{self.missed()} samples fell to transferred or black-box images alone: the worst "
                "case may well be lower."
            )
        return " ".join(sentences)

    def table(self, confidence: float = 0.95) -> pd.DataFrame:
        """A row per model, protocol and attack, and per protocol with several attacks their worst case.

        Columns: n, accuracy, low and high (Wilson), and the mean numbers of forward and backward passes.
        """
        frames = [
            _rows("static", self.static, self._static_protocols(), confidence),
            _rows("defence", self.defence, self.protocols, confidence),
        ]
        return pd.concat(frames)

    def _static_protocols(self) -> dict[str, tuple[str, ...]]:
        """The static model's attacks by protocol."""
        black = {name.removesuffix(f", {BLACK_BOX}") for name in self.protocols.get(BLACK_BOX, ())}
        names = self.static.names
        return {
            WHITE_BOX: tuple(name for name in names if name not in black),
            BLACK_BOX: tuple(name for name in names if name in black),
        }

    def __repr__(self) -> str:
        return f"DefenceEvaluation({self.summary()})"


def _withstood(evaluation: Evaluation, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    right: npt.NDArray[np.bool_] = np.logical_and.reduce(
        [evaluation.correct(STANDARD), *(evaluation.correct(name) for name in names)]
    )
    return right


def _rows(
    model: str,
    evaluation: Evaluation,
    protocols: Mapping[str, tuple[str, ...]],
    confidence: float,
) -> pd.DataFrame:
    """A model's part of the table."""
    passes = evaluation.to_pandas().groupby("attack")[["forwards", "backwards"]].mean()
    rows = {(model, "clean", ""): _row(evaluation.correct(STANDARD), confidence)}
    for protocol, names in protocols.items():
        for name in names:
            row = _row(evaluation.correct(name), confidence)
            row |= {kind: float(passes[kind][name]) for kind in ("forwards", "backwards")}
            rows[model, protocol, name.removesuffix(f", {protocol}")] = row
        if len(names) > 1:
            row = _row(_withstood(evaluation, names), confidence)
            rows[model, protocol, "all of these"] = row
    rows[model, WORST_CASE, ""] = _row(evaluation.correct(WORST_CASE), confidence)
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(rows, names=["model", "protocol", "attack"])
    return frame


def _row(correct: npt.NDArray[np.bool_], confidence: float) -> dict[str, float]:
    low, high = wilson_interval(int(correct.sum()), len(correct), confidence)
    return {"n": len(correct), "accuracy": float(correct.mean()), "low": low, "high": high}


def _percent(correct: npt.NDArray[np.bool_]) -> str:
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return f"{100 * correct.mean():.1f} % ({100 * low:.1f} to {100 * high:.1f})"
