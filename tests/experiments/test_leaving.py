"""The analyses of leaving the manifold and of labels kept, on a tiny experiment, and their words and pictures."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from onmanifold.analysis.leaving import Leaving
from onmanifold.analysis.successful import Successful
from onmanifold.data.dataset import Batch
from onmanifold.experiments.analyses import leaving as leaving_module
from onmanifold.experiments.analyses import validity as validity_module
from onmanifold.experiments.analyses.leaving import first_images
from onmanifold.experiments.analyses.leaving_results import (
    judge,
    separation_table,
    success_table,
    tangent_table,
)
from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.experiments.setup import prepare
from onmanifold.experiments.spec import load_experiment
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.manifolds import FontsManifold
from onmanifold.reports.drawings.leaving import draw_angles, draw_distances
from onmanifold.reports.drawings.validity import Example, draw_examples

TINY = {
    "name": "tiny",
    "dataset": {"type": "fonts", "train": 300, "test": 12, "folder": "embedded"},
    "classifier": {"type": "mlp", "hidden": [32]},
    "training": {"epochs": 8, "batch_size": 20},
    "methods": {"Normal": "normal"},
    "attacks": {
        "PGD": {"type": "pgd", "threat": {"type": "image_ball", "radius": 0.3}, "steps": 5},
        "OM-PGD": {"type": "pgd", "threat": {"type": "latent_ball", "radius": 0.5}, "steps": 5},
    },
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Letters are not identified, which is tested elsewhere and takes its time: searches start anywhere."""
    monkeypatch.setattr(
        FontsManifold, "encode", lambda self, images, labels: self.sample_codes(labels, seed=1)
    )


def spec(analysis, **changes):
    return load_analysis({"name": "a", "analysis": analysis, "experiment": TINY | changes})


def test_leaving_the_manifold_of_letters(tmp_path):
    analysis = {
        "type": "leaving_the_manifold",
        "judged": 1,
        "neighbours": 5,
        "projection": {"steps": 20, "restarts": 0},
    }
    found = run_analysis(spec(analysis), tmp_path)
    images = pd.read_csv(tmp_path / "images.csv").set_index("kind")
    assert list(dict.fromkeys(images.index)) == ["clean", "random perturbation", "PGD", "OM-PGD"]
    assert images.loc["PGD"].to_manifold.min() > images.loc["clean"].to_manifold.max()
    success = found.tables["success"].set_index("attack")
    assert success.loc["PGD", "successful"] == len(images.loc["PGD"])
    assert success.loc["OM-PGD", "judged"] == 1
    assert success.loc["OM-PGD", "keep their label"] == 1.0
    areas = found.tables["separation"].set_index(["distance", "kind", "against"]).area
    assert areas["to_manifold", "PGD", "clean"] == 1.0
    assert set(found.drawings) == {
        "to_manifold",
        "to_neighbours",
        "step_to_neighbours",
        "angles",
    }
    texts = [item.text for item in found.statements]
    assert "Normal: regular adversarial examples by PGD leave the manifold" in texts
    assert "Normal: on-manifold adversarial examples by OM-PGD keep their label" in texts


@pytest.mark.parametrize("name", ["leaving_the_manifold", "validity"])
def test_a_seed_that_the_experiment_does_not_have(tmp_path, name):
    settings = {"type": name, "images": 1, "seed": 7}
    with pytest.raises(ConfigError, match=r"seeds of the experiment, .*, found 7"):
        run_analysis(spec(settings), tmp_path)
    assert not list(tmp_path.glob("**/result.json"))


def test_validity_of_letters(tmp_path):
    found = run_analysis(spec({"type": "validity", "images": 4, "examples": 2}), tmp_path)
    table = found.tables["validity"].set_index("attack")
    assert table.index.tolist() == ["clean", "OM-PGD"]
    row, examples = table.loc["OM-PGD"], found.tables["examples"]
    assert len(examples) == row.successful > 0
    # Their own codes are known, at distance 0.
    assert examples.own.max() < 1e-5
    assert row["keep their label"] == row["valid success rate"] / row["success rate"] == 1.0
    assert (examples.label != examples.prediction).all()
    assert (examples.label != examples.other_class).all()
    assert set(found.drawings) == {"examples_1"}
    # Of the clean images nothing is said about any classifier.
    assert np.isnan(table.loc["clean", "right when clean"])
    assert table.loc["OM-PGD", "right when clean"] <= 4


class Stubborn(torch.nn.Module):
    """Sees the last class, which none of the first images is of."""

    def forward(self, images):
        return torch.nn.functional.one_hot(torch.full((len(images),), 9), 10) + 0 * images.sum()


@pytest.mark.parametrize(
    ("settings", "module"),
    [
        (
            {
                "type": "leaving_the_manifold",
                "images": 8,
                "judged": 0,
                "neighbours": 5,
                "projection": {"steps": 5, "restarts": 0},
            },
            leaving_module,
        ),
        ({"type": "validity", "images": 3, "examples": 2}, validity_module),
    ],
)
def test_one_useless_classifier_does_not_end_the_others(tmp_path, monkeypatch, settings, module):
    methods, load = {"methods": {"Useless": "normal", "Normal": "normal"}}, module.load_classifier
    turns = iter([lambda path: Stubborn(), load])
    monkeypatch.setattr(module, "load_classifier", lambda path: next(turns)(path))
    found = run_analysis(spec(settings, **methods), tmp_path)
    said = [item for item in found.statements if item.text.startswith("Useless: ")]
    assert [item.verdict for item in said] == ["not measured"]
    assert f"none of {settings['images']} test images right" in said[0].numbers
    assert any(item.text.startswith("Normal: ") for item in found.statements)
    for table in found.tables.values():
        assert set(table.classifier) <= {"", "Normal"}
        assert "Normal" in set(table.classifier)
    monkeypatch.setattr(module, "load_classifier", lambda path: Stubborn())
    found = run_analysis(spec(settings, **methods), tmp_path)
    assert [item.verdict for item in found.statements] == ["not measured"] * 2
    assert found.drawings == {}


def test_codes_of_the_data_are_not_taken_for_another_manifolds():
    setup = prepare(load_experiment(TINY))
    own = first_images(setup, setup.manifold, 3, torch.device("cpu"))
    assert own.codes.equal(setup.test.codes[:3])
    # As many columns: seven latents and the class; eight of another variant of the letters.
    ppca = {"type": "ppca", "image_shape": [1, 28, 28], "num_classes": 10, "latent_size": 7}
    easy = load_experiment(TINY | {"dataset": TINY["dataset"] | {"variant": "easy"}})
    for other in (MANIFOLDS.build(ppca), prepare(easy).manifold):
        assert other.code_size == own.codes.shape[1]
        batch = first_images(setup, other, 3, torch.device("cpu"))
        assert batch.codes is None
        assert batch.images.equal(own.images)


@pytest.mark.parametrize(
    ("analysis", "changes", "message"),
    [
        ({"type": "leaving_the_manifold", "images": 0}, {}, "images: expected at least 1"),
        ({"type": "leaving_the_manifold", "attacks": ["PGT"]}, {}, "Did you mean 'PGD'"),
        *(
            ({"type": kind, name: []}, {}, f"{name}: expected at least one, found none")
            for kind in ("leaving_the_manifold", "validity", "activation_maps", "snapshots")
            for name in ("methods", "attacks")
        ),
        ({"type": "validity", "examples": 0}, {}, "examples: expected at least 1"),
        (
            {
                "type": "validity",
                "judge": {"type": "ppca", "image_shape": [1, 28, 28], "num_classes": 10}
                | {"conditional": False},
            },
            {},
            "judge: the codes of ppca hold no class",
        ),
        (
            {"type": "validity"},
            {"attacks": {"PGD": TINY["attacks"]["PGD"]}},
            "expected one on a latent ball",
        ),
    ],
)
def test_wrong_settings(tmp_path, analysis, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_analysis(spec(analysis, **changes), tmp_path)


def made_up(*, share, distance, moved=1.0):
    """What might have been measured: of 30 images PGD fools on all, OM-PGD on all."""
    count = 30
    jitter = np.linspace(-0.02, 0.02, count)
    base = {"sample": np.arange(count), "label": 0}

    def rows(kind, perturbation, to_manifold, share):
        angle = np.degrees(np.arccos(np.sqrt(np.clip(share, 0, 1))))
        return pd.DataFrame(
            {
                "kind": kind,
                **base,
                "perturbation": perturbation,
                "to_manifold": to_manifold + jitter,
            }
            | {"to_neighbours": 1 + to_manifold + jitter, "share": share, "angle": angle}
            | {"step_to_neighbours": perturbation / 2 + jitter if perturbation else np.nan}
        )

    nothing = np.full(count, np.nan)
    along = rows("OM-PGD", 2.0, 0.05, moved + 0.1 * jitter)
    along["share_tenth"] = along["share_hundredth"] = moved + 0.1 * jitter
    images = [
        rows("clean", 0.0, 0.03, nothing),
        rows("random perturbation", 1.0, 1.0, 0.01 + 0.1 * jitter),
        rows("PGD", 1.0, distance, share + 0.1 * jitter),
        along,
    ]
    directions = [
        rows(kind, 0, 0, 0.01 + 0.1 * jitter) for kind in ("loss gradient", "random direction")
    ]
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count).long(), None, torch.arange(count))
    found = Successful(torch.arange(count), batch.images, batch.images)
    return Leaving(
        images=pd.concat(images, ignore_index=True),
        directions=pd.concat(directions)[["kind", "sample", "share", "angle"]],
        batch=batch,
        found={"PGD": found, "OM-PGD": found},
        on_manifold=("OM-PGD",),
        images_seen=40,
        rank=6.0,
        pixels=600,
        tolerance=0.1,
    )


def verdicts(leaving, kept=None):
    return {item.text.removeprefix("X: "): item.verdict for item in judge("X", leaving, kept or {})}


def test_verdicts_follow_the_numbers():
    said = verdicts(made_up(share=0.001, distance=0.99), {"OM-PGD": (30, 30)})
    assert (
        said["regular adversarial examples by PGD leave the manifold"] == "within noise"
    )  # of 30 pairs
    assert (
        said["PGD leaves it almost orthogonally, the distance is the perturbation's norm"]
        == "holds"
    )
    assert (
        said["perturbations by PGD lie less along the manifold than a random direction"] == "holds"
    )
    assert (
        said["the loss gradient lies less along the manifold than a random direction"]
        == "within noise"
    )
    assert said["to first order OM-PGD moves along the manifold"] == "holds"
    assert said["on-manifold adversarial examples by OM-PGD keep their label"] == "within noise"
    said = verdicts(made_up(share=0.5, distance=0.05, moved=0.5), {"OM-PGD": (3, 30)})
    assert said["regular adversarial examples by PGD leave the manifold"] == "does not hold"
    assert (
        said["PGD leaves it almost orthogonally, the distance is the perturbation's norm"]
        == "does not hold"
    )
    assert (
        said["perturbations by PGD lie less along the manifold than a random direction"]
        == "does not hold"
    )
    assert said["to first order OM-PGD moves along the manifold"] == "does not hold"
    assert said["on-manifold adversarial examples by OM-PGD keep their label"] == "does not hold"


def test_distances_of_a_manifold_that_clean_images_are_off_are_no_measure():
    said = verdicts(replace(made_up(share=0.001, distance=0.99), tolerance=0.01))
    text = "PGD leaves it almost orthogonally, the distance is the perturbation's norm"
    assert said[text] == "not measured"


SHARES = ["share", "share_tenth", "share_hundredth", "angle"]
FIRST_ORDER = "to first order OM-PGD moves along the manifold"
LESS = "perturbations by PGD lie less along the manifold than a random direction"


def without_shares(leaving, kind, rows):
    """As if these examples of a kind had not moved."""
    images = leaving.images.copy()
    places = images.index[images.kind == kind][rows]
    images.loc[places, SHARES] = np.nan
    return replace(leaving, images=images)


def test_moves_of_length_zero_have_no_share_and_do_not_count():
    leaving = made_up(share=0.001, distance=0.99)
    part = without_shares(leaving, "OM-PGD", slice(0, 3))
    statement = next(item for item in judge("X", part, {}) if FIRST_ORDER in item.text)
    assert statement.verdict == "holds"
    assert "on 27 (of 30; the others have no direction) examples" in statement.numbers
    row = tangent_table({"X": part}).set_index("kind").loc["OM-PGD"]
    shares = part.images[part.images.kind == "OM-PGD"].share
    assert (row.vectors, row["with a share"]) == (30, 27)
    assert row.share == pytest.approx(shares.dropna().mean())
    assert row.low < row.share


@pytest.mark.parametrize("left", [0, 1])
def test_what_has_too_few_shares_is_not_measured(left):
    leaving = made_up(share=0.001, distance=0.99)
    for kind, text in (("OM-PGD", FIRST_ORDER), ("PGD", LESS)):
        few = without_shares(leaving, kind, slice(left, None))
        statement = next(item for item in judge("X", few, {}) if text in item.text)
        assert statement.verdict == "not measured"
        assert f"{left} of 30 vectors" in statement.numbers
        row = tangent_table({"X": few}).set_index("kind").loc[kind]
        assert (row["with a share"], row.low, row.high) == (left, 0, 1)
        assert np.isnan(row.share) == (left == 0)


def test_intervals_of_shares_stay_shares():
    leaving = made_up(share=0.001, distance=0.99)
    images = leaving.images.copy()
    for kind, most, rest in (("PGD", 0.0, 0.03), ("OM-PGD", 1.0, 0.97)):
        places = images.index[images.kind == kind]
        images.loc[places, SHARES[:3]] = most
        images.loc[places[:1], SHARES[:3]] = rest
    leaving = replace(leaving, images=images)
    table = tangent_table({"X": leaving}).set_index("kind")
    assert table.loc["PGD", "low"] == 0 < table.loc["PGD", "share"] < table.loc["PGD", "high"]
    assert table.loc["OM-PGD", "high"] == 1 > table.loc["OM-PGD", "share"]
    numbers = next(item.numbers for item in judge("X", leaving, {}) if FIRST_ORDER in item.text)
    assert numbers.count(", 100.00]") == 3
    numbers = next(item.numbers for item in judge("X", leaving, {}) if LESS in item.text)
    assert "[0.00, 0." in numbers


def test_tables_of_what_was_measured():
    leaving = made_up(share=0.001, distance=0.99)
    areas = separation_table({"X": leaving}).set_index(["distance", "kind", "against"])
    assert areas.loc[("to_manifold", "PGD", "clean"), "area"] == 1.0
    # All within the tolerance of the search are at no distance.
    assert areas.loc[("to_manifold", "OM-PGD", "clean"), "area"] == 0.5
    assert areas.loc[("to_neighbours", "OM-PGD", "clean"), "area"] > 0.5
    table = success_table({"X": leaving}, {"X": {"OM-PGD": (8, 10)}}).set_index("attack")
    assert table.loc["OM-PGD", "valid success rate"] == pytest.approx(0.8)
    assert np.isnan(table.loc["PGD", "judged"])


def test_pictures_show_each_kind_once():
    one, two = made_up(share=0.001, distance=0.99), made_up(share=0.5, distance=0.05)
    images = {"A": one.images, "B": two.images}
    drawn = draw_distances(images, "to_manifold", "distance")
    labels = drawn.axes[0].get_legend_handles_labels()[1]
    assert labels == ["clean", "random perturbation", "PGD", "OM-PGD"]
    for pane in drawn.axes:
        for patch in pane.patches[::2]:
            assert patch.get_data().values.sum() == pytest.approx(1)
    looks = [
        (patch.get_edgecolor(), str(patch.get_linestyle())) for patch in drawn.axes[0].patches[1::2]
    ]
    assert len(set(looks)) == 4
    drawn = draw_angles(images, {"A": one.directions, "B": two.directions}, 0.01)
    labels = drawn.axes[0].get_legend_handles_labels()[1]
    assert labels == [
        "random perturbation",
        "PGD",
        "OM-PGD",
        "loss gradient",
        "random direction",
        "OM-PGD, a hundredth",
    ]
    assert drawn.axes[0].lines[0].get_xdata()[0] == pytest.approx(84.26, abs=0.01)


def test_what_was_not_measured_is_not_drawn():
    leaving = made_up(share=0.001, distance=0.99)
    clean = leaving.images[leaving.images.kind == "clean"]
    assert draw_distances({"A": clean}, "step_to_neighbours", "distance") is None
    assert draw_angles({"A": clean}, {"A": leaving.directions[:0]}, 0.01) is None
    drawn = leaving_module._drawings(
        {"A": replace(leaving, images=clean, directions=leaving.directions[:0])}, "fonts"
    )
    assert set(drawn) == {"to_manifold", "to_neighbours"}


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_are_marked(channels):
    image = np.full((channels, 4, 4), 0.5, dtype=np.float32)
    examples = [Example(image, image, image, "A", "B", "C", 1.25, kept) for kept in (True, False)]
    words = [text.get_text() for text in draw_examples(examples).axes[0].texts]
    assert [word for word in words if word[0] in "✓✗"] == ["✓ kept", "✗ lost"]
    assert words.count("C, 1.2") == words.count("seen: B") == 2
