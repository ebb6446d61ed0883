"""Inference with manifold transformation (IMT, IMT+): a step towards what a discriminator takes for natural."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onmanifold.classifiers.discriminator import Discriminator, read_features
from onmanifold.evaluation.defences import Defence, inner_gradient, straight_through
from onmanifold.foundation.errors import InputError

# The range of IMT+ (ATLD, section 5.1).
_UNCERTAIN = (0.3, 0.7)


class IMT(Defence):
    """The classifier sees clip(x − step · sign(∇ log D(f(x))), 0, 1) (ATLD eq. 8, 26).

    D is the discriminator's probability that the features f(x) are those of a perturbed image (1: adversarial).
    The step makes it smaller: it moves images to where the discriminator sees natural ones. The paper says so in
    words, prints the minus sign, and its code, where natural is 1, descends the cross-entropy towards that
    label: all are the same step, since each falls and rises with the discriminator's logit. It is that logit
    whose gradient is taken here: log D has none left where D rounds to 1.

    The step is made on every image, also on clean ones, and is as long as the attack's radius. IMT+ makes it
    half as long where D is in [0.3, 0.7] (section 5.1). Section 4.2 says, otherwise, that it is shorter where D
    is below a threshold t; that is ``uncertain=(0, t)``.

    Of nine test-time defences attacked adaptively by Croce et al. (2022, arXiv:2202.13711) this is one; none was
    found significantly better than its static model. `evaluate_defence` attacks it in every way. The derivative
    of a sign is 0, and unrolled as it stands it would have the gradient of the direct path alone; so, unrolled,
    the backward pass is that of tanh(slope / (softness · mean |slope|)), the mean over each image.

    Args:
        classifier: The static classifier: images (B, C, H, W) in [0, 1] to logits (B, K).
        discriminator: Trained with it by `ATLD`; `load_discriminator` reads the file beside the classifier's.
        step_size: In units of [0, 1] images.
        uncertain: The range of D, bounds included, in which the step is shorter; None (IMT): nowhere.
        factor: What the step is multiplied by there.
        softness: Of the sign's backward pass when unrolled.

    Raises:
        InputError: An argument is of the wrong type or range, or the classifier has not the features that the
            discriminator reads.
    """

    def __init__(
        self,
        classifier: nn.Module,
        discriminator: Discriminator,
        *,
        step_size: float = 8 / 255,
        uncertain: tuple[float, float] | None = None,
        factor: float = 0.5,
        softness: float = 1.0,
    ) -> None:
        super().__init__(classifier)
        if not isinstance(discriminator, Discriminator):
            raise InputError(
                f"discriminator: expected a Discriminator, found {type(discriminator).__name__}."
            )
        for name, value in (("step_size", step_size), ("factor", factor)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name}: expected a finite number >= 0, found {value}.")
        if not 0 < softness < float("inf"):
            raise InputError(f"softness: expected a finite number > 0, found {softness}.")
        if uncertain is not None and not 0 <= uncertain[0] <= uncertain[1] <= 1:
            raise InputError(
                f"uncertain: expected two probabilities, the smaller first, found {uncertain}."
            )
        self.discriminator = discriminator
        self.step_size, self.factor, self.softness = step_size, factor, softness
        self.uncertain = uncertain

    @classmethod
    def plus(
        cls, classifier: nn.Module, discriminator: Discriminator, *, step_size: float = 8 / 255
    ) -> IMT:
        """IMT+: half a step where D is in [0.3, 0.7]."""
        return cls(classifier, discriminator, step_size=step_size, uncertain=_UNCERTAIN)

    def manifold_output(self, images: Tensor) -> Tensor:
        """The discriminator's logit (B,) that images (B, C, H, W) are perturbed ones; D is its sigmoid."""
        features = read_features(self.classifier, images, self.discriminator.reads)
        outputs: Tensor = self.discriminator(features)
        return outputs[:, 0]

    def transform(self, images: Tensor, differentiable: bool = False) -> Tensor:
        """Images (B, C, H, W) in [0, 1], moved by a step."""
        outputs: list[Tensor] = []

        def manifold_output(inputs: Tensor) -> Tensor:
            outputs.append(self.manifold_output(inputs))
            return outputs[0]

        slope = inner_gradient(manifold_output, images, differentiable)
        direction = slope.sign()
        if differentiable:
            direction = straight_through(direction, self._soft_sign(slope))
        lengths = self._lengths(outputs[0].detach().sigmoid())
        return (images - lengths.view(-1, 1, 1, 1) * direction).clamp(0, 1)

    def _lengths(self, probabilities: Tensor) -> Tensor:
        """The step (B,) of images whose D is (B,)."""
        lengths = torch.full_like(probabilities, self.step_size)
        if self.uncertain is None:
            return lengths
        low, high = self.uncertain
        inside = (probabilities >= low) & (probabilities <= high)
        return torch.where(inside, self.factor * lengths, lengths)

    def _soft_sign(self, slope: Tensor) -> Tensor:
        scale = self.softness * slope.abs().mean((1, 2, 3), keepdim=True)
        # An image without any slope stays where it is.
        return (slope / scale.clamp(min=torch.finfo(slope.dtype).tiny)).tanh()
