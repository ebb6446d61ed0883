"""From finished runs to what people look at: table, ledger, claims, figures and the HTML page."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from numpy.typing import NDArray

from onmanifold.classifiers import load_classifier
from onmanifold.evaluation import STANDARD, Evaluation
from onmanifold.evaluation.ledger import write_table
from onmanifold.experiments.setup import Setup
from onmanifold.experiments.store import Run
from onmanifold.foundation.files import write_atomically, write_json
from onmanifold.reports import figures
from onmanifold.reports.claims import OVERFITTING, Cell, Claim, Judgement, judge
from onmanifold.reports.html import Page, Picture, RunRecord, format_seconds, render_page
from onmanifold.reports.tables import Table

_EXAMPLES = 5
# More would be too small to see, and each is attacked again.
_SHOWN_METHODS = 8

TRAINING_PANELS = {
    "training loss": ("train_loss", 1.0),
    "validation accuracy (%)": ("validation_accuracy", 100.0),
    "robust validation accuracy (%)": ("validation_robust_accuracy", 100.0),
}


@dataclass
class Trained:
    """A method and a seed: their training, their evaluation, and what went wrong.

    Attributes:
        method: Name in the table.
        seed: Of the training.
        training: The run that holds the classifier.
        evaluation: The run that holds the ledger.
        error: Why it failed, else "".
    """

    method: str
    seed: int
    training: Run
    evaluation: Run
    error: str = ""

    @property
    def classifier(self) -> Path:
        """File of the trained classifier."""
        return self.training.folder / "best.safetensors"

    def record(self) -> RunRecord:
        """For the report."""

        def seconds(run: Run) -> float | None:
            return float(run.result()["seconds"]) if run.finished else None

        error = self.error or ("" if self.evaluation.finished else "not finished")
        return RunRecord(
            self.method,
            self.seed,
            seconds(self.training),
            seconds(self.evaluation),
            self.training.identifier,
            error,
        )


@dataclass(frozen=True)
class Results:
    """What an experiment gave.

    Attributes:
        table: Accuracies.
        judgements: The claims and their verdicts.
        runs: One record for each method and seed.
        out: Folder with table.csv, table.md, ledger.parquet, results.json, report.html and figures.
    """

    table: Table
    judgements: Sequence[Judgement]
    runs: Sequence[RunRecord]
    out: Path

    @property
    def failures(self) -> list[RunRecord]:
        """Runs without a result."""
        return [run for run in self.runs if run.error]


def summarise(
    setup: Setup, jobs: Sequence[Trained], out: Path, command: str, seconds: float | None
) -> Results:
    """Write table, ledger, claims, figures and page of what is finished.

    Args:
        setup: The experiment's objects.
        jobs: All runs, finished or not.
        out: Where to.
        command: How this was called.
        seconds: How long this call has worked, or None.
    """
    experiment = setup.experiment
    finished = [job for job in jobs if job.evaluation.finished]
    evaluations = [Evaluation.load(job.evaluation.folder / "ledger.parquet") for job in finished]
    outcomes = _outcomes(setup, finished, evaluations)
    table = Table.of(experiment.methods, experiment.columns, outcomes)
    judgements = [_judge(setup, claim, finished, evaluations) for claim in experiment.claims]
    results = Results(table, judgements, [job.record() for job in jobs], out)

    if evaluations:
        write_table(out / "ledger.parquet", _joined(finished, evaluations))
    write_atomically(out / "table.csv", table.to_csv().encode())
    write_atomically(out / "table.md", table.to_markdown().encode())
    write_json(out / "results.json", _as_json(results))
    pictures = _draw(setup, jobs, table, out / "figures")
    page = Page(
        title=experiment.title or experiment.name,
        description=experiment.description.strip(),
        table=table,
        judgements=judgements,
        overview=pictures.get("accuracy"),
        examples=[picture for name, picture in pictures.items() if name.startswith("examples")],
        curves=pictures.get("training"),
        runs=results.runs,
        specification=yaml.safe_dump(
            experiment.content, sort_keys=False, allow_unicode=True, width=100
        ),
        commands=[command or f"onmanifold run {out / 'experiment.yaml'} --out {out}"],
        facts=_facts(setup, results, seconds),
    )
    write_atomically(out / "report.html", render_page(page).encode())
    return results


def _judge(
    setup: Setup, claim: Claim, finished: Sequence[Trained], evaluations: Sequence[Evaluation]
) -> Judgement:
    """Judge a claim by the seeds that all methods it speaks of have finished, to compare like with like."""
    methods = {method for method, _ in claim.cells()}
    seeds = [{job.seed for job in finished if job.method == method} for method in methods]
    common = set.intersection(*seeds) if seeds else set()
    pairs = [
        (job, evaluation)
        for job, evaluation in zip(finished, evaluations, strict=True)
        if job.seed in common and job.method in methods
    ]
    jobs = [job for job, _ in pairs]
    measured = _outcomes(setup, jobs, [evaluation for _, evaluation in pairs])
    return judge([claim], {**measured, **_overfitting(jobs)})[0]


def _outcomes(
    setup: Setup, finished: Sequence[Trained], evaluations: Sequence[Evaluation]
) -> dict[Cell, list[NDArray[np.bool_]]]:
    """Which test images each method classifies correctly, for each column and seed."""
    experiment = setup.experiment
    outcomes: dict[Cell, list[NDArray[np.bool_]]] = {}
    for job, evaluation in zip(finished, evaluations, strict=True):
        for column in experiment.columns:
            if column in experiment.worst_case:
                parts = [evaluation.correct(member) for member in experiment.worst_case[column]]
                correct = np.logical_and.reduce(parts)
            else:
                correct = evaluation.correct(column)
            outcomes.setdefault((job.method, column), []).append(correct)
    return outcomes


def _overfitting(finished: Sequence[Trained]) -> dict[Cell, list[NDArray[np.float64]]]:
    """Robust overfitting of each method and seed, of those that measure robust accuracy while they train."""
    fallen: dict[Cell, list[NDArray[np.float64]]] = {}
    for job in finished:
        history = job.training.result()["history"]
        robust = [entry["validation_robust_accuracy"] for entry in history]
        if None not in robust:
            drop = np.array([max(robust) - robust[-1]])
            fallen.setdefault((job.method, OVERFITTING), []).append(drop)
    return fallen


def _joined(finished: Sequence[Trained], evaluations: Sequence[Evaluation]) -> pa.Table:
    """All ledgers as one, with the columns method and seed in front."""
    tables = []
    for job, evaluation in zip(finished, evaluations, strict=True):
        rows = evaluation.ledger.replace_schema_metadata(None)
        rows = rows.add_column(0, "seed", pa.array([job.seed] * len(rows), pa.int64()))
        tables.append(rows.add_column(0, "method", pa.array([job.method] * len(rows), pa.string())))
    return pa.concat_tables(tables, promote_options="default")


def _as_json(results: Results) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return round(value, 4) if np.isfinite(value) else None

    rows = {
        method: {
            column: entry
            and {
                "mean": finite(entry.mean),
                "low": finite(entry.low),
                "high": finite(entry.high),
                "seeds": [finite(value) for value in entry.values],
            }
            for column, entry in zip(results.table.columns, row, strict=True)
        }
        for method, row in results.table.rows.items()
    }
    claims = [
        {
            "claim": judgement.claim.text,
            "verdict": judgement.verdict,
            "comparisons": [
                {
                    "statement": finding.statement,
                    "verdict": finding.verdict,
                    "numbers": [finite(finding.lhs), finite(finding.rhs)],
                    "excess": finite(finding.excess),
                    "interval": [finite(finding.low), finite(finding.high)],
                }
                for finding in judgement.findings
            ],
        }
        for judgement in results.judgements
    ]
    runs = [vars(run) for run in results.runs]
    return {"images": results.table.images, "accuracy": rows, "claims": claims, "runs": runs}


def _draw(setup: Setup, jobs: Sequence[Trained], table: Table, folder: Path) -> dict[str, Picture]:
    """Draw the figures, keep each as SVG and PNG, and give them ready for the page."""
    pictures: dict[str, Picture] = {}

    def keep(name: str, figure: Any, title: str, caption: str) -> None:
        document = figures.to_svg(figure)
        write_atomically(folder / f"{name}.svg", document.encode())
        write_atomically(folder / f"{name}.png", figures.to_png(figure))
        pictures[name] = Picture(
            title, caption, figures.inline_svg(document, name, title or caption)
        )

    if not table.images:
        return pictures
    caption = (
        "Accuracy of each method under each attack, with 95 % intervals. The adversary may always leave an image "
        "as it is."
    )
    keep("accuracy", figures.accuracy_figure(table), "", caption)
    examples = _examples(setup, jobs)
    for number, attack in enumerate(examples.adversarial):
        caption = (
            f"Test images under {attack}. For each method: the image that the attack found, the class that the "
            "classifier sees in it (✗ where it is fooled), and how far each pixel moved. One scale serves all "
            "methods, so a brighter picture is a stronger perturbation."
        )
        if len(table.rows) > _SHOWN_METHODS:
            caption += f" The first {_SHOWN_METHODS} of {len(table.rows)} methods."
        keep(f"examples-{number}", figures.examples_figure(examples, attack), attack, caption)
    histories = {
        method: [
            job.training.result()["history"]
            for job in jobs
            if job.method == method and job.training.finished
        ]
        for method in table.rows
    }
    curves = figures.training_figure(histories, TRAINING_PANELS)
    if curves is not None:
        caption = (
            "Each method while it is trained. Validation images are held out from the training images. Robust: "
            "under the attacks that the method itself trains against, so these curves do not compare methods."
        )
        keep("training", curves, "", caption)
    return pictures


def _examples(setup: Setup, jobs: Sequence[Trained]) -> figures.Examples:
    """The same few test images, attacked on each method's classifier of the first seed."""
    finished = [
        job
        for job in jobs
        # Results may have come here without the classifiers; the numbers do not need them.
        if job.evaluation.finished
        and job.seed == setup.experiment.seeds[0]
        and job.classifier.is_file()
    ]
    if not finished:
        return figures.Examples(np.empty((0, *setup.test.image_shape), np.float32), [])
    chosen = {job.method: load_classifier(job.classifier) for job in finished[:_SHOWN_METHODS]}
    positions = _choose(setup, jobs)
    batch = setup.test.batch(positions)
    classes = setup.test.classes
    adversarial: dict[str, dict[str, NDArray[np.float32]]] = {}
    predictions: dict[str, dict[str, list[str]]] = {}
    for name, attack in setup.attacks.items():
        adversarial[name], predictions[name] = {}, {}
        for method, model in chosen.items():
            seed = setup.experiment.evaluation.seed
            result = attack(
                model, batch.images, batch.labels, batch.codes, seed=seed, indices=batch.indices
            )
            adversarial[name][method] = result.images.float().numpy()
            predictions[name][method] = [classes[int(label)] for label in result.predictions]
    labels = [classes[int(label)] for label in batch.labels]
    return figures.Examples(batch.images.float().numpy(), labels, adversarial, predictions)


def _choose(setup: Setup, jobs: Sequence[Trained]) -> torch.Tensor:
    """Positions of the first images of different classes that all methods classify correctly when clean."""
    right = np.ones(len(setup.test), dtype=bool)
    for job in jobs:
        if job.evaluation.finished and job.seed == setup.experiment.seeds[0]:
            right &= Evaluation.load(job.evaluation.folder / "ledger.parquet").correct(STANDARD)
    labels = setup.test.labels.numpy()
    # Images that some method gets wrong come last: then the attack had nothing to do.
    order = np.argsort(~right, kind="stable")
    first = {
        int(label): int(position)
        for position, label in reversed(list(zip(order, labels[order], strict=True)))
    }
    ranked = sorted(first.values(), key=lambda position: (not right[position], position))
    return torch.tensor(ranked[:_EXAMPLES])


def _facts(setup: Setup, results: Results, seconds: float | None) -> list[tuple[str, str]]:
    """What a reader needs to judge the numbers."""
    experiment = setup.experiment
    trained = [run for run in results.runs if run.training_seconds is not None]
    total = sum((run.training_seconds or 0) + (run.evaluation_seconds or 0) for run in trained)
    size = sum(
        parameter.numel() for parameter in setup.classifier(experiment.seeds[0]).parameters()
    )
    facts = [
        (
            "Data",
            f"{setup.train.name}: {len(setup.train):,} training and {len(setup.test):,} test images",
        ),
        ("Classifier", f"{experiment.classifier['type']}, {size:,} parameters"),
        (
            "Threat models",
            "; ".join(f"{name}: {_brief(spec)}" for name, spec in experiment.threats.items()),
        ),
        ("Seeds", ", ".join(str(seed) for seed in experiment.seeds)),
        ("Work", f"{format_seconds(total)} for {len(trained)} trainings and their evaluation"),
    ]
    if seconds is not None:
        facts.append(("This call", format_seconds(seconds)))
    facts.append(
        ("Versions", ", ".join(f"{name} {_version(name)}" for name in ("onmanifold", "torch")))
    )
    facts.append(
        ("", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    )
    facts.append(("Machine", f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads"))
    return [(name, value) for name, value in facts if value]


def _brief(spec: Any) -> str:
    if not isinstance(spec, dict):
        return str(spec)
    rest = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "type")
    return f"{spec.get('type')} ({rest})" if rest else str(spec.get("type"))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
