import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onmanifold.evaluation import Evaluation, wilson_interval
from onmanifold.evaluation.ledger import ledger_of, outcome_table, read_table, write_table
from onmanifold.foundation.errors import DataError, InputError

LABELS = np.array([0, 1, 2, 0, 1])


def outcome(predictions, found_by=None, **sizes):
    predictions = np.array(predictions)
    return outcome_table(
        {
            "sample": np.arange(5) + 100,
            "label": LABELS,
            "adversarial_prediction": predictions,
            "success": predictions != LABELS,
            "found_by": None if found_by is None else np.array(found_by, dtype=object),
            "objective": None,
            **{f"size_{name}": np.full(5, value) for name, value in sizes.items()},
            "forwards": np.arange(5, dtype=np.int32),
            "backwards": np.ones(5, dtype=np.int32),
        },
        5,
    )


@pytest.fixture
def evaluation():
    # The clean model is wrong on the last sample; attack B "repairs" it, as a reconstruction may.
    clean = outcome([0, 1, 2, 0, 2])
    attacks = {
        "A": outcome([1, 1, 2, 0, 0], image=0.5),
        "B": outcome([0, 0, 2, 1, 1], image=0.1, latent=2.0),
    }
    return Evaluation(ledger_of(clean, attacks, {"seed": 3}))


def test_accuracies_by_hand(evaluation):
    assert evaluation.accuracy() == evaluation.accuracy("standard") == 4 / 5
    assert evaluation.accuracy("A") == 3 / 5
    assert (
        evaluation.accuracy("B") == 2 / 5
    )  # the repaired sample does not count: its clean image is wrong


def test_success_rate_is_taken_on_correctly_classified_samples(evaluation):
    assert evaluation.success_rate("A") == 1 / 4
    assert evaluation.success_rate("B") == 2 / 4
    assert evaluation.success_rate("worst case") == 3 / 4
    assert evaluation.accuracy("B") == pytest.approx(
        evaluation.accuracy() * (1 - evaluation.success_rate("B"))
    )


def test_worst_case_is_per_sample(evaluation):
    assert evaluation.worst_case() == 1 / 5  # below both: A and B break different samples
    assert evaluation.worst_case(["A"]) == evaluation.accuracy("A")
    assert evaluation.worst_case([]) == evaluation.accuracy()
    assert evaluation.correct("worst case").tolist() == [False, False, True, False, False]


def test_intervals(evaluation):
    assert evaluation.interval("A") == wilson_interval(3, 5)
    assert evaluation.interval("worst case", 0.9) == wilson_interval(1, 5, 0.9)
    assert evaluation.interval("B", of="success_rate") == wilson_interval(2, 4)


def test_success_rate_without_a_correct_sample():
    wrong = outcome((LABELS + 1) % 3)
    evaluation = Evaluation(ledger_of(wrong, {"A": wrong}, {}))
    assert np.isnan(evaluation.success_rate("A"))
    assert evaluation.accuracy("A") == 0


def test_ledger_has_a_row_per_sample_and_attack(evaluation):
    frame = evaluation.to_pandas()
    assert list(frame.columns) == [
        "sample",
        "attack",
        "label",
        "clean_prediction",
        "adversarial_prediction",
        "success",
        "found_by",
        "objective",
        "size_image",
        "size_latent",
        "forwards",
        "backwards",
    ]
    assert len(frame) == 10
    assert frame["sample"].tolist() == [*range(100, 105)] * 2
    assert frame["size_latent"].isna().tolist() == [True] * 5 + [False] * 5
    assert evaluation.ledger["size_latent"].null_count == 5


def test_ledger_names_the_member_that_fooled_the_model(tmp_path):
    found_by = ["apgd-ce", None, None, "square", "clean"]
    clean = outcome([0, 1, 2, 0, 2])
    attacks = {"AA": outcome([1, 1, 2, 1, 2], found_by), "PGD": outcome([1, 1, 2, 1, 2])}
    evaluation = Evaluation(ledger_of(clean, attacks, {}))
    evaluation = Evaluation.load(evaluation.save(tmp_path / "ledger.parquet"))
    assert evaluation.ledger.schema.field("found_by").type == pa.string()
    assert evaluation.ledger["found_by"].to_pylist() == [*found_by, *[None] * 5]


def test_ledgers_from_before_members_were_named_are_read(evaluation, tmp_path):
    old = evaluation.ledger.drop_columns(["found_by"])
    pq.write_table(old, tmp_path / "old.parquet")
    again = Evaluation.load(tmp_path / "old.parquet")
    assert again.ledger.equals(evaluation.ledger)
    assert again.provenance == {"seed": 3}
    assert Evaluation(old).accuracy("A") == evaluation.accuracy("A")


def test_table(evaluation):
    table = evaluation.table()
    assert table.index.tolist() == ["standard", "A", "B", "worst case"]
    assert table.loc["A", "n"] == 5
    assert table.loc["A", "accuracy"] == 3 / 5
    assert (table.loc["A", "low"], table.loc["A", "high"]) == wilson_interval(3, 5)
    assert table.loc["B", ["size_image", "size_latent", "forwards", "backwards"]].tolist() == [
        0.1,
        2.0,
        2.0,
        1.0,
    ]
    assert np.isnan(table.loc["A", "size_latent"])
    assert np.isnan(table.loc["standard", "success_rate"])


@pytest.mark.parametrize("method", ["accuracy", "success_rate", "interval", "correct"])
def test_an_unknown_name_shows_the_nearest(evaluation, method):
    evaluation = Evaluation(ledger_of(outcome(LABELS), {"PGD-20": outcome(LABELS)}, {}))
    with pytest.raises(InputError, match=r"unknown attack 'PGD20'. Did you mean 'PGD-20'\?"):
        getattr(evaluation, method)("PGD20")
    with pytest.raises(InputError, match="Did you mean 'PGD-20'"):
        evaluation.worst_case(["PGD20"])


def test_round_trip(evaluation, tmp_path):
    again = Evaluation.load(evaluation.save(tmp_path / "ledger.parquet"))
    assert again.ledger.equals(evaluation.ledger)
    assert again.provenance == {"seed": 3}
    pd.testing.assert_frame_equal(again.table(), evaluation.table())


def test_without_attacks_the_clean_predictions_stand_alone(tmp_path):
    evaluation = Evaluation(ledger_of(outcome([0, 1, 2, 0, 2]), {}, {}))
    assert evaluation.names == []
    assert evaluation.accuracy() == evaluation.worst_case() == 4 / 5
    assert evaluation.table().index.tolist() == ["standard"]
    assert Evaluation.load(evaluation.save(tmp_path / "ledger.parquet")).accuracy() == 4 / 5


def test_no_flipped_byte_of_the_data_goes_unnoticed(tmp_path):
    numbers = np.random.default_rng(0).standard_normal(50)
    table = pa.table({"objective": numbers})
    path = write_table(tmp_path / "table.parquet", table)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    noticed = 0
    for position in range(4, footer, 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            assert read_table(path).equals(table)  # a byte that carries no data, as in a header
        except DataError:
            noticed += 1
    assert noticed > footer / 5 / 2


def test_a_truncated_ledger_is_an_error(evaluation, tmp_path):
    path = evaluation.save(tmp_path / "ledger.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"ledger\.parquet .*truncated or damaged"):
        Evaluation.load(path)
    with pytest.raises(DataError, match="does not exist"):
        Evaluation.load(tmp_path / "other.parquet")


def test_a_foreign_table_is_an_error(evaluation, tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match="no column 'sample'"):
        Evaluation.load(tmp_path / "foreign.parquet")
    pq.write_table(evaluation.ledger.slice(0, 8), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="same samples"):
        Evaluation.load(tmp_path / "part.parquet")


def test_comparison_is_paired(evaluation):
    better = Evaluation(ledger_of(outcome([0, 1, 2, 0, 1]), {"A": outcome([0, 1, 2, 0, 1])}, {}))
    found = better.compare(evaluation, "A")
    assert found.difference == pytest.approx(2 / 5)
    assert (found.first_only, found.second_only) == (2, 0)
    assert evaluation.compare(evaluation, "A", "B").difference == pytest.approx(1 / 5)


def test_comparison_of_other_samples_is_refused(evaluation):
    shifted = evaluation.ledger.set_column(0, "sample", pa.array([*range(5)] * 2))
    with pytest.raises(InputError, match="same samples"):
        evaluation.compare(Evaluation(shifted))


def test_a_run_of_an_experiment_is_read_by_its_name(evaluation, tmp_path):
    rows = evaluation.ledger.replace_schema_metadata(None)
    parts = []
    for method, seed in (("AT", 4), ("AT", 5), ("Normal", 4)):
        part = rows.add_column(0, "seed", pa.array([seed] * len(rows), pa.int64()))
        parts.append(part.add_column(0, "method", pa.array([method] * len(rows))))
    path = write_table(tmp_path / "ledger.parquet", pa.concat_tables(parts))
    part = Evaluation.load(path, method="AT", seed=5)
    assert part.accuracy("A") == evaluation.accuracy("A")
    assert len(part) == len(evaluation)
    with pytest.raises(InputError, match=r"AT.*Normal"):
        Evaluation.load(path)
    with pytest.raises(InputError, match=r"\[4\]"):
        Evaluation.load(path, method="Normal", seed=5)
