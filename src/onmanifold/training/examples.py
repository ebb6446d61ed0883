"""The examples that a method would train on: what a step makes, without a training."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.training.methods.base import Method, Step


def training_examples(
    method: Method,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    players: Mapping[str, nn.Module] | None = None,
    codes: Tensor | None = None,
    indices: Tensor | None = None,
    epoch: int = 0,
    seed: int = 0,
) -> list[Tensor]:
    """The examples that a method makes of a batch in a step of training; nothing is learned.

    The step is one of copies, as the classifier and the players stand, so that they are left as they are. Where a
    method couples the samples of a batch, as feature scattering does, the examples are those of this batch.

    Args:
        method: Makes them.
        classifier: Images (B, C, H, W) in [0, 1] to logits (B, K).
        images: (B, C, H, W) in [0, 1], on the classifier's device.
        labels: (B,) int64.
        players: The method's own networks, such as ATLD's discriminator; see `TrainingResult.players`.
        codes: (B, code_size), or None.
        indices: (B,) int64 on which the random starts depend; None: 0 to B - 1.
        epoch: From 0; some methods make no examples in the first ones.
        seed: Of the random starts.

    Returns:
        (rows, C, H, W) each, in the order in which they are made: usually one of all rows. None where the method
        trains on the images as they are. What a method makes of inner layers, as RLAT does, is left out.

    Raises:
        InputError: Images or labels are of the wrong type, shape or range.
    """
    images = check_images(images)
    check_labels(labels, len(images))
    network, others = copy.deepcopy((classifier, dict(players or {})))
    for module in (network, *others.values()):
        module.train()
    rows = torch.arange(len(images), device=images.device) if indices is None else indices
    step = Step(network, network, images, labels, codes, rows, epoch, seed, players=others)
    devices = sorted({tensor.device for tensor in network.parameters() if tensor.is_cuda}, key=str)
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        method.loss(step)
    return [made.detach() for made in step.made if made.shape[1:] == images.shape[1:]]
