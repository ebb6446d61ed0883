import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from onmanifold.attacks import FGSM, PGD
from onmanifold.evaluation import (
    Evaluation,
    Transfer,
    evaluate,
    model_digest,
    recheck,
    transfer,
    wilson_interval,
)
from onmanifold.evaluation.ledger import ledger_of, outcome_table
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.threats import ImageBall, LatentBall

STRONG = ImageBall(norm="linf", radius=0.05)
ATTACKS = {"PGD": PGD(STRONG, steps=5), "FGSM": FGSM(STRONG)}


@pytest.fixture(scope="module")
def models(toys):
    """Three models: one, a neighbour of it, and another."""
    near = toys.make_model()
    with torch.no_grad():
        near[4].weight += 0.06 * torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    return {"one": toys.make_model(), "near": near, "other": toys.make_model(seed=1)}


@pytest.fixture(scope="module")
def result(toys, models):
    return transfer(models, toys.make_dataset(), ATTACKS, batch_size=7)


def by_hand(models, dataset, attack):
    """Accuracies, a row per source: right on the clean image and on the transferred one."""
    rows = {}
    for source, model in models.items():
        images = attack(
            model, dataset.images, dataset.labels, dataset.codes, 0, dataset.indices
        ).images
        row = {}
        for target, judge in models.items():
            judge = copy.deepcopy(judge).eval()
            clean = judge(dataset.images).argmax(1) == dataset.labels
            right = judge(images).argmax(1) == dataset.labels
            row[target] = (clean & right).double().mean().item()
        rows[source] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def test_the_matrix_is_that_of_a_loop_by_hand(toys, models, result):
    for name, attack in ATTACKS.items():
        matrix = result.matrix(name)
        assert (matrix.index.name, matrix.columns.name) == ("source", "target")
        expected = by_hand(models, toys.make_dataset(), attack)
        np.testing.assert_allclose(matrix, expected.loc[matrix.index, matrix.columns])
    # Otherwise rows and columns could be mixed up unseen.
    assert not np.allclose(matrix, matrix.T)


def test_the_diagonal_is_the_white_box_evaluation(toys, models, result):
    for name, model in models.items():
        alone = evaluate(model, toys.make_dataset(), ATTACKS, batch_size=7)
        assert result.evaluations[name, name].ledger.equals(alone.ledger)
        assert result.clean_accuracy(name) == alone.accuracy()


def outcome(predictions):
    """All of class 0."""
    predictions, none = np.array(predictions), np.zeros(5, dtype=np.int64)
    return outcome_table(
        {
            "sample": np.arange(5),
            "label": none,
            "adversarial_prediction": predictions,
            "success": predictions != 0,
            "found_by": None,
            "objective": None,
            "forwards": none,
            "backwards": none,
        },
        5,
    )


def test_the_worst_case_is_per_sample_over_all_sources():
    def evaluation(clean, first, second):
        outcomes = {"A": outcome(first), "B": outcome(second)}
        return Evaluation(ledger_of(outcome(clean), outcomes, {}))

    clean = [0, 0, 0, 0, 1]  # the last is right where it is attacked: that does not count
    result = Transfer(
        {
            ("a", "a"): evaluation(clean, [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]),
            ("a", "b"): evaluation([0] * 5, [0] * 5, [0, 0, 0, 1, 1]),
            ("b", "a"): evaluation(clean, [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]),
            ("b", "b"): evaluation([0] * 5, [0, 0, 0, 1, 0], [0] * 5),
        }
    )
    assert result.worst_case("a") == 1 / 5
    assert result.correct("a").tolist() == [True, False, False, False, False]
    assert result.worst_case("b") == 3 / 5
    assert result.worst_case("a", sources=["b"]) == 2 / 5
    assert result.worst_case("a", attacks=["A"]) == 2 / 5
    assert result.worst_case("a", sources=["b"], attacks=["A"]) == 3 / 5
    assert result.worst_case("a", sources=[]) == result.clean_accuracy("a") == 4 / 5


def test_success_rates_say_what_they_are_shares_of(result):
    source, target = (result.evaluations[n, n].correct() for n in ("other", "near"))
    right = result.evaluations["other", "near"].correct("PGD")
    assert result.success_rate("PGD", "other", "near") == (target & ~right).sum() / target.sum()
    both = source & target
    rate = result.success_rate("PGD", "other", "near", base="both")
    assert rate == (both & ~right).sum() / both.sum() != result.success_rate("PGD", "other", "near")
    with pytest.raises(InputError, match="base"):
        result.success_rate("PGD", "other", "near", base="source")


def test_rows_have_wilson_intervals(result):
    rows = result.to_pandas(0.9).set_index(["attack", "source", "target"])
    assert len(rows) == 2 * 9
    row = rows.loc[("FGSM", "one", "other")]
    right = result.evaluations["one", "other"].correct("FGSM")
    assert row["n"] == 30
    assert row["accuracy"] == right.mean()
    assert (row["low"], row["high"]) == wilson_interval(int(right.sum()), 30, 0.9)
    count = int(result.evaluations["other", "other"].correct().sum())
    assert row["clean_accuracy"] == count / 30
    broken = count - int(right.sum())
    assert (row["success_low"], row["success_high"]) == wilson_interval(broken, count, 0.9)


def test_the_table_has_targets_by_sources_and_attacks(result):
    table = result.table()
    assert table.index.tolist() == ["one", "near", "other"]
    assert table.columns[0] == ("standard", "")
    assert table.columns[-1] == ("worst case", "")
    assert table.columns[1:3].tolist() == [("one", "PGD"), ("one", "FGSM")]
    assert table.loc["near", ("one", "FGSM")] == result.accuracy("FGSM", "one", "near")
    assert table[("standard", "")].tolist() == [result.clean_accuracy(n) for n in result.models]
    assert (table[("worst case", "")] <= table.iloc[:, 1:-1].min(axis=1)).all()


def test_round_trip(result, tmp_path):
    again = Transfer.load(result.save(tmp_path / "ledger.parquet"))
    pd.testing.assert_frame_equal(again.to_pandas(), result.to_pandas())
    pd.testing.assert_frame_equal(again.ledger.to_pandas(), result.ledger.to_pandas())
    provenance = result.evaluations["one", "near"].provenance
    assert again.evaluations["one", "near"].provenance == provenance
    result.evaluations["one", "one"].save(tmp_path / "plain.parquet")
    with pytest.raises(DataError, match="'source'"):
        Transfer.load(tmp_path / "plain.parquet")


def test_an_interrupted_transfer_goes_on_where_it_stopped(toys, models, tmp_path, monkeypatch):
    dataset, pair = toys.make_dataset(), {n: models[n] for n in ("one", "near")}

    def run(log, **options):
        attack = toys.Counting(STRONG, steps=3, log=str(tmp_path / log))
        return transfer(pair, dataset, attack, batch_size=10, **options)

    undisturbed = run("other.txt")
    monkeypatch.setenv("TOY_FAIL_AFTER", "4")  # in the second model's second batch
    with pytest.raises(KeyboardInterrupt):
        run("calls.txt", directory=tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.parquet").exists()
    monkeypatch.delenv("TOY_FAIL_AFTER")
    resumed = run("calls.txt", directory=tmp_path / "run")
    assert (tmp_path / "calls.txt").read_text().split() == ["3/1000", "3/1010", "3/1020"] * 2
    pd.testing.assert_frame_equal(resumed.ledger.to_pandas(), undisturbed.ledger.to_pandas())
    stored = Transfer.load(tmp_path / "run" / "ledger.parquet")
    pd.testing.assert_frame_equal(stored.to_pandas(), undisturbed.to_pandas())
    assert resumed.attacks == ("Counting",)
    assert (recheck(pair["near"], tmp_path / "run" / "near")["differing"] == 0).all()
    # Damaged images are made again, and nothing else.
    (broken,) = (tmp_path / "run" / "one").glob("shards/*/000001.safetensors")
    broken.write_bytes(broken.read_bytes()[:100])
    again = run("calls.txt", directory=tmp_path / "run")
    assert (tmp_path / "calls.txt").read_text().split()[6:] == ["3/1010"]
    pd.testing.assert_frame_equal(again.to_pandas(), undisturbed.to_pandas())


def test_only_what_is_new_is_computed_for_a_further_model(toys, models, tmp_path, monkeypatch):
    dataset, log = toys.make_dataset(), tmp_path / "calls.txt"
    attack = {"A": toys.Counting(STRONG, steps=3, log=str(log))}
    options = {"batch_size": 15, "directory": tmp_path / "run"}
    transfer({n: models[n] for n in ("one", "near")}, dataset, attack, **options)
    assert len(log.read_text().split()) == 4
    found = transfer(models, dataset, attack, **options)
    assert len(log.read_text().split()) == 6
    pd.testing.assert_frame_equal(
        found.matrix("A"), transfer(models, dataset, attack, batch_size=15).matrix("A")
    )


def test_results_do_not_depend_on_the_batch_size(toys, models, result):
    other = transfer(models, toys.make_dataset(), ATTACKS, batch_size=30)
    for attack in ATTACKS:
        pd.testing.assert_frame_equal(other.matrix(attack), result.matrix(attack))


def test_models_of_other_dtypes_and_wrappers_share_the_images(toys, models):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    given = {"one": fabric.setup_module(copy.deepcopy(models["one"])), "double": models["near"]}
    given["double"] = copy.deepcopy(models["near"]).double()
    digests = {name: model_digest(model) for name, model in given.items()}
    on_manifold = PGD(LatentBall(toys.Plane(), norm="l2", radius=0.5), steps=3)
    found = transfer(given, toys.make_dataset(), on_manifold, fabric=fabric)
    matrix = found.matrix("PGD").to_numpy()
    assert matrix.min() < found.clean_accuracy("one")
    assert {name: model_digest(model) for name, model in given.items()} == digests


def test_progress_adds_up(toys, models):
    seen = []
    transfer(
        {n: models[n] for n in ("one", "near")},
        toys.make_dataset(),
        ATTACKS,
        batch_size=20,
        progress=lambda *news: seen.append(news),
    )
    steps = [20, 30, 50, 60, 80, 90, 110, 120]
    assert seen == [(name, done, 120) for name in ("one", "near") for done in steps]


class Pixels(nn.Module):
    """As many classes as the first so many pixels."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, images):
        return images.flatten(1)[:, : self.count]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models: expected at least one"),
        ({"models": Pixels(3)}, "expected models by name"),
        ({"models": {"": Pixels(3)}}, "cannot be a model's name"),
        ({"models": {"a": "resnet"}}, "'a': model: expected a torch.nn.Module"),
        ({"models": {"a": Pixels(3), "b": Pixels(4)}}, "same number.*'a' has 3, 'b' has 4"),
        (
            {"models": {"a": Pixels(3), "b": nn.Conv2d(3, 4, 3)}},
            "'b': images: the model does not take",
        ),
        ({"models": {"a": nn.Conv2d(1, 4, 3)}}, r"'a': model: expected logits \(B, K\)"),
        ({"attacks": {}}, "attacks: expected at least one"),
        ({"attacks": {"A": "pgd"}}, "expected an attack"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments(toys, change, message):
    given = {"models": {"a": Pixels(3)}, "dataset": toys.make_dataset(), "attacks": ATTACKS}
    with pytest.raises(InputError, match=message):
        transfer(**(given | change))


def test_unknown_names_show_the_nearest(result):
    with pytest.raises(InputError, match=r"target: unknown model 'nearr'\. Did you mean 'near'"):
        result.accuracy("PGD", "one", "nearr")
    with pytest.raises(InputError, match="Did you mean 'PGD'"):
        result.matrix("PGDD")
    with pytest.raises(InputError, match="source"):
        result.worst_case("near", sources=["own"])


def test_the_result_is_frozen(result):
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.evaluations = {}
