"""The command line. Heavy imports stand inside the commands, so that help and lists answer at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from onmanifold.cli_options import (
    Checkpoint,
    Debug,
    Device,
    DeviceOption,
    ExperimentFile,
    ExperimentOption,
    Jobs,
    Out,
    Overrides,
    Precision,
    PrecisionOption,
    StoreOption,
    Threads,
)
from onmanifold.cli_output import (
    called,
    complain,
    explained,
    present,
    present_findings,
    say,
    show,
    width,
)

if TYPE_CHECKING:
    from onmanifold.experiments.setup import Setup
    from onmanifold.experiments.spec import Experiment

app = typer.Typer(
    name="onmanifold",
    help="Adversarial robustness relative to the data manifold: attacks, training and honest evaluation.",
    epilog="Start with: onmanifold demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``onmanifold`` command."""
    app()


def _version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        typer.echo(f"onmanifold {version('onmanifold')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
@explained
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path(
        "runs/demo"
    ),
    store: StoreOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: Threads = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", min=1, help="Processes that share the trainings; default: 2 on a CPU."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """DMAT in a few minutes on the fonts inside matplotlib: four methods, one table, figures, a page."""
    _run(_demo_file(), overrides, out, store, device, precision, threads, jobs, debug)


@app.command()
@explained
def run(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    out: Out = None,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: Threads = None,
    jobs: Jobs = 1,
    debug: Debug = False,
) -> None:
    """Train, evaluate and report; goes on where it stopped, and repeats nothing that is finished."""
    _run(experiment, overrides, out, store, device, precision, threads, jobs, debug)


@app.command()
@explained
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Only this method; may be repeated.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", "-s", help="Only this seed.")] = None,
    out: Out = None,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Train the methods of an experiment without evaluation; `run` finds the classifiers."""
    from onmanifold.experiments.runner import open_session, train_only

    _use_threads(threads)
    session = open_session(
        _experiment(experiment, overrides, precision),
        out,
        store=store,
        device=device,
        say=say,
        bars=sys.stderr.isatty(),
        debug=debug,
    )
    jobs = train_only(session, method or None, seed or None)
    for job in jobs:
        typer.echo(f"{job.method}, seed {job.seed}: {job.error or job.classifier}")
    if any(job.error for job in jobs):
        raise typer.Exit(1)


@app.command()
@explained
def fit(
    source: Annotated[
        str, typer.Argument(metavar="FIT", help="A fit file (YAML), or a manifold such as glow.")
    ],
    overrides: Overrides = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Which dataset; beside a mere name.")
    ] = None,
    out: Out = None,
    device: DeviceOption = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Learn a manifold from images, and measure it; goes on where it stopped."""
    from onmanifold.experiments.fits import load_fit, run_fit

    _use_threads(threads)
    spec = load_fit(source, dataset, overrides or ())
    run_fit(spec, out, device=device, say=typer.echo, bars=sys.stderr.isatty())


@app.command()
@explained
def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    experiment: ExperimentOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the ledger; the evaluation can then resume."),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: Threads = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Then look for signs that the accuracies deceive.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Attack a saved classifier with all attacks of an experiment, on its test images."""
    from onmanifold.evaluation import evaluate as evaluate_model
    from onmanifold.experiments.checkpoints import load_for, table_of
    from onmanifold.training.run import one_process

    _use_threads(threads)
    setup = _setup(experiment, overrides, precision)
    model = load_for(setup, checkpoint)
    measured = evaluate_model(
        model,
        setup.test,
        setup.attacks,
        batch_size=setup.experiment.evaluation.batch_size,
        seed=setup.experiment.evaluation.seed,
        directory=out,
        save_images=audit and out is not None,
        fabric=(fabric := one_process(setup.training.precision, device)),
        progress=sys.stderr.isatty(),
    )
    show(table_of(setup, checkpoint.stem, measured).to_rich(width()))
    if out is not None:
        typer.echo(f"Ledger: {out / 'ledger.parquet'}")
    if audit:
        from onmanifold.evaluation.audits import audit as audit_model

        found = audit_model(
            model.to(fabric.device),
            setup.test,
            setup.attacks,
            evaluation=measured if out is None else out,
            seed=setup.experiment.evaluation.seed,
            progress=sys.stderr.isatty(),
        )
        show("", found.to_rich(width()))
        if out is not None:
            found.to_json(out / "audit.json")
            typer.echo(f"Audit: {out / 'audit.json'}")


@app.command()
@explained
def attack(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    experiment: ExperimentOption = None,
    name: Annotated[
        str | None,
        typer.Option("--name", "-n", help="Which attack of the experiment; default: the last."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of test images.")] = 100,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")] = Path(
        "runs/attack"
    ),
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Attack a saved classifier on a few test images; keeps the images and shows them."""
    from onmanifold.experiments.checkpoints import attack_images
    from onmanifold.training.run import one_process

    _use_threads(threads)
    setup = _setup(experiment, overrides, precision)
    for line in attack_images(
        setup, checkpoint, name, count, out, one_process(setup.training.precision, device)
    ):
        typer.echo(line)


@app.command()
@explained
def project(
    images: Annotated[
        Path | None,
        typer.Argument(help="Images kept by `onmanifold attack`; default: clean test images."),
    ] = None,
    experiment: ExperimentOption = None,
    manifold: Annotated[
        Path | None,
        typer.Option("--manifold", "-m", help="A saved manifold; projects a whole dataset on it."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Which dataset, beside --manifold.")
    ] = None,
    split: Annotated[
        Literal["train", "test"], typer.Option(help="Which part of the dataset.")
    ] = "test",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE of the experiment; beside --manifold such as config.steps=100."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Number of images; default: 100, or the whole dataset."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the on-manifold dataset.")
    ] = None,
    device: DeviceOption = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Find the codes of images on a manifold, and how far from it they are.

    With --manifold all images of a dataset go into --out, with their codes:
    load_dataset("on_manifold", folder=...) reads them. The same command goes on
    where it stopped. Without, the distances of some test images are told.
    """
    _use_threads(threads)
    if manifold is None and dataset is None and out is None:
        from onmanifold.experiments.checkpoints import project_images

        for line in project_images(_setup(experiment, setting, None), images, count or 100):
            typer.echo(line)
        return
    from onmanifold.experiments.projecting import reconstruction_table, request, run_projection
    from onmanifold.foundation.errors import ConfigError

    if images is not None or experiment is not None:
        raise ConfigError("project: expected either a whole dataset, or images of an experiment.")
    if manifold is None or dataset is None or out is None:
        raise ConfigError("project: a whole dataset needs --manifold, --dataset and --out.")
    spec = request(manifold, dataset, split, count, setting or ())
    found = run_projection(spec, out, device=device, bars=sys.stderr.isatty())
    show(reconstruction_table(found))
    typer.echo(f"On-manifold dataset: {found.directory}")


@app.command()
@explained
def analyse(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ANALYSIS", help="An analysis file (YAML), or an analysis such as theory."
        ),
    ],
    overrides: Overrides = None,
    out: Out = None,
    device: DeviceOption = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Ask a question of theory, manifolds or classifiers: tables, figures, and what holds."""
    from onmanifold.experiments.analyses.run import load_analysis, run_analysis

    _use_threads(threads)
    spec = load_analysis(source, overrides or ())
    folder = Path("runs") / spec.name if out is None else out
    found = run_analysis(
        spec, folder, device=device, say=say, bars=sys.stderr.isatty(), command=called()
    )
    present_findings(found, folder)


@app.command()
@explained
def report(
    folder: Annotated[Path, typer.Argument(help="A folder of results, such as runs/demo.")],
    store: StoreOption = None,
    debug: Debug = False,
) -> None:
    """Write table, figures and page anew from what is finished in a folder of results."""
    from onmanifold.experiments.runner import report_only

    present(report_only(folder, store))


@app.command()
@explained
def fonts(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Of .ttf and .otf files; default: where FONTS is drawn from."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Say which fonts of a folder serve for FONTS, and why the others are left out."""
    from onmanifold.data.fonts import load_fonts

    found = load_fonts(folder)
    for font in found.rejected:
        print(font)
    print(found.summary())


@app.command(name="list")
@explained
def list_components(
    kind: Annotated[str | None, typer.Argument(help="Only one kind, such as attack.")] = None,
    debug: Debug = False,
) -> None:
    """What an experiment file can name: datasets, classifiers, threat models, attacks, methods ..."""
    from onmanifold.catalogue import KINDS, catalogue

    kinds = list(KINDS.values())
    wanted = kind if kind is None or kind in kinds else kind.rstrip("s")
    if wanted is not None and wanted not in kinds:
        complain(f"error: Unknown kind {kind!r}. Valid: {', '.join(kinds)}.")
        raise typer.Exit(1)
    from rich.markup import escape
    from rich.table import Table

    items = catalogue()
    for one in kinds if wanted is None else [wanted]:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for item in (item for item in items if item.kind == one):
            fields = f"\n[dim]{escape(', '.join(item.fields))}[/dim]" if item.fields else ""
            table.add_row(escape(item.name), escape(item.summary) + (fields if wanted else ""))
        if table.row_count:
            show(f"\n[bold]{one}[/bold]", table)
    if wanted is None:
        typer.echo("\nFields of each: onmanifold list KIND, such as: onmanifold list attack")
    else:
        typer.echo("\n* has no default")


def _demo_file() -> Path:
    return Path(__file__).parent / "experiments" / "demo.yaml"


def _run(
    file: Path,
    overrides: list[str] | None,
    out: Path | None,
    store: Path | None,
    device: Device,
    precision: Precision | None,
    threads: int | None,
    jobs: int | None,
    debug: bool,
) -> None:
    import torch

    from onmanifold.experiments.runner import run as run_experiment

    _use_threads(threads)
    if jobs is None:
        alone = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        jobs = 1 if alone or (os.cpu_count() or 1) < 2 else 2
    results = run_experiment(
        _experiment(file, overrides, precision),
        out,
        store=store,
        device=device,
        jobs=jobs,
        say=say,
        bars=sys.stderr.isatty(),
        command=called(),
        debug=debug,
    )
    present(results)


def _experiment(
    file: Path | None, overrides: list[str] | None, precision: Precision | None
) -> Experiment:
    from onmanifold.experiments.spec import load_experiment

    settings = list(overrides or [])
    if precision is not None:
        training = "bf16-mixed" if precision == "bf16" else "32-true"
        settings += [f"training.precision={training}", f"training.attack_precision='{precision}'"]
        settings += [f"evaluation.precision='{precision}'"]
    return load_experiment(_demo_file() if file is None else file, settings)


def _setup(file: Path | None, overrides: list[str] | None, precision: Precision | None) -> Setup:
    from onmanifold.experiments.setup import prepare

    return prepare(_experiment(file, overrides, precision))


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
