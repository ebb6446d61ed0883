"""What attacks do to a model on a dataset: a ledger with a row per sample and attack, and its statistics."""

from onmanifold.evaluation.audits import Audit, Finding, audit
from onmanifold.evaluation.corruptions import CorruptionResult, evaluate_corruptions
from onmanifold.evaluation.curve import BudgetCurve, budget_curve
from onmanifold.evaluation.defence_evaluation import evaluate_defence
from onmanifold.evaluation.defence_imt import IMT
from onmanifold.evaluation.defence_projection import ManifoldProjection
from onmanifold.evaluation.defence_result import DefenceEvaluation
from onmanifold.evaluation.defences import BPDA, Defence, Differentiable, Unrolled, inner_gradient
from onmanifold.evaluation.ledger import STANDARD, WORST_CASE, Evaluation
from onmanifold.evaluation.overfitting import Overfitting, robust_overfitting
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
    "BPDA",
    "IMT",
    "STANDARD",
    "WORST_CASE",
    "Audit",
    "BudgetCurve",
    "CorruptionResult",
    "Defence",
    "DefenceEvaluation",
    "Differentiable",
    "Estimate",
    "Evaluation",
    "Finding",
    "Interval",
    "ManifoldProjection",
    "Overfitting",
    "PairedComparison",
    "Transfer",
    "Unrolled",
    "audit",
    "budget_curve",
    "compare_paired",
    "evaluate",
    "evaluate_corruptions",
    "evaluate_defence",
    "inner_gradient",
    "mean_interval",
    "model_digest",
    "recheck",
    "robust_overfitting",
    "transfer",
    "uar",
    "unseen_attacks",
    "verdict",
    "wilson_interval",
]
