"""What a long evaluation shows meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], object]
"""Called after each batch with the attack's name, the number of samples done, and of all samples."""


@contextmanager
def shown(progress: bool | Report, names: list[str], total: int) -> Iterator[Report]:
    """The function to report to: bars on the terminal, the caller's own function, or nothing.

    Args:
        progress: True: bars on standard error; False: nothing; or a function to call.
        names: What will be run, in order.
        total: Number of samples of each.
    """
    if callable(progress):
        yield progress
    elif progress:
        with _bars(names, total) as report:
            yield report
    else:
        yield lambda name, done, total: None


@contextmanager
def _bars(names: list[str], total: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {name: progress.add_task(name, total=total, start=False) for name in names}

        def report(name: str, done: int, total: int) -> None:
            if progress.tasks[tasks[name]].start_time is None:
                progress.start_task(tasks[name])
            progress.update(tasks[name], completed=done)

        yield report
