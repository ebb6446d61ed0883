"""Further processes on one machine that take runs of experiments; the locks of the store share them out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# By name: it imports what starts it.
_WORKER = "onmanifold.experiments.worker"


@contextmanager
def helpers(
    count: int, outs: Sequence[Path], store: Path, device: str, threads: int
) -> Iterator[None]:
    """Have ``count`` processes work on the experiments in the folders ``outs`` meanwhile.

    They end with the block, and also when this process is killed.
    """
    command = [sys.executable, "-m", _WORKER, *map(str, outs), "--store", str(store)]
    command += ["--device", device, "--threads", str(threads), "--parent", str(os.getpid())]
    nowhere = subprocess.DEVNULL
    processes = [
        subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
