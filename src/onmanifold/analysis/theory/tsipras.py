"""The toy problem of Tsipras et al. (2018): robust and accurate seem impossible (Disentangling section I).

The label y is -1 or 1 with equal odds. The first feature is y with probability p, else -y; the others are
N(eta y, 1). The adversary adds at most ``radius`` to each of the others and leaves the first alone, which has no
other values of positive probability. Only the sum S of the others matters to the posterior:

    log p(y = 1 | x) / p(y = -1 | x) = x_1 log(p / (1 - p)) + 2 eta S.

By Disentangling's definition 3 a perturbed x' is an adversarial example only if its label's posterior is still
the largest, p(y | x') > p(-y | x'); it is *valid* then. The classifiers are sign(weight x_1 + S): of weight
log(p / (1 - p)) / (2 eta) the Bayes classifier, of a large one the first feature alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from onmanifold.analysis.theory.model import Array, Estimate, estimate
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal, uniform


class Drawn(NamedTuple):
    """Samples.

    Attributes:
        features: (n, 1 + others).
        labels: (n,) -1 or 1.
    """

    features: Array
    labels: Array


class Accuracies(NamedTuple):
    """Of one classifier, each a probability.

    Attributes:
        standard: A sample is classified correctly.
        robust: It is, and so is every perturbation of it.
        valid: It is, and so is every perturbation of it that keeps its label's posterior the largest.
        invalid_share: Of the samples that are classified correctly but not after the shift of ``radius`` against
            the label, those whose label's posterior is not the largest any more; NaN where there are none.
    """

    standard: float
    robust: float
    valid: float
    invalid_share: float


class SampledAccuracies(NamedTuple):
    """The same over samples, with standard errors.

    Attributes:
        standard: See `Accuracies`.
        robust: See `Accuracies`.
        valid: See `Accuracies`.
        invalid_share: See `Accuracies`.
    """

    standard: Estimate
    robust: Estimate
    valid: Estimate
    invalid_share: Estimate


@dataclass(frozen=True)
class ToyDistribution:
    """The distribution and its adversary (Disentangling eq. 26; its figure 20 has the defaults).

    Args:
        probability: p, that the first feature is the label; at least 0.5 and less than 1.
        eta: Mean of the other features, times the label; above 0.
        others: How many other features there are.
        radius: Most that each of them moves; None: 2 eta, with which the adversary turns their means around.

    Raises:
        InputError: Something is out of range.
    """

    probability: float = 0.9
    eta: float = 3.0
    others: int = 1
    radius: float | None = None

    def __post_init__(self) -> None:
        if not 0.5 <= self.probability < 1:
            raise InputError(f"probability: expected in [0.5, 1), found {self.probability!r}.")
        if not (np.isfinite(self.eta) and self.eta > 0):
            raise InputError(f"eta: expected a finite number above 0, found {self.eta!r}.")
        if self.others < 1:
            raise InputError(f"others: expected at least 1, found {self.others}.")
        if self.radius is not None and not (np.isfinite(self.radius) and self.radius >= 0):
            raise InputError(f"radius: expected a finite number from 0, found {self.radius!r}.")

    @property
    def reach(self) -> float:
        """How far the adversary moves the sum S: ``radius`` for each of the other features."""
        return self.others * (2 * self.eta if self.radius is None else self.radius)

    @property
    def bayes_weight(self) -> float:
        """Weight of the first feature in the Bayes classifier, log(p / (1 - p)) / (2 eta)."""
        return float(np.log(self.probability / (1 - self.probability)) / (2 * self.eta))

    def log_odds(self, features: Array) -> Array:
        """log p(y = 1 | x) / p(y = -1 | x) of features (n, 1 + others), (n,)."""
        first = np.log(self.probability / (1 - self.probability))
        return np.asarray(first * features[:, 0] + 2 * self.eta * features[:, 1:].sum(1))

    def is_valid(self, features: Array, labels: Array) -> NDArray[np.bool_]:
        """(n,) whether the label's posterior is the largest (definition 3)."""
        return np.asarray(labels * self.log_odds(features) > 0)

    def sample(self, count: int, seed: int = 0) -> Drawn:
        """Samples; each depends on the seed and its number alone."""
        indices = torch.arange(count)
        coins = uniform(seed, indices, (2,), stream="tsipras", dtype=torch.float64).numpy()
        labels = np.where(coins[:, 0] < 0.5, -1.0, 1.0)
        first = np.where(coins[:, 1] < self.probability, labels, -labels)
        noise = normal(
            seed, indices, (self.others,), stream="tsipras others", dtype=torch.float64
        ).numpy()
        others = self.eta * labels[:, None] + noise
        return Drawn(np.concatenate([first[:, None], others], axis=1), labels)


def shifted_against_label(toy: ToyDistribution, drawn: Drawn) -> Array:
    """Features after the adversary's whole move against the label: the other features less radius times y."""
    features = drawn.features.copy()
    features[:, 1:] -= (toy.reach / toy.others) * drawn.labels[:, None]
    return features


def accuracies(toy: ToyDistribution, weight: float) -> Accuracies:
    """Accuracies of sign(weight x_1 + S), in closed form.

    For y = 1 the sum of k features is N(k eta, k). With x_1 = ±1 the classifier errs for S at most ∓weight, and
    the posterior prefers y for S above ∓bayes_weight. So valid adversarial examples lie between the two: there are
    some for x_1 = 1 if the weight is too small, for x_1 = -1 if it is too large, and none if it is Bayes's.

    Args:
        toy: The distribution.
        weight: Of the first feature, at least 0.
    """
    agree, differ = toy.probability, 1 - toy.probability
    reach, bayes = toy.reach, toy.bayes_weight
    far, near = _above(toy, -weight), _above(toy, weight)
    far_robust, near_robust = _above(toy, reach - weight), _above(toy, reach + weight)
    standard = agree * far + differ * near
    robust = agree * far_robust + differ * near_robust
    valid = agree * (far_robust if weight < bayes else far)
    valid += differ * (near_robust if weight > bayes else near)
    fooled = standard - robust
    # After the whole shift: fooled, and the posterior has turned.
    turned = agree * _between(toy, -weight, reach + min(-weight, -bayes))
    turned += differ * _between(toy, weight, reach + min(weight, bayes))
    return Accuracies(standard, robust, valid, turned / fooled if fooled > 0 else float("nan"))


def robust_bound(toy: ToyDistribution, standard: ArrayLike) -> Array:
    """Most robust accuracy at radius 2 eta, p / (1 - p) times the standard error (Tsipras et al., theorem 2.1).

    Every classifier is bound; it says something where the standard accuracy is above p.
    """
    odds = toy.probability / (1 - toy.probability)
    return np.asarray(np.minimum(1.0, odds * (1 - np.asarray(standard, dtype=np.float64))))


def sampled_accuracies(toy: ToyDistribution, weight: float, drawn: Drawn) -> SampledAccuracies:
    """The same over samples, whose perturbations are searched one by one.

    All that an adversary can do to a sample is to move S within reach. Whether a move into the classifier's error
    exists that leaves the posterior with the label is decided from the ends of the three intervals of S: within
    reach, in error, and valid.
    """
    labels, first = drawn.labels, drawn.features[:, 0] * drawn.labels
    sums = drawn.features[:, 1:].sum(1) * labels
    correct = labels * (weight * drawn.features[:, 0] + drawn.features[:, 1:].sum(1)) > 0
    # In error: S up to this; valid: S above that; both for the label 1, to which all are turned.
    error_to, valid_from = -weight * first, -toy.bayes_weight * first
    low = sums - toy.reach
    fooled = correct & (low <= error_to)
    # The highest S that is within reach and in error is the best chance to be valid.
    reached = correct & (low <= error_to) & (np.minimum(sums + toy.reach, error_to) > valid_from)
    shifted = shifted_against_label(toy, drawn)
    wrong = labels * (weight * shifted[:, 0] + shifted[:, 1:].sum(1)) <= 0
    invalid = ~toy.is_valid(shifted, labels)[correct & wrong]
    share = Estimate(float("nan"), float("nan"))
    if len(invalid) > 1:
        share = estimate(invalid.astype(np.float64))
    return SampledAccuracies(
        estimate(correct.astype(np.float64)),
        estimate((correct & ~fooled).astype(np.float64)),
        estimate((correct & ~reached).astype(np.float64)),
        share,
    )


def _above(toy: ToyDistribution, threshold: float) -> float:
    """P(S > threshold | y = 1)."""
    return float(ndtr((toy.others * toy.eta - threshold) / np.sqrt(toy.others)))


def _between(toy: ToyDistribution, low: float, high: float) -> float:
    """P(low < S ≤ high | y = 1), 0 if there is nothing between."""
    return max(0.0, _above(toy, low) - _above(toy, high)) if high > low else 0.0
