"""Whether a closed form and its numeric counterpart agree: rows of the theory's table."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from onmanifold.analysis.theory.model import Estimate

Form = Literal["printed", "corrected", "added"]
"""Of a formula: as the paper has it, corrected, or not in the paper."""

TOLERANCE = 1e-6
"""Allowed between a closed form and a deterministic number, relative to the closed form where that is above 1."""

ALLOWED_ERRORS = 4.0
"""Allowed between a closed form and a mean over samples, in standard errors.

A page has about thirty such rows: by three errors one page of thirteen would be off by chance, by four one of 500.
"""

Row = dict[str, object]
"""A row of the table, by column."""


def row(
    quantity: str,
    theorem: str,
    form: Form,
    strategy: str,
    closed: ArrayLike,
    numeric: ArrayLike,
    errors: ArrayLike | None = None,
    tolerance: float = TOLERANCE,
) -> Row:
    """The entry of the largest difference beside what is allowed.

    Args:
        quantity: What it is.
        theorem: Where the closed form stands.
        form: Whether as it stands there.
        strategy: Where points come from.
        closed: Closed forms, of any shape.
        numeric: Numbers, of as many entries.
        errors: Standard errors; None: the numbers are deterministic.
        tolerance: Allowed where they are.
    """
    wanted, found = np.ravel(closed).astype(float), np.ravel(numeric).astype(float)
    deviations = np.zeros_like(found) if errors is None else np.ravel(errors).astype(float)
    has_errors = errors is not None
    with np.errstate(invalid="ignore"):  # Of two infinities the difference is 0.
        differences = np.where(wanted == found, 0.0, found - wanted)
    # A sampled zero has no error, but rounding.
    allowed = np.where(
        has_errors & np.isfinite(deviations),
        ALLOWED_ERRORS * np.nan_to_num(deviations),
        tolerance * np.maximum(1.0, np.abs(np.where(np.isfinite(wanted), wanted, 0.0))),
    )
    allowed = np.maximum(allowed, 1e-12)
    worst = int(np.argmax(np.abs(differences) / allowed))
    name = f"{quantity}, worst of {len(wanted)}" if len(wanted) > 1 else quantity
    return {
        "quantity": name,
        "theorem": theorem,
        "form": form,
        "strategy": strategy,
        "closed form": float(wanted[worst]),
        "numeric": float(found[worst]),
        "difference": float(differences[worst]),
        "standard error": float(np.nan_to_num(deviations[worst])),
        "tolerance": float(allowed[worst]),
        "agrees": bool(np.abs(differences[worst]) <= allowed[worst]),
    }


def sampled(
    quantity: str, theorem: str, form: Form, strategy: str, closed: float, found: Estimate
) -> Row:
    """A closed form beside a mean over samples."""
    return row(quantity, theorem, form, strategy, closed, found.value, found.standard_error)


def bounded(
    quantity: str,
    theorem: str,
    form: Form,
    strategy: str,
    bound: float,
    found: Estimate,
    at_least: bool,
) -> Row:
    """A bound beside a mean over samples; the difference is what is beyond the bound, 0 if nothing is."""
    found_row = sampled(quantity, theorem, form, strategy, bound, found)
    if (found.value >= bound) == at_least or found.value == bound:
        found_row |= {"difference": 0.0, "agrees": True}
    return found_row
