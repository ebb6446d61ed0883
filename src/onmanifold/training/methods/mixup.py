"""Mixed images: input and manifold mixup, interpolated adversarial training, robust mixup (IJSAT).

Where several processes share a batch, each mixes its own part: the shares are those of one process, the partners
are not (see `Mixture.draw`). Losses are then means over other mixtures; where nothing is mixed they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional

from onmanifold.attacks import Attack
from onmanifold.attacks.engine import untouched
from onmanifold.foundation import randomness
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.objectives import Objective
from onmanifold.training.methods.base import Method, Step, check_weight, persistent
from onmanifold.training.methods.layers import changed_outputs, parts


@dataclass(frozen=True)
class Mixture:
    """Which partner each sample of a batch has, and how much is its own.

    Attributes:
        partners: (B,) int64 positions, a permutation.
        shares: (B,) in [0, 1]: α, the share of the sample itself.
    """

    partners: Tensor
    shares: Tensor

    @staticmethod
    def draw(concentration: float, step: Step, stream: str) -> Mixture:
        """Random partners, and α ~ Beta(concentration, concentration).

        α depends on seed and sample alone, by the inverse of its distribution function; the papers' code draws one
        for all samples of a batch. Partners are of the same batch. Several processes give the same α as one, but
        other partners: each mixes its own part of a batch, since a partner's example, or its features inside the
        network, is where the partner is.
        """
        keys = randomness.uniform(step.seed, step.indices, stream=f"{stream}/partner")
        draws = randomness.uniform(
            step.seed, step.indices, stream=f"{stream}/share", dtype=torch.float64
        )
        if concentration == 0:
            shares = torch.ones_like(draws)
        else:
            found = betaincinv(concentration, concentration, draws.cpu().numpy() + 2.0**-25)
            shares = torch.from_numpy(found).to(draws)
        # From position in the order of the keys to the next: nobody is its own partner, if there are two.
        order = keys.argsort(stable=True)
        partners = torch.empty_like(order).scatter_(0, order, order.roll(-1))
        return Mixture(partners, shares.to(step.images.dtype))

    def __call__(self, values: Tensor) -> Tensor:
        """α · values + (1 − α) · values of the partners; values (B, ...)."""
        shares = self.shares.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        return shares * values + (1 - shares) * values[self.partners]

    def labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Mixed labels (B, K): cross-entropy with them is α · CE(y) + (1 − α) · CE(partner's y)."""
        return self(functional.one_hot(labels, num_classes).to(self.shares.dtype))


def _mixed_loss(logits: Tensor, mixture: Mixture, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, mixture.labels(labels, logits.shape[1]).to(logits))


def _check_concentration(concentration: float) -> None:
    check_weight("concentration", concentration)


@METHODS.register("input_mixup")
@dataclass(frozen=True)
class InputMixup(Method):
    """Cross-entropy of mixed images with mixed labels (Zhang et al. 2018).

    Partners are of the same batch; of several processes each mixes its own part.

    Attributes:
        concentration: Of the Beta distribution of shares; 0: nothing is mixed, large: all is mixed half and half.
    """

    concentration: float = 1.0

    def __post_init__(self) -> None:
        _check_concentration(self.concentration)

    def loss(self, step: Step) -> Tensor:
        mixture = Mixture.draw(self.concentration, step, "mixup")
        return _mixed_loss(step.logits(mixture(step.images)), mixture, step.labels)


@METHODS.register("manifold_mixup")
@dataclass(frozen=True)
class ManifoldMixup(Method):
    """Mixup of what a random layer computes (Verma et al. 2019).

    Each step mixes at one layer, or at the input; of several processes each chooses one of its own.

    Attributes:
        concentration: Of the Beta distribution of shares.
        layers: Names of submodules of the classifier whose output may be mixed, such as ("body.1", "body.3"), and
            "" for the input; None: the input and each direct part of the body (of another module: each child
            but the last).
    """

    concentration: float = 2.0
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_concentration(self.concentration)
        if self.layers is not None and not self.layers:
            raise ConfigError("layers: expected at least one name, or None.")

    def loss(self, step: Step) -> Tensor:
        mixture = Mixture.draw(self.concentration, step, "mixup")
        layers = self.layers or ("", *parts(step.classifier))
        place = randomness.integers(step.seed, step.indices[:1], len(layers), stream="layer")
        layer = layers[int(place)]
        if layer == "":
            logits = step.logits(mixture(step.images))
        else:
            with changed_outputs(step.classifier, {layer: mixture}):
                logits = step.logits(step.images)
        return _mixed_loss(logits, mixture, step.labels)


@METHODS.register("iat")
@dataclass(frozen=True)
class IAT(Method):
    """Interpolated adversarial training (Lamb et al. 2019): mixup of clean and of adversarial images.

    Half the mixup loss of the clean batch and half that of the adversarial batch, which is made first, from images
    that are not mixed. Partners are of the same batch; of several processes each mixes its own part.

    Attributes:
        attack: Makes the examples.
        concentration: Of the Beta distribution of shares.
    """

    attack: Attack
    concentration: float = 1.0

    def __post_init__(self) -> None:
        _check_concentration(self.concentration)

    @property
    def attacks(self) -> Sequence[Attack]:
        """The attack."""
        return (self.attack,)

    def loss(self, step: Step) -> Tensor:
        examples = step.examples(persistent(self.attack))
        losses = []
        for stream, images in (("clean", step.images), ("adversarial", examples)):
            mixture = Mixture.draw(self.concentration, step, stream)
            losses.append(_mixed_loss(step.logits(mixture(images)), mixture, step.labels))
        return (losses[0] + losses[1]) / 2


@METHODS.register("ijsat")
@dataclass(frozen=True)
class IJSAT(Method):
    """Interpolated joint space adversarial training, by robust mixup (IJSAT eq. 10 and 11, algorithm 1).

    Images are mixed first, the mixed image is encoded, and the attack maximises the mixed loss around it: so the
    perturbation is optimal for the image that is trained on. With an attack on a joint ball this is IJSAT; on a
    latent ball alone it is the data augmentation of IJSAT's table 2; on an image ball it is robust mixup for
    ordinary adversarial training. `AdversarialTraining` on a joint ball is IJSAT without mixup. Manifolds that
    know classes see the label of each image itself, not of its partner. The paper prints Beta(−τ, τ), which does
    not exist; τ here is ``concentration``. Partners are of the same batch; of several processes each mixes its
    own part.

    Attributes:
        attack: Makes the examples; its objective takes soft labels (cross-entropy does).
        concentration: Of the Beta distribution of shares.
        order: "mix_first", robust mixup; "attack_first", mixup of finished examples, which IJSAT's table 4 has as
            an ablation.
    """

    attack: Attack
    concentration: float = 0.1
    order: Literal["mix_first", "attack_first"] = "mix_first"

    def __post_init__(self) -> None:
        _check_concentration(self.concentration)
        objective = getattr(self.attack, "objective", None)
        soft = isinstance(objective, Objective) and objective.takes_soft_labels
        if self.order == "mix_first" and not soft:
            raise ConfigError(
                f"attack: mixed labels need an objective such as 'ce'; {type(self.attack).__name__} has "
                f"{'none' if objective is None else type(objective).__name__}."
            )

    @property
    def attacks(self) -> Sequence[Attack]:
        """The attack."""
        return (self.attack,)

    def loss(self, step: Step) -> Tensor:
        attack, mixture = persistent(self.attack), Mixture.draw(self.concentration, step, "mixup")
        if self.order == "attack_first":
            logits = step.logits(mixture(step.examples(attack)))
            return _mixed_loss(logits, mixture, step.labels)
        labels = mixture.labels(step.labels, _classes(step))
        examples = step.examples(attack, images=mixture(step.images), soft_labels=labels)
        return step.cross_entropy(examples, labels)


def _classes(step: Step) -> int:
    """K, the number of logits."""
    known = getattr(step.classifier, "num_classes", None)
    if isinstance(known, int):
        return known
    with torch.no_grad(), untouched(step.classifier):
        return int(step.model(step.images[:1]).shape[1])
