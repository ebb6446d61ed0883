"""How accuracy grew while methods were trained (DMAT figure 3, IJSAT figures 2 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Workplace,
)
from onmanifold.experiments.summary import TRAINING_PANELS
from onmanifold.reports import figures


@ANALYSES.register("training_curves")
@dataclass(frozen=True)
class TrainingCurves(Analysis):
    """Loss, clean and robust accuracy on held-out images over the epochs of each method and seed."""

    needs_experiment: ClassVar[bool] = True

    def run(self, place: Workplace) -> Findings:
        jobs = place.trained()
        histories = {
            method: [job.training.result()["history"] for job in jobs if job.method == method]
            for method in dict.fromkeys(job.method for job in jobs)
        }
        rows = [
            {"method": job.method, "seed": job.seed, **entry}
            for job in jobs
            for entry in job.training.result()["history"]
        ]
        drawn = figures.training_figure(histories, TRAINING_PANELS)
        caption = "Each method while it is trained, on images held out from the training images."
        drawings = {} if drawn is None else {"curves": Drawing(drawn, "Training", caption)}
        return Findings({"epochs": pd.DataFrame(rows)}, drawings)
