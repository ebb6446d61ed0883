"""How manifolds are learned: for each, which losses its players take in turn."""

from onmanifold.training.fits.base import ClosedForm, Fit, FitStep

__all__ = ["ClosedForm", "Fit", "FitStep"]
