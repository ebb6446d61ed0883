"""Clean and robust accuracy on held-out training images, to choose the best checkpoint by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from onmanifold.attacks import Attack
from onmanifold.attacks.engine import Engine
from onmanifold.foundation.modules import dtype_of
from onmanifold.training.share import Share

if TYPE_CHECKING:
    from onmanifold.data.dataset import Dataset

_BATCH_SIZE = 250
_ALONE = Share()


@torch.no_grad()
def validate(
    classifier: nn.Module,
    dataset: Dataset,
    attacks: Sequence[Attack],
    *,
    seed: int,
    engine: Callable[[Engine], Engine],
    share: Share = _ALONE,
) -> tuple[float, float | None]:
    """Accuracy on clean images, and the share of images that withstand each of the attacks.

    Args:
        classifier: On the device of ``dataset``; put into eval mode.
        dataset: Held-out images.
        attacks: None: there is no robust accuracy.
        seed: Of the attacks; the same in each epoch, so that epochs can be compared.
        engine: How attacks run the model, from how they would by themselves.
        share: The part of this process.

    Returns:
        Both in [0, 1].
    """
    classifier.eval()
    dtype = dtype_of(classifier)
    counts = torch.zeros(2, dtype=torch.float64)
    for positions in torch.split(share.of(len(dataset)), _BATCH_SIZE):
        images, labels, codes, indices = dataset.batch(positions)
        images = images.to(dtype)
        standing = classifier(images).argmax(1) == labels
        counts[0] += standing.sum().cpu()
        for attack in attacks:
            rows = standing.nonzero().squeeze(1)
            if not len(rows):
                break
            examples = attack.examples(
                classifier,
                images[rows],
                labels[rows],
                codes=None if codes is None else codes[rows],
                seed=seed,
                indices=indices[rows],
                engine=engine(attack.engine),
            )
            standing[rows] = classifier(examples).argmax(1) == labels[rows]
        counts[1] += standing.sum().cpu()
    clean, robust = (share.total(counts) / len(dataset)).tolist()
    return clean, robust if attacks else None
