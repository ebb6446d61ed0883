"""The model and the samples that are examined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks.engine import Engine, frozen, full_float32, untouched
from onmanifold.data.dataset import Dataset
from onmanifold.foundation import randomness
from onmanifold.objectives import Margin, Network

# Folding changes roundings only.
_SAME_COPY = 0.9
# Images on which the private copy is compared.
_FEW = 32


@dataclass(frozen=True)
class Subject:
    """The model and the samples that are examined, on the model's device.

    Attributes:
        model: The model, left as it is.
        dataset: All samples; the surrogate learns from them.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64.
        codes: (N, code_size) or None.
        indices: (N,) int64.
        logits: (N, K) of the clean images.
        batch_size: Samples per batch.
        seed: Of all that is random.
    """

    model: nn.Module
    dataset: Dataset
    images: Tensor
    labels: Tensor
    codes: Tensor | None
    indices: Tensor
    logits: Tensor
    batch_size: int
    seed: int

    @property
    def right(self) -> Tensor:
        """(N,) bool: which clean images are classified correctly."""
        return self.logits.argmax(1) == self.labels

    def batches(self, positions: Tensor) -> Iterator[Subject]:
        """The samples at ``positions``, batch by batch."""
        for part in torch.split(positions, self.batch_size):
            yield replace(
                self,
                images=self.images[part],
                labels=self.labels[part],
                codes=None if self.codes is None else self.codes[part],
                indices=self.indices[part],
                logits=self.logits[part],
            )

    @cached_property
    def copied_gradients(self) -> Tensor:
        """Cosine (B,) between the gradients of the model and of the private copy that attacks run.

        Attacks compare the two themselves, but on the first few images only, when the copy is made: a gradient of
        the model's own that shows on other images is lost on them.
        """
        few, labels = self.images[:_FEW], self.labels[:_FEW]
        rows = []
        for fold in (False, True):
            try:
                with frozen(self.model, few, Engine(fold=fold), seed=self.seed) as network:
                    rows.append(_image_gradients(network, few, labels))
            except RuntimeError:
                # Tracing may lose what makes the forward pass work at all, such as a context of its own.
                if not fold:
                    raise
                return torch.zeros(len(few))
        own, copied = rows
        same = functional.cosine_similarity(own, copied, dim=1, eps=1e-300).nan_to_num()
        return torch.where((own == copied).all(1) | own.isnan().any(1), 1.0, same)

    @property
    def foldable(self) -> bool:
        """Whether the private copy has the model's gradients, so that attacks on it are attacks on the model."""
        return float(self.copied_gradients.median()) > _SAME_COPY

    @property
    def random(self) -> bool:
        """Whether the model gives other logits each time."""
        first, second = self.logits_of(self.images[:1], 2)
        return not torch.equal(first, second)

    def logits_of(self, images: Tensor, passes: int = 1) -> Tensor:
        """Logits (passes, B, K) in full precision; a random model is seeded once."""
        batches = torch.split(images, self.batch_size)
        with untouched(self.model, self.seed), torch.no_grad(), full_float32():
            rows = [torch.cat([self.model(part) for part in batches]) for _ in range(passes)]
        return torch.stack(rows)


def _image_gradients(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients (B, D) of the margin to the images, in float64; zero where there are none."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        values = Margin().value(network(leaf), labels)
        if not values.requires_grad:
            return torch.zeros_like(images).flatten(1).double()
        (found,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    found = torch.zeros_like(images) if found is None else found
    return found.flatten(1).double()


def permuted(dataset: Dataset, count: int, seed: int) -> Tensor:
    """Positions of a random part of a dataset, in order: sets may be sorted by class."""
    order = randomness.permutation(seed, len(dataset), stream="audit")
    return order[:count].sort().values
