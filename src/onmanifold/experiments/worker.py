"""A process that works on the runs of experiments beside the one that started it: see `helper`."""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import torch

from onmanifold.experiments.runner import work_from_behind


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

    torch.set_num_threads(arguments.threads)
    work_from_behind(arguments.outs, arguments.store, arguments.device)


if __name__ == "__main__":
    main()
