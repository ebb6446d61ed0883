"""Test-time defences: what is done to an image before a classifier sees it, and the ways to attack through it.

A defence of one's own takes five lines; what it does with ``differentiable`` decides whether it can be unrolled:

>>> class Calmed(Defence):
...     def transform(self, images, differentiable=False):
...         spread = lambda x: self.classifier(x).logsumexp(1)
...         slope = inner_gradient(spread, images, differentiable)
...         return (images - 0.03 * slope.sign()).clamp(0, 1)
>>> defence = Calmed(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
>>> defence(torch.rand(2, 1, 2, 2)).shape, defence.unrollable
(torch.Size([2, 3]), True)

A function does as well: ``Defence(classifier, lambda images: (8 * images).round() / 8)``. `evaluate_defence`
attacks either in every way that applies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from onmanifold.foundation.errors import InputError

Transform = Callable[..., Tensor]


class Defence(nn.Module):
    """A static classifier behind a transformation of its images; gives the classifier's logits (B, K).

    Give the transformation, or override `transform` in a subclass. It may be random, and may run an inner
    optimisation: gradients can be taken inside it also where they are off outside, as in `Attack`'s own checks.

    Args:
        classifier: The static classifier: images (B, C, H, W) in [0, 1] to logits (B, K).
        transform: Images (B, C, H, W) in [0, 1] to what the classifier sees: any callable, or a module. If it
            takes an argument ``differentiable`` it can be unrolled; see `transform`.
    """

    def __init__(self, classifier: nn.Module, transform: Transform | None = None) -> None:
        super().__init__()
        if not isinstance(classifier, nn.Module):
            raise InputError(
                f"classifier: expected a torch.nn.Module, found {type(classifier).__name__}."
            )
        if transform is None and type(self).transform is Defence.transform:
            raise InputError("transform: expected one, or a subclass that overrides `transform`.")
        if transform is not None and not callable(transform):
            raise InputError(f"transform: expected a callable, found {type(transform).__name__}.")
        self.classifier = classifier
        self.given = transform

    def transform(self, images: Tensor, differentiable: bool = False) -> Tensor:
        """What the classifier sees of images (B, C, H, W).

        Args:
            images: In [0, 1].
            differentiable: True: gradients to ``images`` flow through all that is done here, also through inner
                gradients (``create_graph=True``), at the same values. A subclass without this argument cannot be
                unrolled.
        """
        assert self.given is not None
        return self.given(images, differentiable=True) if differentiable else self.given(images)

    @property
    def unrollable(self) -> bool:
        """Whether the transformation takes ``differentiable``."""
        overridden = type(self).transform is not Defence.transform
        target: Any = self.transform if overridden else self.given
        target = target.forward if isinstance(target, nn.Module) else target
        try:
            return "differentiable" in inspect.signature(target).parameters
        except (TypeError, ValueError):  # some of torch's own functions have no signature
            return False

    def seen(self, images: Tensor, differentiable: bool = False) -> Tensor:
        """What the classifier sees, with gradient to the images where gradients are on; see `transform`.

        Raises:
            InputError: The transformation gives no tensor with a row per image.
        """
        if isinstance(images, fx.Proxy):
            # A trace keeps neither no_grad, enable_grad nor a backward pass of one's own: the values of a traced
            # defence would be right, its gradients wrong.
            raise fx.proxy.TraceError("A defence is not traced.")
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self.seen(images.clone())
        outside = torch.is_grad_enabled()
        images = images if outside else images.detach()
        with torch.enable_grad():
            seen = (
                self.transform(images, differentiable=True)
                if differentiable
                else self.transform(images)
            )
        if not isinstance(seen, Tensor) or seen.shape[:1] != images.shape[:1]:
            found = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise InputError(f"transform: expected a tensor of {len(images)} rows, found {found}.")
        return seen if outside else seen.detach()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.classifier(self.seen(images))
        return logits


class Differentiable(nn.Module):
    """A defence with the gradient that it has as it is written.

    An inner gradient without ``create_graph`` is a constant to it, so this is the direct path only.
    """

    def __init__(self, defence: Defence) -> None:
        super().__init__()
        self.defence = defence

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K), the defence's own.

        Raises:
            InputError: A gradient is wanted, and the transformation does not pass it on.
        """
        seen = self.defence.seen(images)
        if torch.is_grad_enabled() and images.requires_grad and not seen.requires_grad:
            raise InputError("transform: no gradient of it reaches the images; use BPDA.")
        logits: Tensor = self.defence.classifier(seen)
        return logits


class BPDA(nn.Module):
    """A defence with another backward pass: backward pass differentiable approximation (Athalye et al. 2018).

    The forward pass is the defence's own, to the last bit; the backward pass is that of the classifier at the
    transformed images, then that of the surrogate at the images.

    Args:
        defence: What is attacked.
        surrogate: A differentiable stand-in for the transformation, such as a blur or a decoder; None: the
            identity.
    """

    def __init__(self, defence: Defence, surrogate: Transform | None = None) -> None:
        super().__init__()
        self.defence = defence
        self.surrogate = surrogate

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K), the defence's own.

        Raises:
            InputError: The surrogate gives another shape or dtype than the transformation.
        """
        seen = self.defence.seen(images.detach()).detach()
        if torch.is_grad_enabled() and images.requires_grad:
            smooth = images if self.surrogate is None else self.surrogate(images)
            if smooth.shape != seen.shape or smooth.dtype != seen.dtype:
                raise InputError(
                    f"surrogate: expected {seen.dtype} {tuple(seen.shape)} as from the transformation, found "
                    f"{smooth.dtype} {tuple(smooth.shape)}."
                )
            seen = straight_through(seen, smooth)
        logits: Tensor = self.defence.classifier(seen)
        return logits


class Unrolled(nn.Module):
    """A defence with the gradient through its inner optimisation: ``transform(images, differentiable=True)``.

    Raises:
        InputError: The transformation has no such argument.
    """

    def __init__(self, defence: Defence) -> None:
        super().__init__()
        if not defence.unrollable:
            raise InputError(
                "transform: expected an argument `differentiable`; without it, use BPDA."
            )
        self.defence = defence

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K), the defence's own."""
        # Without a gradient to come, the defence runs exactly as it does in use.
        follow = torch.is_grad_enabled() and images.requires_grad
        logits: Tensor = self.defence.classifier(self.defence.seen(images, follow))
        return logits


class _StraightThrough(torch.autograd.Function):
    """The first argument's values, the second's gradient."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, smooth: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The values of ``exact``, to the last bit, with the gradient of ``smooth``, of the same shape."""
    values: Tensor = _StraightThrough.apply(exact, smooth)  # type: ignore[no-untyped-call]
    return values


def inner_gradient(
    function: Callable[[Tensor], Tensor], images: Tensor, differentiable: bool = False
) -> Tensor:
    """The gradient (B, ...) of a function's values (B,) to each sample's own image, for use inside a defence.

    Args:
        function: Images (B, ...) to values (B,), sample by sample.
        images: Where.
        differentiable: Whether the gradient can itself be differentiated, for `Unrolled`.
    """
    with torch.enable_grad():
        follow = differentiable and images.requires_grad
        inputs = images if follow else images.detach().requires_grad_()
        values = function(inputs)
        (slope,) = torch.autograd.grad(values, inputs, torch.ones_like(values), create_graph=follow)
    return slope
