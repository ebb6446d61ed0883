"""The theory of Directions (section 4 and appendix): closed forms, numeric counterparts, and what holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from onmanifold.analysis.theory.comparison import Setting, compare
from onmanifold.analysis.theory.curves import attack_plane, risk_table, spectrum_table
from onmanifold.analysis.theory.model import LinearModel, linear_model, random_spectrum
from onmanifold.analysis.theory.risk import energy_shares
from onmanifold.analysis.theory.saddle import saddle_eigenvalues
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.reports.claims import Verdict
from onmanifold.reports.drawings import theory as drawings

_SOURCE = "Directions"
# Positions of the curves of risk.
_MULTIPLIERS = tuple(float(value) for value in np.geomspace(1.2, 300.0, 25))
_RADII = tuple(float(value) for value in np.geomspace(0.03, 3.0, 13))
# Eigenvalues and radius of the figure of two dimensions.
_PLANE, _PLANE_RADIUS = (1.0, 0.1), 1.0


@ANALYSES.register("theory")
@dataclass(frozen=True)
class Theory(Analysis):
    """Every closed form of Directions section 4 and its appendix beside its numeric counterpart.

    Attributes:
        spectrum: Eigenvalues of the data's covariance, or a seed of random ones.
        dimensions: How many eigenvalues a random spectrum has.
        latent_size: q.
        sigma: Standard deviation of the generator's noise; None: that of maximum likelihood.
        multiplier: L of the latent attack, above 1.
        image_multiplier: L of the attack in image space; None: ``multiplier`` over the least positive eigenvalue.
        radius: Of perturbations, where the multiplier is solved from it.
        samples: Of each Monte Carlo estimate.
        fitted: Points in the sample of the theorems on finite samples.
        seed: Of the eigenvectors and of all samples.
    """

    spectrum: tuple[float, ...] | int = (8.0, 4.0, 2.0, 1.0, 0.5, 0.12, 0.1, 0.08, 0.06, 0.04)
    dimensions: int = 10
    latent_size: int = 5
    sigma: float | None = None
    multiplier: float = 4.0
    image_multiplier: float | None = None
    radius: float = 0.5
    samples: int = 20_000
    fitted: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least(dimensions=1, samples=1000, fitted=2)
        if not 1 < self.multiplier < np.inf:
            raise ConfigError(f"multiplier: expected more than 1, found {self.multiplier}.")
        for name in ("image_multiplier", "radius"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name}: expected more than 0, found {value}.")
        self.model()

    def model(self) -> LinearModel:
        """The data and their generator.

        Raises:
            ConfigError: No model is so.
        """
        spectrum = self.spectrum
        if isinstance(spectrum, int):
            spectrum = random_spectrum(spectrum, self.dimensions)
        try:
            return linear_model(spectrum, self.latent_size, self.sigma, self.seed)
        except InputError as error:
            raise ConfigError(str(error)) from error

    def setting(self, model: LinearModel) -> Setting:
        """What is compared, with the data and generator of ``model``."""
        least = float(model.eigenvalues[model.eigenvalues > 0][-1])
        return Setting(
            model,
            self.multiplier,
            self.multiplier / least if self.image_multiplier is None else self.image_multiplier,
            self.radius,
            self.samples,
            self.fitted,
            self.seed,
        )

    def run(self, place: Workplace) -> Findings:
        model = self.model()
        setting = self.setting(model)
        place.say("closed forms and their numeric counterparts")
        rows = compare(setting)
        place.say("spectra and risks")
        spectrum = spectrum_table(self.setting(model.regenerated()))
        risks = risk_table(setting, _MULTIPLIERS, _RADII)
        return Findings(
            {"closed_forms": rows, "spectrum": spectrum, "risk": risks},
            self._drawings(spectrum, risks),
            [*_judged(rows), *_directions(setting)],
            shown=len(rows),
        )

    def _drawings(self, spectrum: pd.DataFrame, risks: pd.DataFrame) -> dict[str, Drawing]:
        first, second = _PLANE
        planes = attack_plane(_PLANE, _PLANE_RADIUS)
        sampled = (
            f"points: {self.samples:,} samples, standard errors mostly smaller than the points"
        )
        return {
            "ellipses": Drawing(
                drawings.draw_ellipses(planes),
                "Image attacks leave the data sideways, latent attacks along it",
                f"Data of variance {first:g} and {second:g} with one latent. Arrows: the worst perturbation of "
                "the given length, of points at two standard deviations. Dashed: the saddle point of "
                "adversarial training whose perturbations have this root mean square length. The radius in "
                "image space is one standard deviation of the smaller variance.",
            ),
            "spectrum": Drawing(
                drawings.draw_spectrum(spectrum, self.latent_size),
                "What attack and training make of each eigenvalue",
                f"Data as the generator makes them; latent multiplier {self.multiplier:g}. Lines: closed forms; "
                f"{sampled} (left). Right of the vertical line directions have no latent. "
                'With the strategy "posterior" all is as with "prior".',
            ),
            "risk": Drawing(
                drawings.draw_risk(risks),
                "Excess risk over multiplier and radius",
                f"Lines: closed forms; {sampled}. Left and middle are multiplied by the multiplier, so that a "
                "risk that falls with its inverse is level.",
            ),
        }


@dataclass(frozen=True)
class _Claim:
    """A statement that rows of the comparison decide."""

    text: str
    theorem: str
    form: str = "printed"
    quantity: str = ""
    without: str = "\n"


_CLAIMS = (
    _Claim("Λ⁽¹⁾, Λ⁽²⁾, Λ⁽³⁾ are the covariances of the three strategies, as printed", "Lemma 1"),
    _Claim("Λ⁽²⁾ as printed is the same as Λ⁽³⁾", "Lemma 1", "added"),
    _Claim("Wᵀ(LΣ − WWᵀ)⁻¹(x − μ) and (LΣ − I)⁻¹(x − μ) are the worst perturbations", "Lemma 2"),
    _Claim(
        "With L solved from the radius the worst perturbation of that length is found",
        "Lemma 2",
        "added",
    ),
    _Claim(
        "With one L solved from a radius the mean square length is its square", "eq. 8", "added"
    ),
    _Claim(
        "The excess risk by perturbation is ½ Σ [(1 + c)² − 1] λ⁽ʲ⁾/λ",
        "Theorem 2",
        quantity="by perturbation",
    ),
    _Claim(
        "The excess risk by change of distribution is ½ log(Πλ⁽ʲ⁾/Πλ) + ½(Σλ⁽ʲ⁾/λ − d), as printed",
        "Theorem 2",
        quantity="change of distribution",
    ),
    _Claim(
        "It is ½(Σλ⁽ʲ⁾/λ − d): the covariance of the loss does not change", "Theorem 2", "corrected"
    ),
    _Claim(
        "Data of rank q: the excess risk is ½ Σ [(1 + 1/(L − 1))² − 1], of any shape of the data",
        "Corollary 3",
        without="falls",
    ),
    _Claim("It is O(q L⁻²), as printed", "Corollary 3", quantity="falls"),
    _Claim("It is of the order q / L", "Corollary 3", "corrected"),
    _Claim(
        "The excess risk in image space is ½ Σ [(1 + 1/(Lλ − 1))² − 1], infinite for λ_min = 0",
        "Theorem 4",
        without="falls",
    ),
    _Claim("It is at most O(d (λ_min L)⁻²), as printed", "Theorem 4", quantity="falls"),
    _Claim(
        "It is of the order 1 / (λ_min L), between f and d f with f = (2t − 1)/(2(t − 1)²), t = λ_min L",
        "Theorem 4",
        "corrected",
    ),
    _Claim("λ_ls is the eigenvalue at the saddle point of latent training", "Theorem 5"),
    _Claim(
        "½Σ + I/L + (Σ/L + ¼Σ²)^½ is the saddle point of the modified problem in image space",
        "Theorem 6",
        without="eq. 4",
    ),
    _Claim(
        "It is that of eq. 4, where each perturbation has the same bound, as printed",
        "Theorem 6",
        quantity="eq. 4",
    ),
    _Claim(
        "In one dimension that of eq. 4 is λ + 2ε(2λ/π)^½ + ε²",
        "Theorem 6",
        "corrected",
    ),
    _Claim("Generated data move the small eigenvalues towards their mean", "Theorem 8"),
    _Claim(
        "Finite samples, strategy 3: as Theorem 5 with the sample's eigenvalues",
        "Theorem 9",
        quantity="no points",
    ),
    _Claim(
        "Strategies 1 and 2 too, where the fitted points themselves are encoded",
        "Theorem 9",
        "added",
        "fitted points",
    ),
    _Claim(
        "Data of rank q: any strategy, where the fitted points are encoded",
        "Theorem 9",
        quantity="fitted points, data of rank q",
    ),
    _Claim(
        "Data of rank q: any strategy, where new points are encoded",
        "Theorem 9",
        quantity="new points, data of rank q",
    ),
)


def _judged(rows: pd.DataFrame) -> Iterator[Statement]:
    for claim in _CLAIMS:
        said = rows[(rows.theorem == claim.theorem) & (rows["form"] == claim.form)]
        said = said[
            said.quantity.str.contains(claim.quantity, regex=False)
            & ~said.quantity.str.contains(claim.without, regex=False)
        ]
        yield Statement(
            claim.text, _numbers(said), verdict(said.agrees), f"{_SOURCE}, {claim.theorem}"
        )


def verdict(agreements: Iterable[bool]) -> Verdict:
    """Whether all agree; "not measured" if there are none."""
    found = [bool(one) for one in agreements]
    if not found:
        return "not measured"
    return "holds" if all(found) else "does not hold"


def _numbers(rows: pd.DataFrame) -> str:
    """The comparison that is farthest off, beside what it may be off."""
    if rows.empty:
        return "The model has no such case."
    worst = rows.iloc[int((rows.difference.abs() / rows.tolerance).to_numpy().argmax())]
    error = worst["standard error"]
    numeric = f"{worst.numeric:.6g}" + (f" ± {error:.2g}" if error else "")
    where = f"{worst.quantity} ({worst.strategy})"
    return (
        f"{len(rows)} compared; farthest off: {where}: {worst['closed form']:.6g} in closed form, {numeric} in "
        f"numbers, {abs(worst.difference):.2g} apart with {worst.tolerance:.2g} allowed."
    )


def _directions(setting: Setting) -> Iterator[Statement]:
    """Where attacks go, and what training makes larger."""
    model = setting.model
    source = f"{_SOURCE}, section 4.3"
    latent = energy_shares(model, "latent", setting.multiplier, "prior")
    yield Statement(
        "Latent attacks move points along the directions of large variance",
        f"Of the mean square move {latent[0]:.0%} is along the largest variance of {model.eigenvalues[0]:.3g}; "
        "the shares fall with the variance.",
        verdict([bool((np.diff(latent) <= 1e-12).all())]),
        source,
    )
    if model.eigenvalues[-1] * setting.image_multiplier > 1:
        image = energy_shares(model, "image", setting.image_multiplier, "data")
        yield Statement(
            "Image attacks move points along the directions of small variance",
            f"Of the mean square move {image[-1]:.0%} is along the smallest variance of "
            f"{model.eigenvalues[-1]:.3g} and {image[0]:.2%} along the largest; the shares rise as the variance "
            "falls.",
            verdict([bool((np.diff(image) >= -1e-12).all())]),
            source,
        )
    encoded, drawn = (
        saddle_eigenvalues(model, "latent", setting.multiplier, strategy)
        for strategy in ("encode", "prior")
    )
    ratios = [
        eigenvalues[model.latent_size - 1] / model.eigenvalues[model.latent_size - 1]
        for eigenvalues in (encoded, drawn)
    ]
    same = np.allclose(encoded, drawn)
    yield Statement(
        "The sampling strategy does not matter to the saddle point of latent training",
        f"Eigenvalue {model.latent_size} becomes {ratios[0]:.4g} times its own with strategy 1 and "
        f"{ratios[1]:.4g} times with strategies 2 and 3, the last {encoded[-1]:.4g} and {drawn[-1]:.4g}. "
        + ("" if same else "Where strategy 1 leaves 0 the loss of real data is infinite. ")
        + "For data of rank q all are the same.",
        verdict([bool(same)]),
        f"{_SOURCE}, section 4.2",
    )
