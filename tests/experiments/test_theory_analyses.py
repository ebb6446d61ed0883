"""The analyses of theory: from the name to a page, what they state, and settings that cannot be."""

import json

import pandas as pd
import pytest

from onmanifold.experiments.analyses.base import ANALYSES, Workplace
from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.foundation.errors import ConfigError

PRINTED_WRONGLY = (
    "½ log",
    "O(q L⁻²)",
    "O(d (λ_min L)⁻²)",
    "that of eq. 4, where",
    "where new points are encoded",
    "sampling strategy does not matter",
)


def statements(specification, tmp_path):
    return {
        statement.text: statement
        for statement in ANALYSES.build(specification).run(Workplace(tmp_path)).statements
    }


def test_theory_by_its_name(tmp_path):
    found = run_analysis(load_analysis("theory"), tmp_path)
    for statement in found.statements:
        wrong = any(words in statement.text for words in PRINTED_WRONGLY)
        assert statement.verdict == ("does not hold" if wrong else "holds"), statement
        assert statement.numbers
        assert "Directions" in statement.source
    table = pd.read_csv(tmp_path / "closed_forms.csv")
    assert {"quantity", "theorem", "strategy", "closed form", "numeric", "difference"} <= {
        *table.columns
    }
    assert set(table.strategy) == {"encode", "posterior", "prior", "image"}
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {
        "ellipses",
        "spectrum",
        "risk",
    }
    assert json.loads((tmp_path / "findings.json").read_text())["statements"]


@pytest.mark.parametrize(
    "settings",
    [
        {"spectrum": [2.0, 1.0, 0.0], "latent_size": 2},
        {"spectrum": 7, "dimensions": 4, "latent_size": 2},
        {"spectrum": [2.0, 1.0], "latent_size": 2, "image_multiplier": 0.5},
    ],
)
def test_theory_of_other_spectra(tmp_path, settings):
    found = statements({"type": "theory", "samples": 1000, "fitted": 20, **settings}, tmp_path)
    for text, statement in found.items():
        if "not measured" not in statement.verdict and not any(
            words in text for words in PRINTED_WRONGLY
        ):
            assert statement.verdict == "holds", statement


def test_tsipras(tmp_path):
    found = statements({"type": "tsipras"}, tmp_path)
    verdicts = {text: statement.verdict for text, statement in found.items()}
    assert verdicts.pop("Then accurate classifiers are robust") == "does not hold"
    assert set(verdicts.values()) == {"holds"}
    small = {"type": "tsipras", "samples": 500, "radius": 0.5, "weights": [0.1, 2.0]}
    found = statements(small, tmp_path)
    bound = found[
        "Against every perturbation robust accuracy is at most p / (1 - p) times the standard error"
    ]
    assert bound.verdict == "not measured"


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ({"type": "theory", "multiplier": 1.0}, "multiplier: expected more than 1"),
        ({"type": "theory", "latent_size": 11}, "latent_size: expected from 1 to 10"),
        ({"type": "theory", "spectrum": [1.0, -2.0]}, "eigenvalues"),
        ({"type": "theory", "sigma": 2.0}, "noise_variance"),
        ({"type": "theory", "samples": 1}, "samples: expected at least 1000"),
        ({"type": "theory", "image_multiplier": 0.0}, "image_multiplier"),
        ({"type": "tsipras", "probability": 0.3}, "probability"),
        ({"type": "tsipras", "weights": [0.0]}, "weights"),
        ({"type": "tsipras", "samples": 0}, "samples"),
    ],
)
def test_settings_that_cannot_be(specification, message):
    with pytest.raises(ConfigError, match=message):
        ANALYSES.build(specification)
