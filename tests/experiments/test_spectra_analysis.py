"""The analysis of spectra, on fonts whose exact manifold takes the place of a learned one."""

import pandas as pd
import pytest

from onmanifold.evaluation.statistics import verdict
from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.experiments.analyses.spectra import Spectra
from onmanifold.foundation.errors import ConfigError

EXPERIMENT = {
    "name": "tiny",
    "dataset": {"type": "fonts", "train": 200, "test": 60, "folder": "embedded"},
    "classifier": {"type": "mlp", "hidden": [8]},
    "training": {"epochs": 1, "batch_size": 50, "validation_fraction": 0},
    "methods": {"Normal": "normal", "Smooth": {"type": "label_smoothing"}},
    "attacks": {
        "noise": {"type": "fgsm", "threat": {"type": "image_ball", "radius": 0.3}},
        "latent": {"type": "fgsm", "threat": {"type": "latent_ball", "radius": 0.3}},
        "nothing": {"type": "fgsm", "threat": {"type": "latent_ball", "radius": 0.0}},
    },
}
SETTINGS = {
    "type": "spectra",
    "image": "noise",
    "latent": "latent",
    "leading": 3,
    "draws": 30,
    "batch_size": 25,
}


def analysed(folder, **changes):
    source = {"name": "s", "analysis": SETTINGS | changes, "experiment": EXPERIMENT}
    return run_analysis(load_analysis(source), folder)


def test_tables_figures_and_statements(tmp_path):
    found = analysed(tmp_path, reconstruction="nothing", latent_method="Smooth")
    assert set(found.drawings) == {"spectra", "classes", "directions"}
    assert len(found.statements) == 8
    table = pd.read_csv(tmp_path / "ratios.csv")
    # On an exact manifold an attack of radius 0 changes nothing.
    nothing = table[(table.attack == "nothing") & (table.measure == "ratio")]
    assert nothing.value.tolist() == pytest.approx([1.0] * len(nothing), rel=1e-4)
    columns = ["value", "low", "high"]
    pairs = [
        table[(table.attack == name) & (table.measure == "ratio") & (table["class"] == "all")]
        for name in ("latent", "latent after nothing")
    ]
    for one, two in zip(*(pair[columns].to_numpy() for pair in pairs), strict=True):
        assert one.tolist() == pytest.approx(two.tolist(), rel=1e-3)
    # Statements say what the table says.
    rows = table[(table.attack == "noise") & (table["class"] == "all") & (table.measure == "ratio")]
    for statement, part, sign in zip(found.statements, ("rest", "leading"), (1, -1), strict=False):
        chosen = rows[(rows.along == "eigenvalues") & (rows.directions == part)]
        value, low, high = chosen[columns].to_numpy()[0]
        assert f"sum of eigenvalues × {value:.3f} [{low:.3f}, {high:.3f}]" in statement.numbers
        assert statement.verdict == verdict(*sorted((sign * (low - 1), sign * (high - 1))))
    spectra = pd.read_csv(tmp_path / "spectra.csv")
    assert len(spectra) == 10 * 784
    total = spectra.groupby("class", sort=False)[
        ["clean, eigenvalues", "clean, clean directions"]
    ].sum()
    # Both are the whole variance.
    assert total.iloc[:, 0].tolist() == pytest.approx(total.iloc[:, 1].tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "noisy"}, "Unknown attack 'noisy'. Did you mean 'noise'"),
        ({"image_method": "Norm"}, "Unknown method 'Norm'"),
        ({"leading": 0}, "leading: expected at least 1"),
        ({"latent": "noise"}, "different attacks"),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        analysed(tmp_path, **changes)


def test_defaults_are_those_of_the_paper():
    assert (Spectra().leading, Spectra().image, Spectra().latent) == (30, "PGD-40", "VAE-FGSM")
