"""What the commands print: tables and results on standard output, progress and errors on standard error."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from onmanifold.experiments.analyses.base import Findings
    from onmanifold.experiments.summary import Results

Command = TypeVar("Command", bound=Callable[..., None])


def explained(command: Command) -> Command:
    """Errors as one line and exit code 1; Ctrl-C as a line that says how to go on, and 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from onmanifold.foundation.errors import OnManifoldError

        try:
            command(*args, **kwargs)
        except OnManifoldError as error:
            if kwargs.get("debug"):
                raise
            complain(f"error: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            complain("Interrupted. What is finished is kept; the same command goes on from there:")
            complain(f"  {called()}")
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]


def complain(line: str) -> None:
    """An error or a note, in one line."""
    typer.echo(" ".join(line.splitlines()) if line.startswith("error:") else line, err=True)


def say(line: str) -> None:
    """A line of progress."""
    typer.echo(line, err=True)


def called() -> str:
    """The command as it was typed."""
    return shlex.join(["onmanifold", *sys.argv[1:]])


def width() -> int:
    """Columns of the terminal."""
    from rich.console import Console

    return Console().width


def show(*items: Any) -> None:
    """Text with markup, or tables."""
    from rich.console import Console

    console = Console(highlight=False)
    for item in items:
        console.print(item)


_COLOURS = {"holds": "green", "does not hold": "red"}


def _judged(text: str, verdict: str) -> str:
    """A statement and its verdict, with markup."""
    from rich.markup import escape

    colour = _COLOURS.get(verdict, "yellow")
    return f"\n[bold]{escape(text)}[/bold]: [bold {colour}]{verdict}[/bold {colour}]"


def present_findings(findings: Findings, folder: Path) -> None:
    """Tables and statements of an analysis, and where its files are."""
    from rich.markup import escape
    from rich.table import Table

    from onmanifold.reports.html import format_number

    for name, data in findings.tables.items():
        table = Table(title=name.replace("_", " "), box=None, title_justify="left")
        for column in data.columns:
            table.add_column(escape(str(column)))
        for row in data.head(findings.shown).itertuples(index=False):
            table.add_row(*(escape(format_number(cell)) for cell in row))
        show("", table)
        if len(data) > findings.shown:
            show(f"[dim]… {len(data):,} rows in {folder / f'{name}.csv'}[/dim]")
    for statement in findings.statements:
        show(
            _judged(statement.text, statement.verdict), f"  [dim]{escape(statement.numbers)}[/dim]"
        )
    show(f"\nPage: {folder / 'analysis.html'}", f"Figures: {folder / 'figures'}")


def present(results: Results) -> None:
    """Table, claims and where the files are; exit code 1 where a run failed."""
    from rich.markup import escape

    from onmanifold.reports.html import format_signed

    show("", results.table.to_rich(width()))
    for judgement in results.judgements:
        show(_judged(judgement.claim.text, judgement.verdict))
        for finding in judgement.findings:
            numbers = "not measured"
            if finding.verdict != "not measured":
                low, high = format_signed(finding.low), format_signed(finding.high)
                numbers = f"{finding.lhs:.1f} against {finding.rhs:.1f}, excess {format_signed(finding.excess)}"
                numbers += f" \\[{low}, {high}]: {finding.verdict}"
            show(f"  {escape(finding.statement)}: [dim]{numbers}[/dim]")
    show(f"\nPage: {results.out / 'report.html'}", f"Table: {results.out / 'table.csv'}")
    for failure in results.failures:
        complain(f"error: {failure.method}, seed {failure.seed}: {failure.error}")
    if results.failures:
        raise typer.Exit(1)
