"""Further processes on one machine that take runs of experiments; the locks of the store share them out."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def helpers(
    count: int, outs: Sequence[Path], store: Path, device: str, threads: int
) -> Iterator[None]:
    """Have ``count`` processes work on the experiments in the folders ``outs`` meanwhile.

    They end with the block, and also when this process is killed.
    """
    command = [sys.executable, "-m", __name__, *map(str, outs), "--store", str(store)]
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


def _leave_with(parent: int) -> None:
    """End this process as soon as its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Work on the runs of experiments, the last ones first, until none is left."""
    parser = argparse.ArgumentParser()
    parser.add_argument("outs", type=Path, nargs="+")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parent", type=int)
    arguments = parser.parse_args()
    threading.Thread(target=_leave_with, args=(arguments.parent,), daemon=True).start()

    import torch

    from onmanifold.experiments.runner import work_from_behind

    torch.set_num_threads(arguments.threads)
    work_from_behind(arguments.outs, arguments.store, arguments.device)


if __name__ == "__main__":
    main()
