"""The report as one self-contained HTML page: no script, no outside file, no request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onmanifold.reports.claims import Judgement
from onmanifold.reports.tables import Table


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        title: Heading.
        caption: A sentence or two below it.
        svg: From `inline_svg`.
    """

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class RunRecord:
    """One training and its evaluation.

    Attributes:
        method: Name in the table.
        seed: Of the training.
        training_seconds: None where it did not end.
        evaluation_seconds: None where it did not end.
        identifier: Key in the run store.
        error: Why it failed, else "".
    """

    method: str
    seed: int
    training_seconds: float | None = None
    evaluation_seconds: float | None = None
    identifier: str = ""
    error: str = ""


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    title: str
    description: str
    table: Table
    judgements: Sequence[Judgement] = ()
    overview: Picture | None = None
    examples: Sequence[Picture] = ()
    curves: Picture | None = None
    runs: Sequence[RunRecord] = ()
    specification: str = ""
    commands: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def render_page(page: Page) -> str:
    """The page as HTML text; all values are escaped."""
    return render("report.html", page, seconds=format_seconds, signed=format_signed)


def render(template: str, page: object, **filters: Callable[..., str]) -> str:
    """A template of this folder, filled; all values are escaped but those that go through the filter ``svg``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("onmanifold.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters, svg=Markup)
    return environment.get_template(template).render(page=page)


def format_seconds(seconds: float | None) -> str:
    """A duration for people.

    >>> format_seconds(7.26), format_seconds(187), format_seconds(7300), format_seconds(None)
    ('7.3 s', '3 min 07 s', '2 h 01 min', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_signed(value: float) -> str:
    """One decimal with its sign; a true minus.

    >>> format_signed(-3.25), format_signed(0.04), format_signed(2)
    ('−3.2', '0.0', '+2.0')
    """
    text = f"{abs(value):.1f}"
    if float(text) == 0:
        return "0.0"
    return ("−" if value < 0 else "+") + text


def format_number(value: object) -> str:
    """A cell of a table for people: four significant digits.

    >>> format_number(0.123456), format_number(12), format_number("a"), format_number(1234567.0)
    ('0.1235', '12', 'a', '1.235e+06')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)
