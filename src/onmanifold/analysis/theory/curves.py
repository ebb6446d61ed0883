"""The theory's curves, closed form beside Monte Carlo, as tables: what the figures show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from onmanifold.analysis.theory import risk, saddle, tsipras
from onmanifold.analysis.theory.comparison import Setting
from onmanifold.analysis.theory.model import (
    Array,
    Estimate,
    LinearModel,
    Source,
    Space,
    estimate,
    sample_source,
    source_eigenvalues,
)
from onmanifold.analysis.theory.perturbation import (
    least_multiplier,
    multiplier_of_radius,
    stretch,
    worst_perturbation,
    worst_within,
)


class Plane(NamedTuple):
    """A model of two dimensions, attacked and trained in one space (Directions figure 1).

    Attributes:
        space: Where perturbations are.
        radius: Their length; at the saddle point the root of their mean square length.
        data: (2, 2) covariance of the data.
        trained: (2, 2) covariance at the saddle point.
        points: (n, 2) on the ellipse of two standard deviations.
        moves: (n, 2) what the worst perturbation of each adds to it.
        reach: (m, 2) outline of what a perturbation can add.
    """

    space: Space
    radius: float
    data: Array
    trained: Array
    points: Array
    moves: Array
    reach: Array


def attack_plane(
    eigenvalues: tuple[float, float], radius: float, angle: float = 0.5, points: int = 12
) -> tuple[Plane, Plane]:
    """Image and latent attacks on a model of two dimensions with one latent.

    Args:
        eigenvalues: The larger one and the smaller one, both above 0; the smaller is the generator's noise.
        radius: Of perturbations: of the latent as it is, of the image in standard deviations of the smaller one.
        angle: Of the first eigenvector, in radians.
        points: On the ellipse.
    """
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    model = LinearModel(np.array(eigenvalues, dtype=float), 1, eigenvalues[1], turn, np.zeros(2))
    around = _circle(points)
    ellipse = 2 * (around * np.sqrt(model.eigenvalues)) @ turn.T
    planes = []
    cases: list[tuple[Space, Source, float]] = [
        ("image", "data", radius * float(np.sqrt(eigenvalues[1]))),
        ("latent", "prior", radius),
    ]
    for space, source, length in cases:
        move = model.mover(space)
        found = worst_within(model, ellipse, space, length).perturbations
        edge = length * (_circle(64) if space == "image" else np.array([[-1.0], [1.0]]))
        multiplier = saddle.saddle_multiplier(model, space, length, source)
        trained = saddle.saddle_eigenvalues(model, space, multiplier, source)
        planes.append(
            Plane(
                space,
                length,
                model.covariance,
                (turn * trained) @ turn.T,
                ellipse,
                found @ move.T,
                edge @ move.T,
            )
        )
    return planes[0], planes[1]


def spectrum_table(setting: Setting) -> pd.DataFrame:
    """Eigenvalues after attack and after adversarial training, over the data's (Directions section 4.4, figure 2).

    Columns: attack (with its strategy), direction (1 to d), eigenvalue, attacked (ratio
    of the variance of attacked points to λ), sampled and error (the same by Monte Carlo), trained (ratio of the
    saddle point's eigenvalue to λ). Directions with λ = 0 have no ratio and are left out.
    """
    return pd.concat(list(_spectra(setting)), ignore_index=True)


def _spectra(setting: Setting) -> Iterator[pd.DataFrame]:
    model = setting.model
    kept = model.eigenvalues > 0
    cases: list[tuple[str, Space, Source]] = [
        ("image attack", "image", "data"),
        ("latent attack (encode)", "latent", "encode"),
        ("latent attack (prior)", "latent", "prior"),
    ]
    for name, space, source in cases:
        multiplier = setting.multiplier_in(space)
        trained = saddle.saddle_eigenvalues(model, space, multiplier, source)
        table = pd.DataFrame(
            {
                "attack": name,
                "direction": np.arange(1, model.dimensions + 1),
                "eigenvalue": model.eigenvalues,
                "trained": _ratio(trained, model),
            }
        )
        if multiplier > least_multiplier(model, space):
            factors = stretch(model, space, multiplier)
            table["attacked"] = _ratio(factors**2 * source_eigenvalues(model, source), model)
            points = sample_source(model, source, setting.samples, setting.seed)
            moves = worst_perturbation(model, points, space, multiplier) @ model.mover(space).T
            squares = model.coordinates(points + moves) ** 2
            found = [estimate(column) for column in squares.T]
            table["sampled"] = _ratio(np.array([one.value for one in found]), model)
            table["error"] = _ratio(np.array([one.standard_error for one in found]), model)
        yield table[kept]


def _ratio(values: Array, model: LinearModel) -> Array:
    ratios = np.full(model.dimensions, np.nan)
    return np.asarray(np.divide(values, model.eigenvalues, out=ratios, where=model.eigenvalues > 0))


def risk_table(
    setting: Setting, multipliers: Sequence[float], radii: Sequence[float]
) -> pd.DataFrame:
    """Excess risk over multiplier and radius, closed form and Monte Carlo.

    Columns: panel ("latent": over L; "image": over λ_min L; "radius"), line, position, risk (closed form), sampled
    and error (Monte Carlo at every third position, else NaN). With λ_min = 0 image lines are left out: infinite.
    In the first two panels all are multiplied by the position, so that a risk that falls as 1 / L is level.

    Args:
        setting: Model, samples and seed.
        multipliers: Above 1: L in latent space, λ_min L in image space.
        radii: Root mean square lengths.
    """
    rows = [*_latent_risks(setting, multipliers), *_radius_risks(setting, radii)]
    if setting.model.eigenvalues[-1] > 0:
        rows += _image_risks(setting, multipliers)
    return pd.DataFrame(rows)


Point = dict[str, object]


def _point(
    panel: str, line: str, position: float, value: float, found: Estimate | None = None
) -> Point:
    sampled, error = found or (float("nan"), float("nan"))
    scale = 1.0 if panel == "radius" else position
    return {
        "panel": panel,
        "line": line,
        "position": position,
        "risk": scale * value,
        "sampled": scale * sampled,
        "error": scale * error,
    }


def _compared(
    setting: Setting,
    panel: str,
    line: tuple[str, LinearModel, Space, Source],
    position: float,
    multiplier: float,
    sampled: bool,
) -> Point:
    name, model, space, source = line
    closed = risk.perturbation_risk(model, space, multiplier, source)
    if not sampled:
        return _point(panel, name, position, closed)
    drawn = (setting.samples, setting.seed)
    found = risk.sampled_perturbation_risk(model, space, multiplier, source, *drawn)
    return _point(panel, name, position, closed, found)


def _latent_risks(setting: Setting, multipliers: Sequence[float]) -> Iterator[Point]:
    model, flat = setting.model, setting.model.flattened()
    lines: list[tuple[str, LinearModel, Space, Source]] = [
        ("encode", model, "latent", "encode"),
        ("posterior", model, "latent", "posterior"),
        ("prior", model, "latent", "prior"),
        ("rank q, each strategy", flat, "latent", "prior"),
    ]
    for place, multiplier in enumerate(multipliers):
        for number, line in enumerate(lines):
            sampled = _is_sampled(place, number)
            yield _compared(setting, "latent", line, multiplier, multiplier, sampled)
        yield _point("latent", "q / L, derived order", multiplier, flat.rank / multiplier)
        yield _point("latent", "q / L², printed order", multiplier, flat.rank / multiplier**2)


def _image_risks(setting: Setting, multipliers: Sequence[float]) -> Iterator[Point]:
    model = setting.model
    line: tuple[str, LinearModel, Space, Source] = ("image", model, "image", "data")
    for place, scaled in enumerate(multipliers):
        multiplier = scaled / float(model.eigenvalues[-1])
        yield _compared(setting, "image", line, scaled, multiplier, _is_sampled(place, 0))
        for bound in risk.image_risk_bounds(model, multiplier):
            yield _point("image", "f and d f, derived bounds", scaled, bound)
        order = model.dimensions / scaled**2
        yield _point("image", "d / (λ_min L)², printed order", scaled, order)


def _radius_risks(setting: Setting, radii: Sequence[float]) -> Iterator[Point]:
    model = setting.model
    lines: list[tuple[str, LinearModel, Space, Source]] = [
        ("latent, prior", model, "latent", "prior")
    ]
    if model.eigenvalues[-1] > 0:
        lines.append(("image", model, "image", "data"))
    for place, radius in enumerate(radii):
        for number, line in enumerate(lines):
            multiplier = multiplier_of_radius(model, line[2], radius, line[3])
            sampled = _is_sampled(place, number)
            yield _compared(setting, "radius", line, radius, multiplier, sampled)


def _is_sampled(place: int, number: int) -> bool:
    """Every third position, beside those of the other lines, so that markers do not hide each other."""
    return place % 3 == number % 3


def trade_off_table(
    toy: tsipras.ToyDistribution, weights: Sequence[float], samples: int, seed: int = 0
) -> pd.DataFrame:
    """Accuracies of the toy distribution's classifiers over the weight of the first feature.

    Columns: weight, and for each of standard, robust, valid and invalid_share the closed form, the Monte Carlo
    mean ("standard sampled") and its standard error ("standard error of standard").
    """
    drawn = toy.sample(samples, seed)
    rows = []
    for weight in weights:
        closed = tsipras.accuracies(toy, weight)
        found = tsipras.sampled_accuracies(toy, weight, drawn)
        row: dict[str, float] = {"weight": weight}
        for name in closed._fields:
            row[name] = getattr(closed, name)
            row[f"{name} sampled"], row[f"error of {name}"] = getattr(found, name)
        rows.append(row)
    return pd.DataFrame(rows)


def _circle(points: int) -> Array:
    angles = 2 * np.pi * np.arange(points) / points
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
