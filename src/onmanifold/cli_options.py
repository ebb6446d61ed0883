"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["32", "bf16"]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings of the experiment, such as training.epochs=3."
    ),
]
ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment file.")]
Checkpoint = Annotated[Path, typer.Argument(help="A saved classifier (safetensors).")]
ExperimentOption = Annotated[
    Path | None,
    typer.Option(
        "--experiment", "-e", help="Experiment file with data and attacks; default: the demo's."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the results; default: runs/<name>.")
]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the runs, to share them; default: <out>/store."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Of training and attacks; default: as the experiment says.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, help="Processes that share the trainings.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
