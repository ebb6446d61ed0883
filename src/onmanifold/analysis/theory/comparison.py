"""Every closed form of the theory beside its numeric counterpart, on one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from onmanifold.analysis.theory import finite, perturbation, risk, saddle
from onmanifold.analysis.theory.agreement import Form, Row, bounded, row, sampled
from onmanifold.analysis.theory.model import (
    STRATEGIES,
    Array,
    LinearModel,
    Source,
    Space,
    estimate,
    posterior_eigenvalues_as_printed,
    sample_source,
    source_covariance,
    source_eigenvalues,
)

# Multipliers between which a risk's order is read off, and what that may be off at finite ones.
_FAR = (1e3, 1e4)
_ORDER_TOLERANCE = 0.01
# Points that are perturbed by ascent.
_ASCENDED = 64


@dataclass(frozen=True)
class Setting:
    """What is compared.

    Attributes:
        model: Data and generator.
        multiplier: L of the latent attack, above 1.
        image_multiplier: L of the attack in image space.
        radius: Length, or root mean square length, of perturbations where L is solved from it.
        samples: Of each Monte Carlo estimate, at least 2.
        fitted: Points in the sample of the theorems on finite samples.
        seed: Of all that is drawn.
    """

    model: LinearModel
    multiplier: float = 4.0
    image_multiplier: float = 100.0
    radius: float = 0.5
    samples: int = 20_000
    fitted: int = 100
    seed: int = 0

    def multiplier_in(self, space: Space) -> float:
        """L of a space."""
        return self.multiplier if space == "latent" else self.image_multiplier


def compare(setting: Setting) -> pd.DataFrame:
    """Closed forms beside numbers: a row for each quantity and strategy, of the worst entry where it has many.

    Columns: quantity, theorem, form ("printed": as the paper has it; "corrected"; "added": not in the paper),
    strategy, closed form, numeric, difference, standard error (0: deterministic), tolerance and agrees.
    Monte Carlo rows allow 4 standard errors, see `agreement.ALLOWED_ERRORS`.
    """
    lemmas = (*_lemma_1(setting), *_lemma_2(setting))
    risks = (*_theorem_2(setting), *_corollary_3(setting), *_theorem_4(setting))
    saddles = (*_theorem_5(setting), *_theorem_6(setting))
    samples = (*_theorem_8(setting), *_theorem_9(setting))
    return pd.DataFrame([*lemmas, *risks, *saddles, *samples])


def _diagonal(model: LinearModel, covariance: Array) -> Array:
    """The whole matrix in the eigenvectors' coordinates: what is off the diagonal has to be zero."""
    return np.asarray(model.basis.T @ covariance @ model.basis)


def _lemma_1(setting: Setting) -> Iterator[Row]:
    model, flat = setting.model, setting.model.flattened()
    for strategy in STRATEGIES:
        closed = source_eigenvalues(model, strategy)
        exact = _diagonal(model, source_covariance(model, strategy))
        yield row(
            "covariance of x', by matrices", "Lemma 1", "printed", strategy, np.diag(closed), exact
        )
        points = sample_source(model, strategy, setting.samples, setting.seed)
        squares = model.coordinates(points) ** 2
        found = [estimate(column) for column in squares.T]
        yield row(
            "variance of x', sampled",
            "Lemma 1",
            "printed",
            strategy,
            closed,
            [one.value for one in found],
            [one.standard_error for one in found],
        )
        exact = _diagonal(flat, source_covariance(flat, strategy))
        yield row(
            "covariance of x', data of rank q",
            "Lemma 1",
            "printed",
            strategy,
            np.diag(flat.eigenvalues),
            exact,
        )
    if model.eigenvalues[model.latent_size - 1] > 0:
        yield row(
            "Λ⁽²⁾ is Λ⁽³⁾",
            "Lemma 1",
            "added",
            "posterior",
            posterior_eigenvalues_as_printed(model),
            source_eigenvalues(model, "prior"),
        )


def _lemma_2(setting: Setting) -> Iterator[Row]:
    model, radius = setting.model, setting.radius
    cases: list[tuple[Space, Source]] = [("latent", strategy) for strategy in STRATEGIES]
    for space, source in [*cases, ("image", "data")]:
        multiplier, where = setting.multiplier_in(space), _where(space, source)
        if not multiplier > perturbation.least_multiplier(model, space):
            continue
        points = sample_source(model, source, min(setting.samples, _ASCENDED), setting.seed)
        closed = perturbation.worst_perturbation(model, points, space, multiplier)
        found = perturbation.ascend(model, points, space, multiplier)
        yield row("worst perturbation, by ascent", "Lemma 2", "printed", where, closed, found)
        closed = perturbation.worst_within(model, points, space, radius).perturbations
        found = perturbation.ascend_within(model, points, space, radius)
        yield row(
            f"worst perturbation of length {radius:g}, by ascent",
            "Lemma 2",
            "added",
            where,
            closed,
            found,
        )
        points = sample_source(model, source, setting.samples, setting.seed)
        multiplier = perturbation.multiplier_of_radius(model, space, radius, source)
        moves = perturbation.worst_perturbation(model, points, space, multiplier)
        yield sampled(
            "mean square length with L solved from it",
            "eq. 8",
            "added",
            where,
            radius**2,
            estimate((moves**2).sum(1)),
        )


def _where(space: Space, source: Source) -> str:
    return source if space == "latent" else "image"


def _theorem_2(setting: Setting) -> Iterator[Row]:
    model, drawn = setting.model, (setting.samples, setting.seed)
    for strategy in STRATEGIES:
        yield sampled(
            "excess risk by perturbation",
            "Theorem 2",
            "printed",
            strategy,
            risk.perturbation_risk(model, "latent", setting.multiplier, strategy),
            risk.sampled_perturbation_risk(model, "latent", setting.multiplier, strategy, *drawn),
        )
        yield sampled(
            "the same less the penalty",
            "Theorem 2",
            "added",
            strategy,
            risk.penalised_risk(model, "latent", setting.multiplier, strategy),
            risk.sampled_penalised_risk(model, "latent", setting.multiplier, strategy, *drawn),
        )
    for strategy in STRATEGIES:
        found = risk.sampled_distribution_risk(model, strategy, *drawn)
        quantity = "excess risk by change of distribution"
        closed = risk.distribution_risk_as_printed(model, strategy)
        yield sampled(quantity, "Theorem 2", "printed", strategy, closed, found)
        closed = risk.distribution_risk(model, strategy)
        yield sampled(quantity, "Theorem 2", "corrected", strategy, closed, found)


def _corollary_3(setting: Setting) -> Iterator[Row]:
    flat, drawn = setting.model.flattened(), (setting.samples, setting.seed)
    size, radius = flat.rank, setting.radius
    for strategy in STRATEGIES:
        yield sampled(
            "excess risk, data of rank q",
            "Corollary 3",
            "printed",
            strategy,
            risk.rank_risk(size, setting.multiplier),
            risk.sampled_perturbation_risk(flat, "latent", setting.multiplier, strategy, *drawn),
        )
    first, second = (
        risk.sampled_perturbation_risk(flat, "latent", far, "prior", *drawn).value for far in _FAR
    )
    order = np.log(first / second) / np.log(_FAR[1] / _FAR[0])
    yield from _orders(
        "excess risk falls as L to the power of minus", "Corollary 3", "prior", order
    )
    yield sampled(
        f"excess risk, data of rank q, each length {radius:g}",
        "Corollary 3",
        "added",
        "prior",
        risk.rank_risk_at_radius(size, radius),
        risk.sampled_risk_within(flat, "latent", radius, "prior", *drawn),
    )


def _orders(quantity: str, theorem: str, strategy: str, found: float) -> Iterator[Row]:
    """The paper's order 2 and the derived order 1 of a risk in 1 / L."""
    orders: dict[Form, float] = {"printed": 2.0, "corrected": 1.0}
    for form, order in orders.items():
        yield row(quantity, theorem, form, strategy, order, found, tolerance=_ORDER_TOLERANCE)


def _theorem_4(setting: Setting) -> Iterator[Row]:
    model, drawn = setting.model, (setting.samples, setting.seed)
    multiplier = setting.image_multiplier
    closed = risk.perturbation_risk(model, "image", multiplier, "data")
    found = risk.sampled_perturbation_risk(model, "image", multiplier, "data", *drawn)
    yield sampled("excess risk", "Theorem 4", "printed", "image", closed, found)
    flat = model.flattened()
    if flat.eigenvalues[-1] == 0:
        yield sampled(
            "excess risk, λ_min = 0",
            "Theorem 4",
            "printed",
            "image",
            risk.perturbation_risk(flat, "image", multiplier, "data"),
            risk.sampled_risk_within(flat, "image", setting.radius, "data", *drawn),
        )
    least = float(model.eigenvalues[-1])
    if least == 0:
        return
    bounds = risk.image_risk_bounds(model, multiplier)
    quantity = "excess risk, at least f(λ_min L)"
    yield bounded(quantity, "Theorem 4", "corrected", "image", bounds.low, found, at_least=True)
    quantity = "excess risk, at most d f(λ_min L)"
    yield bounded(quantity, "Theorem 4", "corrected", "image", bounds.high, found, at_least=False)
    first, second = (
        risk.sampled_perturbation_risk(model, "image", far / least, "data", *drawn).value
        for far in _FAR
    )
    order = np.log(first / second) / np.log(_FAR[1] / _FAR[0])
    quantity = "excess risk falls as λ_min L to the power of minus"
    yield from _orders(quantity, "Theorem 4", "image", order)


def _theorem_5(setting: Setting) -> Iterator[Row]:
    for strategy in STRATEGIES:
        yield from _saddles(setting, "latent", strategy, "Theorem 5")
    flat = setting.model.flattened()
    trained = saddle.train_adversarially(flat, "latent", setting.multiplier, "prior").covariance
    ratios = np.diag(_diagonal(flat, trained))[: flat.rank] / flat.eigenvalues[: flat.rank]
    closed = np.full(flat.rank, saddle.saddle_ratio(setting.multiplier))
    yield row("λ_ls / λ, data of rank q", "Theorem 5", "printed", "prior", closed, ratios)


def _theorem_6(setting: Setting) -> Iterator[Row]:
    yield from _saddles(setting, "image", "data", "Theorem 6")
    variance, radius = float(setting.model.eigenvalues[0]), setting.radius
    found = saddle.sampled_line_saddle_within(variance, radius, setting.samples, setting.seed)
    quantity = "λ_r in one dimension, every move of the same length (eq. 4)"
    closed = saddle.line_saddle_on_average(variance, radius)
    yield sampled(quantity, "Theorem 6", "printed", "image", closed, found)
    closed = saddle.line_saddle_within(variance, radius)
    yield sampled(quantity, "Theorem 6", "corrected", "image", closed, found)


def _saddles(setting: Setting, space: Space, source: Source, theorem: str) -> Iterator[Row]:
    model, multiplier, where = (
        setting.model,
        setting.multiplier_in(space),
        _where(space, source),
    )
    closed = saddle.saddle_eigenvalues(model, space, multiplier, source)
    trained = saddle.train_adversarially(model, space, multiplier, source).covariance
    yield row(
        "covariance by attack and refit in turn",
        theorem,
        "printed",
        where,
        np.diag(closed),
        _diagonal(model, trained),
    )
    found = saddle.minimise_adversarial_loss(model, space, multiplier, source)
    yield row("eigenvalues by nested searches", theorem, "printed", where, closed, found)
    if ((model.gains(space) > 0) & (source_eigenvalues(model, source) == 0)).any():
        return  # Part of the length goes where points have no variance, which no numbers show.
    multiplier = saddle.saddle_multiplier(model, space, setting.radius, source)
    trained = saddle.train_adversarially(model, space, multiplier, source).covariance
    yield row(
        "mean square length with L solved from it, at the saddle point",
        "eq. 8",
        "added",
        where,
        setting.radius**2,
        _mean_square(model, space, multiplier, source, trained),
    )


def _mean_square(
    model: LinearModel, space: Space, multiplier: float, source: Source, covariance: Array
) -> float:
    """E|M (x − mean)|² of the worst M against a covariance, by matrices."""
    move, points = model.mover(space), source_covariance(model, source)
    precision = np.linalg.pinv(covariance, rcond=1e-9, hermitian=True)
    inner = multiplier * np.eye(move.shape[1]) - move.T @ precision @ move
    best = np.linalg.pinv(inner, rcond=1e-9, hermitian=True) @ move.T @ precision
    return float(np.trace(best @ points @ best.T))


def _fit(setting: Setting, model: LinearModel) -> tuple[Array, LinearModel]:
    points = model.sample(setting.fitted, setting.seed, stream="fitted")
    return points, finite.fit_linear_model(points, min(model.latent_size, model.rank))


def _theorem_8(setting: Setting) -> Iterator[Row]:
    points, fitted = _fit(setting, setting.model)
    if fitted.noise_variance == 0 or fitted.rank < fitted.dimensions:
        return  # The loss has no minimum.
    generated = setting.fitted
    closed = finite.augmented_eigenvalues(fitted, len(points), generated)
    found = finite.train_augmented(points, fitted, generated)
    yield row(
        "covariance by descent on eq. 13",
        "Theorem 8",
        "printed",
        "prior",
        np.diag(closed),
        _diagonal(fitted, found.covariance),
    )
    yield row("mean by descent on eq. 13", "Theorem 8", "printed", "prior", fitted.mean, found.mean)


def _theorem_9(setting: Setting) -> Iterator[Row]:
    for title, model in (("", setting.model), (", data of rank q", setting.model.flattened())):
        _, fitted = _fit(setting, model)
        for strategy in STRATEGIES:
            closed = saddle.saddle_eigenvalues(fitted, "latent", setting.multiplier, strategy)
            # Whether what is encoded are the fitted points, or new ones from the data's distribution.
            shift = model.mean - fitted.mean
            new = model.covariance + np.outer(shift, shift)
            for kind, data in (("fitted", None), ("new", new)):
                if strategy == "prior" and kind == "new":
                    continue
                form: Form = "printed" if strategy == "prior" or title else "added"
                trained = saddle.train_adversarially(
                    fitted,
                    "latent",
                    setting.multiplier,
                    strategy,
                    source_covariance(fitted, strategy, data),
                ).covariance
                points = "no points" if strategy == "prior" else f"the {kind} points"
                yield row(
                    f"covariance of a fit, encoding {points}{title}",
                    "Theorem 9",
                    form,
                    strategy,
                    np.diag(closed),
                    _diagonal(fitted, trained),
                )
