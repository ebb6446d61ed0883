"""What a training tells while it runs: metrics as JSON lines, TensorBoard, a progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.files import write_atomically

History = list[dict[str, Any]]


def write_metrics(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON line per epoch, atomically."""
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomically(path, lines.encode())


class TensorBoard:
    """Scalars of each epoch for TensorBoard; a context manager.

    Raises:
        ConfigError: The package ``tensorboard`` is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "TensorBoard is not installed: pip install 'onmanifold[tensorboard]'."
            ) from None
        self._writer: Any = SummaryWriter(str(directory / "tensorboard"))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add an epoch."""
        for name, value in entry.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, entry["epoch"])
        self._writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()


class Progress(Protocol):
    """Where the loop reports to."""

    def __call__(self, epoch: int, step: int, loss: float | None) -> None:
        """Epoch from 0, steps done in it, a recent loss."""


@contextmanager
def progress_bar(title: str, epochs: int, steps: int, shown: bool) -> Iterator[Progress]:
    """A progress bar over all steps on the standard error stream, with the epoch and the loss."""
    if not shown:
        yield lambda epoch, step, loss: None
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[state]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=epochs * steps, state="")

        def report(epoch: int, step: int, loss: float | None) -> None:
            state = f"epoch {min(epoch + 1, epochs)}/{epochs}"
            state += "" if loss is None else f"  loss {loss:.3f}"
            bar.update(task, completed=epoch * steps + step, state=state)

        yield report
