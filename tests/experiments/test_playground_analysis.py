"""The analysis of the plane: what is measured of which method, what is judged, what is refused."""

import pandas as pd
import pytest

from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.foundation.errors import ConfigError

BALL = {"type": "image_ball", "radius": 0.05}
EXPERIMENT = {
    "name": "tiny",
    "dataset": {"type": "two_moons", "train": 200, "test": 150},
    "classifier": {"type": "mlp", "hidden": [16], "mean": 0.5, "std": 0.25},
    "seeds": [0, 1],
    "training": {"epochs": 5, "batch_size": 50, "validation_fraction": 0},
    "methods": {
        "Normal": "normal",
        "AT": {"type": "adversarial", "attack": {"type": "pgd", "threat": BALL, "steps": 3}},
        "ATLD": {
            "type": "atld",
            "attack": {"type": "pgd", "threat": BALL, "steps": 1, "step_size": 0.05},
            "smoothing": 0.2,
            "discriminator_width": 16,
        },
    },
    "attacks": {"PGD": {"type": "pgd", "threat": BALL, "steps": 3}},
}
SETTINGS = {
    "type": "playground",
    "unsupervised": ["ATLD"],
    "points": 80,
    "arrows": 30,
    "resolution": 20,
}


def analysed(folder, experiment=EXPERIMENT, **changes):
    source = {"name": "p", "analysis": SETTINGS | changes, "experiment": experiment}
    return run_analysis(load_analysis(source), folder)


def test_all_methods_are_measured_and_those_that_perturb_are_judged(tmp_path):
    found = analysed(tmp_path)
    means = pd.read_csv(tmp_path / "means.csv").set_index("method")
    assert means.index.tolist() == ["Normal", "AT", "ATLD", "at random"]
    assert means.loc["Normal"].isna().sum() == len(means.columns) - 2
    moved = means.drop("Normal")
    assert moved["length"].between(0, 0.05 * 2**0.5 + 1e-6).all()
    assert moved["shift / length"].between(0, 1 + 1e-9).all()
    shares = means.drop(columns=["length", "distance to own class", "shift of the distribution"])
    assert shares.min().min() >= -1
    assert shares.max().max() <= 1 + 1e-9
    # Signs of gradients are within 45 degrees of them; of what follows nothing the mean is nought.
    assert means.loc["AT", "cosine with the loss gradient"] > 0.7
    assert abs(means.loc["at random", "cosine with the loss gradient"]) < 0.3
    assert means["IMT, clean"].notna().tolist() == [False, False, True, False]
    assert list(found.drawings) == ["boundaries", "perturbed", "fields", "imt"]
    assert len(pd.read_csv(tmp_path / "seeds.csv")) == 8
    assert [statement.verdict != "not measured" for statement in found.statements] == [True] * 3
    at, atld = (means.loc[name, "among another class"] for name in ("AT", "ATLD"))
    assert f"AT {at:.3f}, ATLD {atld:.3f}" in found.statements[1].numbers


def test_a_method_that_perturbs_nothing_is_not_measured(tmp_path):
    methods = {name: EXPERIMENT["methods"][name] for name in ("Normal", "AT")}
    few = EXPERIMENT | {"methods": methods, "seeds": [0]}
    found = analysed(tmp_path, few, unsupervised=["Normal"])
    assert {statement.verdict for statement in found.statements} == {"not measured"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"supervised": "At"}, "Unknown method 'At'. Did you mean 'AT'"),
        ({"supervised": "Normal"}, "trains against no attack"),
        ({"points": 150}, "fewer than the 150 test points"),
        ({"resolution": 1}, "resolution: expected at least 2"),
        ({"step_size": -1.0}, "step_size"),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        analysed(tmp_path, **changes)


def test_images_are_refused(tmp_path):
    fonts = {"type": "fonts", "train": 60, "test": 10, "folder": "embedded"}
    with pytest.raises(ConfigError, match="shows points of two coordinates"):
        analysed(tmp_path, EXPERIMENT | {"dataset": fonts})
