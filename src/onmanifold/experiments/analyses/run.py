"""Running an analysis: from its file to tables, figures and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict

from onmanifold.experiments.analyses.base import ANALYSES, Analysis, Findings, Workplace
from onmanifold.experiments.runner import open_session
from onmanifold.experiments.spec import (
    Mapped,
    apply_overrides,
    load_experiment,
    read_yaml,
)
from onmanifold.foundation.errors import ConfigError, DataError
from onmanifold.foundation.files import write_atomically, write_json
from onmanifold.foundation.registry import Context, build_component, nearest
from onmanifold.reports import figures
from onmanifold.reports.html import Picture, format_number, render


@dataclass(frozen=True)
class AnalysisSpec:
    """A checked analysis file.

    Attributes:
        name: Names the folder of results.
        analysis: Specification of the analysis.
        experiment: Whose classifiers are looked at: an experiment's content, or the path of its file.
        title: Heading of the page.
        description: A paragraph for the page.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    name: str
    analysis: Mapped | str
    experiment: Mapped | str | None = None
    title: str = ""
    description: str = ""


@dataclass(frozen=True)
class AnalysisPage:
    """All that the page shows."""

    title: str
    description: str
    findings: Findings
    pictures: tuple[Picture, ...]
    command: str
    specification: str


def load_analysis(source: str | Path | Mapped, overrides: Iterable[str] = ()) -> AnalysisSpec:
    """Read an analysis file, or take an analysis by its name with the settings that it has by itself.

    Args:
        source: Path of a YAML file, its content, or the name of an analysis such as "theory".
        overrides: ``"key.sub=value"`` each, the value in YAML, such as ``analysis.samples=1000``.

    Raises:
        DataError: The file cannot be read.
        ConfigError: It is not YAML; a key is unknown or missing; a value has the wrong type.
    """
    if isinstance(source, Mapping):
        content, label = dict(source), "analysis"
    elif Path(source).suffix in (".yaml", ".yml"):
        content, label = dict(read_yaml(Path(source))), str(source)
    elif str(source) in ANALYSES.entries:
        content, label = {"name": str(source), "analysis": {"type": str(source)}}, str(source)
    else:
        raise ConfigError(
            f"{str(source)!r} is neither a YAML file nor an analysis."
            f"{nearest(str(source), ANALYSES.entries)}"
        )
    spec = build_component(AnalysisSpec, apply_overrides(content, overrides), Context(), label)
    if "/" in spec.name or spec.name in ("", ".", ".."):
        raise ConfigError(f"{label}: name: expected a folder's name, found {spec.name!r}.")
    return spec


def run_analysis(
    spec: AnalysisSpec,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    say: Callable[[str], object] = lambda line: None,
    bars: bool = False,
    command: str = "",
) -> Findings:
    """Run an analysis and keep its tables as CSV, its figures as SVG and PNG, and a page.

    Args:
        spec: From `load_analysis`.
        out: Folder of the results; None: ``runs/<name>``.
        device: "auto", "cpu" or "cuda".
        say: Told in a line each what happens.
        bars: Whether to show progress bars.
        command: How this was called, for the page.

    Raises:
        ConfigError: The specification is wrong.
        DataError: Data is missing, or results cannot be written.
    """
    out = Path("runs") / spec.name if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; the results need a folder.")
    analysis = _build(spec)
    session = None
    if spec.experiment is not None:
        experiment = load_experiment(spec.experiment)
        # Beside other experiments' results, so that one that was run before is found again.
        place = out / "experiment" if isinstance(spec.experiment, Mapping) else None
        session = open_session(experiment, place, device=device, say=say, bars=bars)
    findings = analysis.run(Workplace(out, device, say, bars, session))
    _keep(spec, findings, out, command or f"onmanifold analyse {spec.name}")
    return findings


def _build(spec: AnalysisSpec) -> Analysis:
    try:
        analysis = ANALYSES.build(spec.analysis)
    except ConfigError as error:
        raise ConfigError(f"analysis: {error}") from error
    if analysis.needs_experiment and spec.experiment is None:
        raise ConfigError(
            f"experiment: the analysis {type(analysis).registered_name!r} looks at the classifiers of an "
            "experiment; say which, such as experiment=experiments/fonts_dmat.yaml."
        )
    return analysis


def _keep(spec: AnalysisSpec, findings: Findings, out: Path, command: str) -> None:
    for name, table in findings.tables.items():
        write_atomically(out / f"{name}.csv", table.to_csv(index=False).encode())
    pictures = []
    for name, drawing in findings.drawings.items():
        document = figures.to_svg(drawing.figure)
        write_atomically(out / "figures" / f"{name}.svg", document.encode())
        write_atomically(out / "figures" / f"{name}.png", figures.to_png(drawing.figure))
        inline = figures.inline_svg(document, name, drawing.title)
        pictures.append(Picture(drawing.title, drawing.caption, inline))
    content: dict[str, Any] = {key: value for key, value in asdict(spec).items() if value}
    write_json(
        out / "findings.json",
        {
            "specification": content,
            "statements": [asdict(statement) for statement in findings.statements],
            "figures": {
                name: {"title": drawing.title, "caption": drawing.caption}
                for name, drawing in findings.drawings.items()
            },
        },
    )
    page = AnalysisPage(
        title=spec.title or spec.name,
        description=spec.description.strip(),
        findings=findings,
        pictures=tuple(pictures),
        command=command,
        specification=yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100),
    )
    write_atomically(
        out / "analysis.html", render("analysis.html", page, number=format_number).encode()
    )
