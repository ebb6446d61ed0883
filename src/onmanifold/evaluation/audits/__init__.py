"""The self-audit: does the evidence for a robust accuracy hold?"""

from onmanifold.evaluation.audits.report import Audit, Finding
from onmanifold.evaluation.audits.run import audit
from onmanifold.evaluation.audits.study import Budget

__all__ = ["Audit", "Budget", "Finding", "audit"]
