"""AdvProp: adversarial examples have batch norms of their own, so that they help on clean images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from onmanifold.attacks import Attack
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.modules import with_parts
from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step, check_weight, persistent
from onmanifold.training.task import Turn

_NORM = nn.modules.batchnorm._BatchNorm


class AuxiliaryNorms(nn.Module):
    """Copies of all batch norms of a classifier, which can stand in their places.

    Args:
        classifier: Whose they are; it is left as it is.

    Raises:
        InputError: It has no batch norm whose scale and shift are learned.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        norms = _norms(classifier)
        if not any(parameter.requires_grad for norm in norms for parameter in norm.parameters()):
            raise InputError(
                "classifier: AdvProp needs batch norm whose scale and shift are learned, found none in "
                f"{type(classifier).__name__}."
            )
        self.norms = nn.ModuleList(copy.deepcopy(norm) for norm in norms)

    @contextmanager
    def inside(self, classifier: nn.Module) -> Iterator[None]:
        """The classifier with these norms in the places of its own, and then as it was."""
        parts = dict(zip(_norms(classifier), self.norms, strict=True))
        with with_parts(classifier, parts):
            yield


@METHODS.register("advprop")
@dataclass(frozen=True)
class AdvProp(Method):
    """Cross-entropy on clean images and, through batch norms of their own, on adversarial ones (Xie et al. 2020).

    The two kinds of images have different statistics. So each batch norm has an auxiliary copy, trained along
    with the rest, which takes its place when adversarial examples are made and trained on (algorithm 1); the
    classifier that is evaluated and kept has the main ones. The copies begin as the main ones are. Examples are
    made in eval mode, as everywhere here, by the running statistics of the copies.

    As with all batch norm, the statistics of a step are those of the batch, of several processes each of its own
    part; the running ones are averaged.

    The loss is the sum of both, as printed; with weights of 0.5 it has the size of other methods' losses.

    Attributes:
        attack: What makes the examples.
        clean_weight: Of the loss on clean images.
        adversarial_weight: Of the loss on the examples.
    """

    attack: Attack
    clean_weight: float = 1.0
    adversarial_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("clean_weight", "adversarial_weight"):
            check_weight(name, getattr(self, name))
        if self.clean_weight == self.adversarial_weight == 0:
            raise ConfigError("clean_weight and adversarial_weight: found 0 for both.")

    @property
    def attacks(self) -> Sequence[Attack]:
        """None: the classifier that is kept has the main norms, and is meant for clean images; these judge it."""
        return ()

    def players(self, classifier: nn.Module, image: Tensor) -> dict[str, nn.Module]:
        """The auxiliary norms.

        Raises:
            InputError: The classifier has no batch norm.
        """
        return {"auxiliary": AuxiliaryNorms(classifier)}

    def turns(self, step: Step) -> Iterator[Turn]:
        """One turn: the classifier follows the whole loss, the auxiliary norms that on the examples."""
        loss = self.loss(step)
        # One loss for both, which is logged once; the auxiliary norms have no part in that on clean images.
        yield {"classifier": loss, "auxiliary": loss}

    def loss(self, step: Step) -> Tensor:
        auxiliary = step.players["auxiliary"]
        assert isinstance(auxiliary, AuxiliaryNorms)
        with auxiliary.inside(step.classifier):
            examples = step.examples(persistent(self.attack))
            adversarial = self.adversarial_weight * step.cross_entropy(examples)
        return self.clean_weight * step.cross_entropy(step.images) + adversarial


def _norms(classifier: nn.Module) -> list[nn.Module]:
    """All batch norms, each once, in order."""
    return [part for part in classifier.modules() if isinstance(part, _NORM)]
