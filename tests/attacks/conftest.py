"""Linear models, whose worst case is known, and a record of what a model is asked about."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onmanifold.attacks import Attack, AttackResult


class Recorder(nn.Module):
    """A net that keeps what it is asked about."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.net(images)


@pytest.fixture(scope="session")
def recorded() -> Callable[..., tuple[AttackResult, list[Tensor]]]:
    """Runs an attack on a batch; gives the result and all images that the net saw."""

    def run(
        attack: Attack,
        net: nn.Module,
        batch: tuple[Tensor, ...],
        seed: int = 0,
        rows: slice | Tensor = slice(None),
    ) -> tuple[AttackResult, list[Tensor]]:
        recorder = Recorder(net)
        images, labels, _, indices = batch
        result = attack(recorder, images[rows], labels[rows], seed=seed, indices=indices[rows])
        return result, recorder.seen

    return run


@pytest.fixture(scope="session")
def linear_model() -> Callable[..., nn.Module]:
    """Makes a linear model in float64; a balanced one has all its boundaries meet in grey."""

    def make(classes: int = 2, size: int = 36, balanced: bool = False) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            model[1].weight.copy_(torch.randn(classes, size, generator=generator))
            random = torch.randn(classes, generator=generator)
            model[1].bias.copy_(-0.5 * model[1].weight.sum(1) if balanced else random)
        return model

    return make


@pytest.fixture(scope="session")
def largest_gains() -> Callable[..., Tensor]:
    """max slope·δ over ‖δ‖ <= radius and low <= δ <= high, a row per sample, as (B,)."""

    def gains(
        slopes: Tensor, norm: str, radii: Sequence[float], low: Tensor, high: Tensor
    ) -> Tensor:
        rows = (slopes.numpy(), radii, low.numpy(), high.numpy())
        found = [_largest(norm, *row) for row in zip(*rows, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    return gains


def _largest(
    norm: str, slope: np.ndarray, radius: float, low: np.ndarray, high: np.ndarray
) -> float:
    room = np.where(slope > 0, high, -low)
    slope = np.abs(slope)
    if norm == "linf":
        return float(slope @ np.minimum(room, radius))
    if norm == "l1":
        # Fractional filling: the steepest coordinates first, each as far as it may go.
        gain, left = 0.0, radius
        for place in np.argsort(-slope):
            share = min(room[place], left)
            gain, left = gain + slope[place] * share, left - share
        return float(gain)
    # The optimum is min(t·slope, room) for the t at which the norm is the radius.
    few, many = 0.0, 1e6
    for _ in range(200):
        middle = (few + many) / 2
        inside = np.linalg.norm(np.minimum(middle * slope, room)) <= radius
        few, many = (middle, many) if inside else (few, middle)
    return float(slope @ np.minimum(few * slope, room))
