"""Several processes at one evaluation: who does what, and how the outcomes come together."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, distributed

from onmanifold.foundation.errors import OnManifoldError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Processes:
    """The processes that share the batches; one alone where there is no Fabric."""

    def __init__(self, fabric: Fabric | None) -> None:
        self.fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.count = 1 if fabric is None else fabric.world_size

    def own(self, batches: int) -> range:
        """The batches of this process: every count-th, from its rank on."""
        return range(self.rank, batches, self.count)

    def agree(self, failure: Exception | None) -> None:
        """Raise this process's failure, or say that another one failed, so that none waits for ever."""
        if self.count > 1:
            failed = self._gather(torch.tensor([failure is not None], dtype=torch.uint8))
            ranks = [rank for rank, flag in enumerate(failed) if bool(flag)]
            if failure is None and ranks:
                raise OnManifoldError(
                    f"The evaluation failed in process {ranks[0]}; its message says why."
                )
        if failure is not None:
            raise failure

    def merge(self, tasks: list[list[pa.Table]], batches: int) -> list[pa.Table]:
        """For each task the rows of all processes in the order of the batches.

        Args:
            tasks: For each task the tables of this process's batches.
            batches: Number of batches of all processes.
        """
        if self.count == 1:
            return [pa.concat_tables(tables) for tables in tasks]
        ours = [table for tables in tasks for table in tables]
        payloads = self._exchange(b"".join(_packed(table) for table in ours))
        merged: list[list[pa.Table | None]] = [[None] * batches for _ in tasks]
        for rank, payload in enumerate(payloads):
            stream = io.BytesIO(payload)
            for row in merged:
                for batch in range(rank, batches, self.count):
                    with pa.ipc.open_stream(stream) as reader:
                        row[batch] = reader.read_all()
        return [pa.concat_tables(row) for row in merged]

    def _exchange(self, payload: bytes) -> list[bytes]:
        """Every process's payload, by rank; as tensors, so that nothing is unpickled."""
        length = torch.tensor([len(payload)])
        lengths = [int(value) for value in self._gather(length)]
        padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        padded[: len(payload)] = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
        gathered = self._gather(padded)
        return [
            bytes(row[:size].cpu().numpy().tobytes())
            for row, size in zip(gathered, lengths, strict=True)
        ]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, by rank; they have the same shape in each."""
        assert self.fabric is not None
        tensor = tensor.to(self.fabric.device)
        gathered = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(gathered, tensor)
        return gathered


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
