"""The experiment files that come with the project say what exists."""

import re
from pathlib import Path

import pytest

from onmanifold.experiments.fits import load_fit
from onmanifold.experiments.setup import build_parts, manifold_of
from onmanifold.experiments.spec import load_experiment, read_yaml
from onmanifold.foundation.registry import CLASSIFIERS, DATASETS, MANIFOLDS
from onmanifold.manifolds import build_manifold

ROOT = Path(__file__).parents[2]
ALL = (ROOT / "experiments").rglob("*.yaml")
FILES = sorted(path for path in ALL if path.parent.name != "analyses")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_all_that_a_file_names_can_be_built(path, monkeypatch):
    stand_in = build_manifold("ppca", 10, (1, 8, 8), seed=0, latent_size=3)

    def fitted(file):
        """In place of learning it."""
        assert load_fit(ROOT / file).manifold["type"] in MANIFOLDS.names()
        return stand_in

    monkeypatch.setitem(MANIFOLDS.entries, "fitted", fitted)
    content = read_yaml(path)
    if "methods" not in content:
        assert load_fit(path).manifold["type"] in MANIFOLDS.names()
        return
    experiment = load_experiment(path)
    assert experiment.dataset.type in DATASETS.names()
    assert experiment.classifier["type"] in CLASSIFIERS.names()
    if experiment.manifold is not None:
        assert manifold_of(experiment.manifold, experiment.dataset) is stand_in
    methods, attacks, training = build_parts(experiment, stand_in)
    assert methods.keys() == experiment.methods.keys()
    assert attacks.keys() == experiment.attacks.keys()
    assert training.epochs >= 1


def test_the_page_of_recipes_lists_the_papers_files():
    text = (ROOT / "docs" / "recipes.md").read_text()
    listed = set(re.findall(r"`([\w/]+\.yaml)`", text))
    there = {str(path.relative_to(ROOT / "experiments")) for path in FILES}
    papers = ("atld", "directions", "disentangling", "dmat", "ijsat")
    assert {name for name in there if name.startswith(papers)} <= listed <= there
