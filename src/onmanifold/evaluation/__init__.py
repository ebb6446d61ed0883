"""What attacks do to a model on a dataset: a ledger with a row per sample and attack, and its statistics."""

from onmanifold.evaluation.corruptions import CorruptionResult, evaluate_corruptions
from onmanifold.evaluation.curve import BudgetCurve, budget_curve
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
from onmanifold.evaluation.transfer import transfer
from onmanifold.evaluation.transferred import Transfer
from onmanifold.evaluation.unseen import uar, unseen_attacks

__all__ = [
    "STANDARD",
    "WORST_CASE",
    "BudgetCurve",
    "CorruptionResult",
    "Estimate",
    "Evaluation",
    "Interval",
    "PairedComparison",
    "Transfer",
    "budget_curve",
    "compare_paired",
    "evaluate",
    "evaluate_corruptions",
    "mean_interval",
    "model_digest",
    "recheck",
    "transfer",
    "uar",
    "unseen_attacks",
    "verdict",
    "wilson_interval",
]
