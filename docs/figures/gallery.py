"""Writes docs/gallery.md and its pictures: every analysis file under experiments/analyses, by one command.

Run from the repository's root: ``python docs/figures/gallery.py [NAME ...]``. With names, only these are run, and
the others' pictures and words stay. What was trained or measured before is found again in ``runs/``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from onmanifold.experiments.analyses.run import AnalysisSpec, load_analysis, run_analysis

FILES = Path("experiments/analyses")
PICTURES = Path("docs/images/gallery")
PAGE = Path("docs/gallery.md")
# Of an SVG, in bytes, beyond which the page shows the PNG.
LARGEST = 400_000

HEAD = """# Gallery

Every figure that `onmanifold analyse` draws, made by `python docs/figures/gallery.py` from the files under
`experiments/analyses`. Under each stand the command that makes it alone, and what its numbers say about the
claims; each command also writes all numbers as CSV, the figures as SVG and PNG, and a page.
"""


def main(names: list[str]) -> None:
    """Run what is asked for, then write the page of all that was ever run."""
    paths = sorted(FILES.glob("*.yaml"))
    for path in paths:
        if not names or path.stem in names:
            print(f"== {path}", flush=True)
            spec = load_analysis(path)
            run_analysis(spec, say=print, command=command_of(path))
            keep(spec)
    sections = [section(path, load_analysis(path)) for path in paths]
    PAGE.write_text(HEAD + "".join(sections), encoding="utf-8")


def command_of(path: Path) -> str:
    """The command that runs one file."""
    return f"onmanifold analyse {path}"


def keep(spec: AnalysisSpec) -> None:
    """Copy the figures and the findings of an analysis to the documentation."""
    folder = PICTURES / spec.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results = Path("runs") / spec.name
    shutil.copy(results / "findings.json", folder)
    for name in json.loads((results / "findings.json").read_text(encoding="utf-8"))["figures"]:
        drawn = results / "figures" / f"{name}.svg"
        chosen = drawn if drawn.stat().st_size <= LARGEST else drawn.with_suffix(".png")
        shutil.copy(chosen, folder)


def section(path: Path, spec: AnalysisSpec) -> str:
    """A section of the page; empty where the analysis was never run."""
    folder = PICTURES / spec.name
    if not (folder / "findings.json").is_file():
        return ""
    found = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    parts = [f"\n## {spec.title or spec.name}\n"]
    if spec.description:
        parts.append(f"\n{spec.description.strip()}\n")
    for name, words in found["figures"].items():
        (picture,) = folder.glob(f"{name}.*")
        where = picture.relative_to(PAGE.parent)
        parts.append(f"\n![{words['title']}]({where})\n\n*{words['title']}.* {words['caption']}\n")
    parts.append(f"\n```\n{command_of(path)}\n```\n")
    for statement in found["statements"]:
        source = f" ({statement['source']})" if statement["source"] else ""
        parts.append(
            f"\n- {statement['text']}{source}: **{statement['verdict']}**. {statement['numbers']}"
        )
    return "".join(parts) + ("\n" if found["statements"] else "")


if __name__ == "__main__":
    main(sys.argv[1:])
