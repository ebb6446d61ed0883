"""One process among those that train together: what it does itself, and what all of them add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onmanifold.foundation.errors import DataError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Share:
    """The part of this process in work that several share.

    Attributes:
        rank: Its number.
        processes: How many there are.
        total: Sums a tensor over the processes.
    """

    rank: int = 0
    processes: int = 1
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @classmethod
    def across(cls, fabric: Fabric) -> Share:
        """The share of this process among those of a launched Fabric."""
        if fabric.world_size == 1:
            return cls()

        def total(tensor: Tensor) -> Tensor:
            summed = fabric.all_reduce(tensor.to(fabric.device), reduce_op="sum")
            assert isinstance(summed, Tensor)
            return summed

        return cls(fabric.global_rank, fabric.world_size, total)

    def of(self, count: int) -> Tensor:
        """The positions, of ``count``, that are this process's own."""
        return torch.arange(self.rank, count, self.processes)

    def together(self, act: Callable[[], object], *, all_act: bool = False) -> None:
        """Let the first process act, or all; where one fails all stop, instead of waiting for it.

        Raises:
            DataError: Another process failed.
        """
        failure: Exception | None = None
        if all_act or self.rank == 0:
            try:
                act()
            except Exception as error:
                failure = error
        failures = int(self.total(torch.tensor(0 if failure is None else 1)))
        if failure is not None:
            raise failure
        if failures:
            raise DataError("Another process failed; its message says why.")

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes."""
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / self.processes
        parts = torch.split(self.total(flat), [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums over the processes; a parameter that none has used keeps none.

        Args:
            parameters: The same ones, in the same order, in every process.
        """
        used = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        flat = torch.cat(
            [
                (
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                ).flatten()
                for parameter in parameters
            ]
        )
        summed = self.total(torch.cat([flat, used.to(flat)]))
        anywhere = summed[len(flat) :].tolist()
        parts = torch.split(summed[: len(flat)], [parameter.numel() for parameter in parameters])
        for parameter, part, users in zip(parameters, parts, anywhere, strict=True):
            if users:
                parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
