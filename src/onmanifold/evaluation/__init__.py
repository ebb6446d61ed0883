"""What attacks do to a model on a dataset: a ledger with a row per sample and attack, and its statistics."""

from onmanifold.evaluation.ledger import STANDARD, WORST_CASE, Evaluation
from onmanifold.evaluation.recheck import recheck
from onmanifold.evaluation.runner import evaluate
from onmanifold.evaluation.shards import model_digest
from onmanifold.evaluation.statistics import (
    Estimate,
    Interval,
    PairedComparison,
    compare_paired,
    mean_interval,
    verdict,
    wilson_interval,
)

__all__ = [
    "STANDARD",
    "WORST_CASE",
    "Estimate",
    "Evaluation",
    "Interval",
    "PairedComparison",
    "compare_paired",
    "evaluate",
    "mean_interval",
    "model_digest",
    "recheck",
    "verdict",
    "wilson_interval",
]
