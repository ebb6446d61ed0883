"""Adversarial training with latent distribution (ATLD): a game of classifier, discriminator and examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks import PGD, Attack
from onmanifold.attacks.engine import untouched
from onmanifold.classifiers.discriminator import Discriminator, Reads, read_features
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.modules import frozen
from onmanifold.foundation.registry import METHODS
from onmanifold.objectives import ManifoldLoss
from onmanifold.threats import ImageBall
from onmanifold.training.methods.base import Method, Step, check_weight, maximising
from onmanifold.training.smoothing import check_smoothing, smoothed_cross_entropy
from onmanifold.training.task import Turn


class _Seen(NamedTuple):
    """What one look at a step's images gives, clean and perturbed.

    Attributes:
        features: (2B, D), those of the clean images first.
        logits: (B, K) of the perturbed images, in train mode.
        clean: (B, K) of the clean images on the frozen model, without gradient; only where they are compared.
        perturbed: (B, C, H, W) the leaf that ``logits`` come from; only where gradients to it are asked for.
    """

    features: Tensor
    logits: Tensor
    clean: Tensor | None = None
    perturbed: Tensor | None = None


@METHODS.register("atld")
@dataclass(frozen=True)
class ATLD(Method):
    """Adversarial training with latent distribution ("Improving Model Robustness with Latent Distribution", 2021).

    A discriminator D learns to tell the features f(x') of perturbed images (adversarial manifold, 1) from those of
    clean ones, f(x) (0), and to classify both. In each step (section 4.1, figure 2):

    1. The examples ascend the manifold loss L = log D(f(x')) + log(1 − D(f(x))), without the labels, on the frozen
       model and the discriminator of the step before (eq. 12).
    2. The discriminator ascends L and descends its cross-entropy on the classes of both (eq. 7).
    3. The classifier descends the cross-entropy of smoothed labels on the examples, and L (eq. 7).

    Eq. 6, 7 and 10 to 12 print "1 − log D(f(x))" for log(1 − D(f(x))), the second term of the Jensen-Shannon
    bound that they are derived from; the term with the logarithm outside is what is meant, and is taken here. In
    eq. 7 and 11 the outer minimum covers the class losses too, so that the classifier also helps the
    discriminator to see the classes; the text gives the classifier no such task (``shared_class_loss=False``).
    Clean and perturbed images go through the classifier in one forward pass, so that batch norm does not tell
    them apart; the discriminator learns on those features too.

    The released code departs from the paper: the discriminator reads logits
    (``discriminator_features="logits"``), natural images are its class 1, and in place of L the classifier
    descends (s/2) · MSE of the logits to those of the clean images on a frozen copy in eval mode, s the quotient
    of the largest gradients to the images, |∂CE/∂x'| over |∂MSE/∂x'| (``invariance="logits"``; the code has no
    absolute values). There the classifier is trained on the perturbed images alone, and the discriminator learns
    on features of the frozen model; in the code those of perturbed images are of the model in train mode, which
    batch norm alone tells apart. Its class losses are of smoothed labels, as in the code. Several processes each
    take their own s.

    That variant feeds on itself where there is batch norm: the frozen copy's logits, by running statistics that
    lag behind the batch's own, are the larger ones, and draw the others after them. On 5,000 images of
    Fashion-MNIST (`conv_net`, radius 0.1, 5 epochs, Adam at 0.01, seed 0) logits passed 1000 while s stayed below
    1, and it ended at 13 % accuracy and 5 % under PGD-20; the paper's loss ended at 75 % and 36 %, and the code's
    with clean logits in train mode at 62 % and 20 %.

    Its published accuracies are those under weak attacks, which label smoothing alone withstands without being
    robust (arXiv:2009.08233), and of the defence `IMT` without adaptive attacks on it (Croce et al. 2022,
    arXiv:2202.13711): evaluate it with AutoAttack, and `IMT` by `evaluate_defence`.

    Attributes:
        attack: Makes the examples, on the discriminator's `ManifoldLoss` in place of its own objective. By default
            one step of 8/255 from a uniform start in the image ball of that radius, of which the better end is
            kept.
        smoothing: What the label loses to the other classes, in [0, 1); see `smoothed`.
        invariance: What makes the classifier's features alike: "divergence" (the paper) or "logits" (its code).
        invariance_weight: Of that.
        class_weight: Of the discriminator's class losses; 0 gives eq. 6.
        shared_class_loss: Whether the classifier descends them too; with "divergence".
        discriminator_features: What the discriminator reads: "last_hidden", as the text says, for classifiers
            with a method ``features`` and a module ``head`` behind it, or "logits", as the released code has it.
        discriminator_width: Units of each of its hidden layers; the paper takes a wide residual network, which
            expects images and not features.
        discriminator_depth: Number of its hidden layers.
        discriminator_updates: Of the discriminator in each step; the paper gives no number, its code has 2.
        discriminator_rate: Factor on its learning rate. The paper gives none; the code's constant 0.001 beside
            0.1 for the classifier is 0.01, for the wide residual network.
    """

    attack: Attack = PGD(ImageBall(norm="linf", radius=8 / 255), steps=1, step_size=8 / 255)
    smoothing: float = 0.5
    invariance: Literal["divergence", "logits"] = "divergence"
    invariance_weight: float = 1.0
    class_weight: float = 1.0
    shared_class_loss: bool = True
    discriminator_features: Reads = "last_hidden"
    discriminator_width: int = 256
    discriminator_depth: int = 2
    discriminator_updates: int = 2
    discriminator_rate: float = 0.1

    def __post_init__(self) -> None:
        maximising(self.attack, ManifoldLoss())
        check_smoothing(self.smoothing)
        for name in ("invariance_weight", "class_weight", "discriminator_rate"):
            check_weight(name, getattr(self, name))
        for name in ("discriminator_width", "discriminator_depth", "discriminator_updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}.")

    @property
    def attacks(self) -> Sequence[Attack]:
        """What robust validation accuracy is measured by: PGD of 10 steps in the threat model of the examples."""
        return (PGD(self.attack.threat, steps=10),)

    def players(self, classifier: nn.Module, image: Tensor) -> dict[str, nn.Module]:
        """The discriminator.

        Raises:
            InputError: The classifier does not show the features that it shall read.
        """
        reads = self.discriminator_features
        with untouched(classifier), torch.no_grad():
            features, classes = read_features(classifier, image, reads), classifier(image).shape[1]
        if features.ndim != 2:
            raise InputError(
                f"classifier: expected features (B, D), found {tuple(features.shape)}."
            )
        if reads == "last_hidden" and not isinstance(getattr(classifier, "head", None), nn.Module):
            raise InputError(
                f"classifier: {type(classifier).__name__} has no module `head` that reads its `features`; "
                "expected one such as `build_classifier` makes, or discriminator_features 'logits'."
            )
        width, depth = self.discriminator_width, self.discriminator_depth
        return {"discriminator": Discriminator(features.shape[1], classes, width, depth, reads)}

    def rates(self) -> Mapping[str, float]:
        """The discriminator's factor."""
        return {"discriminator": self.discriminator_rate}

    def turns(self, step: Step) -> Iterator[Turn]:
        """The discriminator's updates on the step's examples, then the classifier."""
        seen = self._look(step)
        features = seen.features.detach()
        for _ in range(self.discriminator_updates):
            divergence, class_loss = self._judged(step, features)
            yield {"discriminator": self.class_weight * class_loss - divergence}
        yield {"classifier": self._classifier_loss(step, seen)}

    def loss(self, step: Step) -> Tensor:
        """The classifier's loss under the discriminator as it stands."""
        return self._classifier_loss(step, self._look(step))

    def _look(self, step: Step) -> _Seen:
        """Make the examples; pass them and the clean images through the classifier."""
        discriminator = step.players["discriminator"]
        assert isinstance(discriminator, Discriminator)
        attack = maximising(self.attack, ManifoldLoss())
        perturbed = step.examples(attack, model=discriminator.behind(step.classifier))
        both = torch.cat([step.images, perturbed])
        if self.invariance == "divergence":
            features, logits = self._passed(step, both)
            logits = logits[len(step.images) :]
            step.count(logits)
            return _Seen(features, logits)
        with frozen(step.classifier), torch.no_grad():
            features, clean = self._passed(step, both)
        leaf = perturbed.detach().requires_grad_()
        return _Seen(features, step.logits(leaf), clean[: len(step.images)], leaf)

    def _passed(self, step: Step, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features that the discriminator reads, and the logits; one forward pass."""
        if self.discriminator_features == "logits":
            logits = step.model(images)
            return logits, logits
        head = step.classifier.head
        assert isinstance(head, nn.Module)
        with _inputs_of(head) as inputs:
            logits = step.model(images)
        return inputs[0].to(logits.dtype), logits

    def _judged(self, step: Step, features: Tensor) -> tuple[Tensor, Tensor]:
        """The manifold loss L () and the class loss () of features (2B, D), clean ones first."""
        outputs = step.players["discriminator"](features)
        clean, perturbed = outputs[:, 0].chunk(2)
        divergence = functional.logsigmoid(perturbed).mean() + functional.logsigmoid(-clean).mean()
        # Over both halves: twice the mean is the sum of the two means.
        amount = 0.0 if self.invariance == "divergence" else self.smoothing
        class_loss = 2 * smoothed_cross_entropy(outputs[:, 1:], step.labels.repeat(2), amount)
        return divergence, class_loss

    def _classifier_loss(self, step: Step, seen: _Seen) -> Tensor:
        loss = smoothed_cross_entropy(seen.logits, step.labels, self.smoothing)
        if seen.clean is not None and seen.perturbed is not None:
            difference = functional.mse_loss(seen.logits, seen.clean)
            scale = _quotient(loss, difference, seen.perturbed)
            return loss + self.invariance_weight * scale / 2 * difference
        divergence, class_loss = self._judged(step, seen.features)
        if self.shared_class_loss:
            loss = loss + self.class_weight * class_loss
        return loss + self.invariance_weight * divergence


def _quotient(one: Tensor, other: Tensor, images: Tensor) -> Tensor:
    """The largest gradient of one loss () to the images over that of another, (); 0 where that is 0."""
    slopes = [torch.autograd.grad(loss, images, retain_graph=True)[0] for loss in (one, other)]
    largest, least = (slope.abs().max() for slope in slopes)
    return torch.where(least > 0, largest / least, 0.0)


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given in each call inside the block."""
    found: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        # A classifier that was compiled in a pass without the hook would not call it.
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        hook.remove()
