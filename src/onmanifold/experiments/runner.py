"""Running an experiment: train each method and seed, evaluate, report; what is finished is not repeated."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from onmanifold.classifiers import load_classifier
from onmanifold.evaluation import Evaluation, evaluate
from onmanifold.experiments.helper import helpers
from onmanifold.experiments.setup import Setup, prepare
from onmanifold.experiments.spec import Experiment, load_experiment
from onmanifold.experiments.store import Store
from onmanifold.experiments.summary import Results, Trained, summarise
from onmanifold.foundation.errors import ConfigError, DataError
from onmanifold.foundation.files import write_atomically
from onmanifold.foundation.registry import nearest
from onmanifold.reports.html import format_seconds
from onmanifold.training import train
from onmanifold.training.run import one_process

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Say = Callable[[str], object]
"""Is told, in a line each, what happens."""

Work = Callable[["Session", Trained, str], None]
"""Does a job; the text says which of how many it is."""

_POLL_SECONDS = 0.5


@dataclass
class Session:
    """One call: the objects, where results go, and how the work is run.

    Attributes:
        setup: The experiment's objects.
        out: Folder of the results.
        store: Where runs are kept.
        fabric: Device and precision.
        say: Progress, a line at a time.
        bars: Whether to show progress bars.
        command: How this was called, for the report.
        debug: Let an unexpected error of one run end the whole.
    """

    setup: Setup
    out: Path
    store: Store
    fabric: Fabric
    say: Say = field(default=lambda line: None)
    bars: bool = False
    command: str = ""
    debug: bool = False

    def jobs(
        self, methods: Iterable[str] | None = None, seeds: Iterable[int] | None = None
    ) -> list[Trained]:
        """A job for each method and seed; seed by seed, so that a first whole table is there early."""
        experiment = self.setup.experiment
        methods = list(experiment.methods if methods is None else methods)
        for name in methods:
            if name not in experiment.methods:
                raise ConfigError(f"Unknown method {name!r}.{nearest(name, experiment.methods)}")
        jobs = []
        for seed in experiment.seeds if seeds is None else seeds:
            for method in methods:
                key = self.setup.training_key(method, seed)
                label = f"{method} s{seed}"
                training = self.store.run("training", label, key)
                evaluation = self.store.run("evaluation", label, self.setup.evaluation_key(key))
                jobs.append(Trained(method, seed, training, evaluation))
        return jobs


def run(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    store: str | Path | None = None,
    device: str = "auto",
    jobs: int = 1,
    say: Say | None = None,
    bars: bool = False,
    command: str = "",
    debug: bool = False,
) -> Results:
    """Train, evaluate and report; a run that was stopped goes on where it stopped.

    Args:
        experiment: From `load_experiment`.
        out: Folder of the results; None: ``runs/<name>``.
        store: Folder of the runs; None: ``<out>/store``. Experiments may share one: equal runs are shared.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        jobs: Number of processes that share the runs; each gets its part of the CPU threads.
        say: Told in a line each what happens.
        bars: Whether to show progress bars.
        command: How this was called, for the report.
        debug: Whether an unexpected error of one run ends the whole, instead of being reported at the end.

    Returns:
        The results. A method that failed has no numbers, and its error is in ``results.failures``.

    Raises:
        ConfigError: The experiment is wrong.
        DataError: The data is missing, or results cannot be written; what was computed is kept.
    """
    session = open_session(
        experiment,
        out,
        store=store,
        device=device,
        say=say,
        bars=bars,
        command=command,
        debug=debug,
    )
    started = time.perf_counter()
    (todo,) = run_all([session], jobs, device)
    return summarise(session.setup, todo, session.out, command, time.perf_counter() - started)


def run_all(
    sessions: Sequence[Session], jobs: int = 1, device: str = "auto"
) -> list[list[Trained]]:
    """Train and evaluate all that several experiments ask for, as one heap of work.

    Processes that were started apart share the heap too, by the locks of the store: none waits while there is
    work left in any of the experiments.

    Args:
        sessions: Opened experiments, each with a folder of its own and all with the same store.
        jobs: Number of processes that share the runs.
        device: As for `run`; of the further processes.

    Returns:
        The runs of each experiment; one that failed says why.
    """
    todo = [session.jobs() for session in sessions]
    heap = [(session, job) for session, own in zip(sessions, todo, strict=True) for job in own]
    if all(job.evaluation.finished for _, job in heap):
        jobs = 1
    with _sharing(sessions, min(jobs, len(heap)), device):
        _work_through(heap, _train_and_evaluate)
    return todo


@contextmanager
def _sharing(sessions: Sequence[Session], jobs: int, device: str) -> Iterator[None]:
    """Have further processes work on the same runs; the CPU threads are divided among all."""
    if jobs <= 1:
        yield
        return
    threads = torch.get_num_threads()
    share = max(1, threads // jobs)
    torch.set_num_threads(share)
    try:
        outs = [session.out for session in sessions]
        with helpers(jobs - 1, outs, sessions[0].store.root, device, share):
            yield
    finally:
        torch.set_num_threads(threads)


def work_from_behind(outs: Sequence[Path], store: Path, device: str) -> None:
    """Work on the runs of the experiments in folders of results, the last ones first, without a report."""
    heap: list[tuple[Session, Trained]] = []
    for out in outs:
        setup = prepare(load_experiment(out / "experiment.yaml"))
        fabric = one_process(setup.training.precision, device)
        session = Session(setup, out, Store(store), fabric)
        heap += [(session, job) for job in session.jobs()]
    _work_through(heap[::-1], _train_and_evaluate)


def train_only(
    session: Session, methods: Iterable[str] | None, seeds: Iterable[int] | None
) -> list[Trained]:
    """Train without evaluation; `run` finds the classifiers.

    Raises:
        ConfigError: Unknown method.
    """
    jobs = session.jobs(methods, seeds)
    _work_through([(session, job) for job in jobs], _train)
    return jobs


def report_only(out: str | Path, store: str | Path | None = None, command: str = "") -> Results:
    """Write the report anew from what is finished in a folder of results.

    Raises:
        DataError: The folder holds no experiment.
    """
    path = Path(out) / "experiment.yaml"
    if not path.is_file():
        raise DataError(f"{out} holds no results: there is no experiment.yaml in it.")
    session = open_session(load_experiment(path), out, store=store, command=command)
    return summarise(session.setup, session.jobs(), session.out, command, None)


def open_session(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    store: str | Path | None = None,
    device: str = "auto",
    say: Say | None = None,
    bars: bool = False,
    command: str = "",
    debug: bool = False,
) -> Session:
    """Load the data, build the components and keep the experiment file with the results; see `run`."""
    out = Path("runs") / experiment.name if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; the results need a folder.")
    say = say or (lambda line: None)
    started = time.perf_counter()
    setup = prepare(experiment)
    say(
        f"Data: {setup.train.name}, {len(setup.train):,} training and {len(setup.test):,} test images"
        f" ({format_seconds(time.perf_counter() - started)})"
    )
    text = yaml.safe_dump(experiment.content, sort_keys=False, allow_unicode=True, width=100)
    write_atomically(out / "experiment.yaml", text.encode())
    runs = Store(out / "store" if store is None else store)
    return Session(
        setup, out, runs, one_process(setup.training.precision, device), say, bars, command, debug
    )


def _work_through(heap: Sequence[tuple[Session, Trained]], work: Work) -> None:
    """Do all jobs; those that another process holds are left for later, so that processes share the work."""
    remaining = [
        (session, job, f"{number}/{len(heap)}")
        for number, (session, job) in enumerate(heap, start=1)
    ]
    waiting = False
    while remaining:
        held = [task for task in remaining if not _attempt(*task, work)]
        if held and len(held) == len(remaining):
            if not waiting:
                held[0][0].say("Waiting for another process that works on the same runs …")
            waiting = True
            time.sleep(_POLL_SECONDS)
        remaining = held


def _attempt(session: Session, job: Trained, place: str, work: Work) -> bool:
    """Do a job unless another process holds it; a failure is kept with the job."""
    with job.training.locked() as ours:
        if not ours:
            return False
        try:
            work(session, job, place)
        except DataError:
            # The disk is full or the data is gone: the other jobs would meet the same.
            raise
        except Exception as error:
            if session.debug:
                raise
            job.error = f"{type(error).__name__}: {error}"
            session.say(f"{job.method}, seed {job.seed} failed: {job.error}")
            trace = "".join(traceback.format_exception(error))
            write_atomically(job.training.folder / "error.txt", trace.encode())
    return True


def _train_and_evaluate(session: Session, job: Trained, place: str) -> None:
    _train(session, job, place)
    _evaluate(session, job, place)


def _train(session: Session, job: Trained, place: str) -> None:
    setup, training = session.setup, job.training
    label = f"[{place}] {job.method}, seed {job.seed}"
    if training.finished:
        session.say(f"{label}: trained before")
        return
    session.say(f"{label}: training …")
    started = time.perf_counter()
    result = train(
        setup.methods[job.method],
        setup.classifier(job.seed),
        setup.train,
        setup.training,
        directory=training.folder,
        seed=job.seed,
        progress=session.bars,
        fabric=session.fabric,
    )
    seconds = time.perf_counter() - started
    training.finish({"seconds": seconds, "history": result.history})
    session.say(f"{label}: trained in {format_seconds(seconds)}")


def _evaluate(session: Session, job: Trained, place: str) -> None:
    setup, evaluation = session.setup, job.evaluation
    label = f"[{place}] {job.method}, seed {job.seed}"
    if evaluation.finished:
        session.say(f"{label}: evaluated before")
        return
    started = time.perf_counter()
    model = load_classifier(job.classifier)
    spec = setup.experiment.evaluation
    measured = evaluate(
        model,
        setup.test,
        setup.attacks,
        batch_size=spec.batch_size,
        seed=spec.seed,
        # Beside the classifier and not in the evaluation's own folder, so that an experiment with other
        # attacks finds the batches of those that are the same.
        directory=job.training.folder / "evaluation",
        fabric=session.fabric,
        progress=session.bars,
    )
    seconds = time.perf_counter() - started
    measured.save(evaluation.folder / "ledger.parquet")
    evaluation.finish({"seconds": seconds})
    session.say(f"{label}: evaluated in {format_seconds(seconds)}, {_brief(measured)}")


def _brief(evaluation: Evaluation) -> str:
    names = ["standard", "worst case"] if evaluation.names else ["standard"]
    return ", ".join(f"{name} {100 * evaluation.accuracy(name):.1f} %" for name in names)
