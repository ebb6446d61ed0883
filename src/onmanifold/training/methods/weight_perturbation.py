"""Methods that take another method's gradient at perturbed weights: SAM and adversarial weight perturbation.

The weights themselves never move: the loss is computed by the network with w + perturbation in the place of its
weights w, and its gradient reaches w through that sum. So there is nothing to put back after the optimizer's
step, no rounding accumulates, and momentum and weight decay are those of w, as if the gradient alone had been
taken elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onmanifold.attacks import Attack
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.modules import with_tensors
from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step, check_weight
from onmanifold.training.task import Turn


@dataclass(frozen=True)
class WeightPerturbation(Method, ABC):
    """Base of the methods that take the loss of another one at the worst weights nearby.

    A step has two passes. The first computes the method's loss at the weights as they are; its gradient, over
    all processes, says where the weights are worse. The second computes the loss there, on the same examples,
    and its gradient moves the weights. The first pass counts in the training accuracy, and it alone updates
    batch norm's running statistics and other buffers: they serve the weights that are evaluated, which are not
    the perturbed ones. (The released code of AWP perturbs a copy and so takes the statistics of the second
    pass.) Modules that draw random numbers, such as dropout, draw anew in the second pass.

    Players that follow the classifier's own loss together with it, as AdvProp's auxiliary norms do, are trained
    by one loss of all their weights; so these are perturbed together. Players with losses of their own, such as
    ATLD's discriminator, move as they would without the perturbation. The classifier may move in one turn of a
    step, and `Method.loss` must be its loss there.

    Attributes:
        method: Whose loss is taken.
    """

    method: Method

    def __post_init__(self) -> None:
        inner = _perturbing(self.method)
        if inner is not None:
            raise ConfigError(
                f"method: {type(inner).__name__} perturbs the weights itself; expected one that does not."
            )

    @property
    def attacks(self) -> Sequence[Attack]:
        """Those of the method."""
        return self.method.attacks

    def players(self, classifier: nn.Module, image: Tensor) -> dict[str, nn.Module]:
        """Those of the method."""
        return self.method.players(classifier, image)

    def rates(self) -> Mapping[str, float]:
        """Those of the method."""
        return self.method.rates()

    def loss(self, step: Step) -> Tensor:
        """The method's loss at the weights as they are."""
        return self.method.loss(step)

    def turns(self, step: Step) -> Iterator[Turn]:
        """The method's turns, the classifier's loss at perturbed weights.

        Raises:
            ConfigError: The classifier moves together with a player that follows another loss, or more than
                once.
        """
        moved = False
        for turn in self.method.turns(step):
            if "classifier" not in turn:
                yield turn
                continue
            if moved or any(loss is not turn["classifier"] for loss in turn.values()):
                raise ConfigError(
                    f"method: {type(self).__name__} needs a method whose classifier moves once in a step, and "
                    "alone or with players that follow the same loss, which is not so in "
                    f"{type(self.method).__name__}."
                )
            moved = True
            yield self._turn(step, turn)

    def _turn(self, step: Step, turn: Turn) -> Turn:
        """The classifier's turn, from the loss at the weights as they are."""
        networks = {"classifier": step.classifier, **step.players}
        parameters = [
            part for name in turn for part in networks[name].parameters() if part.requires_grad
        ]
        gradients = step.gradients(turn["classifier"], parameters)
        with torch.no_grad():
            changes = self.perturbation(parameters, gradients)
        pairs = zip(parameters, changes, strict=True)
        stand_ins = {parameter: parameter + change for parameter, change in pairs}
        with ExitStack() as stack:
            for network in networks.values():
                # Where buffers stand, copies do: what the second pass does to them is lost.
                copies = {buffer: buffer.clone() for buffer in network.buffers()}
                stack.enter_context(with_tensors(network, stand_ins | copies))
            loss = self.method.loss(step.again())
        return dict.fromkeys(turn, loss)

    @abstractmethod
    def perturbation(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """What is added to each parameter, from the gradient of the loss to it."""


@METHODS.register("sam")
@dataclass(frozen=True)
class SAM(WeightPerturbation):
    """Sharpness-aware minimisation: the gradient at the worst weights within a ball (Foret et al. 2021, eq. 2).

    The perturbation is radius · g / ‖g‖₂ with the gradient g of the loss to all parameters that follow it
    together, usually those of the classifier; to first order that is the worst one in the l2 ball. How the
    gradient depends on the perturbation is left out, as in the paper (section 2, eq. 3).

    Attributes:
        method: Whose loss is taken.
        radius: Of the ball, in units of the weights (ρ).
        adaptive: ASAM (Kwon et al. 2021): the ball is that of w / |w|, so that scaling a layer up and the next
            one down changes nothing; the perturbation is radius · w² g / ‖|w| g‖₂. Larger radii are usual, from
            0.5 to 2. The released code adds 0.01 to |w| and leaves biases unscaled; here all are scaled alike.
    """

    radius: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("radius", self.radius)

    def perturbation(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Along the gradient of all parameters together, 0 where that is 0."""
        if not self.adaptive:
            factor = _ratio(self.radius, _norm(gradients))
            return [factor * gradient for gradient in gradients]
        pairs = list(zip(parameters, gradients, strict=True))
        scaled = [weight.abs() * gradient for weight, gradient in pairs]
        factor = _ratio(self.radius, _norm(scaled))
        pairs = list(zip(parameters, scaled, strict=True))
        return [factor * weight.abs() * gradient for weight, gradient in pairs]


@METHODS.register("awp")
@dataclass(frozen=True)
class AWP(WeightPerturbation):
    """Adversarial weight perturbation, of each layer in proportion to its weights (Wu et al. 2020, section 4).

    With adversarial training or TRADES as method: its loss is raised by weights and examples at once. Each weight
    matrix or kernel w is perturbed by radius · ‖w‖ · g / ‖g‖, g the gradient of the method's loss to it; biases
    and norms stay. One ascent step is taken, on the examples that the method has made; in the paper one is
    enough.

    Attributes:
        method: Whose loss is taken.
        radius: Relative size of the perturbation of each layer (γ).
        after_epoch: Epochs without perturbation at the beginning.
    """

    radius: float = 0.005
    after_epoch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("radius", self.radius)
        if self.after_epoch < 0:
            raise ConfigError(f"after_epoch: expected at least 0, found {self.after_epoch}.")

    def turns(self, step: Step) -> Iterator[Turn]:
        """The method's own turns in the epochs without perturbation, then perturbed ones."""
        if step.epoch < self.after_epoch:
            yield from self.method.turns(step)
        else:
            yield from super().turns(step)

    def perturbation(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Along each layer's own gradient, 0 where that is 0 and for biases and norms."""
        return [
            _ratio(self.radius * _norm([weight]), _norm([gradient])) * gradient
            if weight.ndim > 1
            else torch.zeros_like(weight)
            for weight, gradient in zip(parameters, gradients, strict=True)
        ]


def _perturbing(method: Method) -> WeightPerturbation | None:
    """The method that perturbs the weights in a method, at any depth."""
    if isinstance(method, WeightPerturbation):
        return method
    found = (_perturbing(part) for part in vars(method).values() if isinstance(part, Method))
    return next((part for part in found if part is not None), None)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The l2 norm () of all the numbers."""
    parts = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    norm: Tensor = torch.linalg.vector_norm(parts)
    return norm


def _ratio(size: float | Tensor, length: Tensor) -> Tensor:
    """size / length (), 0 where the length is 0."""
    return torch.where(length > 0, size / length, 0.0)
