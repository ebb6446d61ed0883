import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from onmanifold.data import CORRUPTIONS, Dataset, corrupt, corrupted, corruptions
from onmanifold.evaluation.corruptions import CorruptionResult, evaluate_corruptions
from onmanifold.evaluation.runner import evaluate
from onmanifold.evaluation.statistics import wilson_interval
from onmanifold.foundation.errors import InputError

NAMES = ("gaussian_noise", "contrast", "jpeg_compression")


class Steps(nn.Module):
    """Logits by the contrast of the left half against the right, so that corruptions change the class."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        halves = images.mean(1).unflatten(2, (2, -1)).mean((1, 3))
        margin = (halves[:, 0] - halves[:, 1] - 0.06) * self.scale
        return torch.stack([margin, -margin], 1)


def make_dataset(count=30):
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.1 * torch.rand(count, 1, 16, 16, generator=generator)
    images[..., :8] += 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    with torch.no_grad():
        labels = Steps()(images).argmax(1)
    labels[::6] = 1 - labels[::6]
    indices = torch.arange(500, 500 + count)
    return Dataset("toy", images, labels, ("a", "b"), "toy", torch.rand(count, 2), indices)


def accuracy(data, name, severity, seed=0):
    images = corrupt(data.images, name, severity, seed, data.indices)
    with torch.no_grad():
        return float((Steps()(images).argmax(1) == data.labels).double().mean())


@pytest.fixture(scope="module")
def data():
    return make_dataset()


@pytest.fixture(scope="module")
def result(data):
    return evaluate_corruptions(Steps(), data, NAMES, (1, 3, 5), batch_size=7, seed=4)


def test_each_setting_is_the_accuracy_on_its_images(data, result):
    for name in NAMES:
        for severity in (1, 3, 5):
            assert result.accuracy(name, severity) == accuracy(data, name, severity, 4)
    assert len({result.accuracy("contrast", severity) for severity in (1, 3, 5)}) > 1
    assert result.clean.accuracy() == 25 / 30
    assert (result.names, result.severities) == (NAMES, (1, 3, 5))


def test_the_table_has_means_at_its_rims(result):
    table = result.table()
    assert list(table.index) == [*NAMES, "mean"]
    assert list(table.columns) == [1, 3, 5, "mean"]
    inner = table.loc[list(NAMES), [1, 3, 5]]
    assert inner.loc["contrast", 5] == result.accuracy("contrast", 5)
    pd.testing.assert_series_equal(
        table.loc[list(NAMES), "mean"], inner.mean(axis=1), check_names=False
    )
    pd.testing.assert_series_equal(
        table.loc["mean", [1, 3, 5]], inner.mean(axis=0), check_names=False, check_dtype=False
    )
    assert table.loc["mean", "mean"] == pytest.approx(inner.to_numpy().mean())
    assert result.mean_accuracy == table.loc["mean", "mean"]
    assert result.mean_error() == 1 - result.mean_accuracy


def test_settings_come_with_wilson_intervals(result):
    rows = result.to_pandas(0.9)
    assert list(rows.columns) == ["corruption", "severity", "n", "accuracy", "low", "high"]
    assert len(rows) == 10
    assert rows.iloc[0].tolist()[:3] == ["clean", 0, 30]
    for row in rows.itertuples():
        expected = wilson_interval(round(30 * row.accuracy), 30, 0.9)
        assert (row.low, row.high) == pytest.approx(tuple(expected))
    right = round(30 * result.accuracy("contrast", 3))
    assert result.interval("contrast", 3) == wilson_interval(right, 30)


def test_means_count_each_sample_once(result):
    right = np.mean([part.correct() for part in result.evaluations.values()], axis=0)
    estimate = result.mean_interval()
    assert estimate.mean == pytest.approx(result.mean_accuracy)
    assert estimate.runs == 30
    assert estimate.high - estimate.low == pytest.approx(
        2 * 2.0452 * right.std(ddof=1) / 30**0.5, rel=1e-3
    )
    assert result.mean_interval("contrast").mean == pytest.approx(result.accuracy("contrast"))


def test_errors_are_relative_to_a_baseline(data, result):
    other = CorruptionResult(
        result.clean,
        {key: evaluate(Steps(-1.0), corrupted(data, *key, 4), {}) for key in result.evaluations},
    )
    ratios = [(1 - result.accuracy(name)) / (1 - other.accuracy(name)) for name in NAMES]
    assert result.mean_error(other) == pytest.approx(np.mean(ratios))
    assert result.mean_error(result) == pytest.approx(1)
    part = CorruptionResult(result.clean, {("contrast", 1): result.evaluations["contrast", 1]})
    with pytest.raises(InputError, match="same corruptions"):
        result.mean_error(part)
    easy = Dataset("easy", data.images, Steps()(data.images).argmax(1), ("a", "b"), "easy")
    faultless = {key: evaluate(Steps(), easy, {}) for key in result.evaluations}
    with pytest.raises(InputError, match="no error on gaussian_noise"):
        result.mean_error(CorruptionResult(result.clean, faultless))


def test_finished_batches_are_not_computed_again(data, tmp_path, monkeypatch):
    arguments = (Steps(), data, NAMES, (1, 5), 8, 4)
    first = evaluate_corruptions(*arguments, directory=tmp_path)
    called = []
    plain = corruptions.corrupt
    monkeypatch.setattr(
        corruptions, "corrupt", lambda *given: called.append(given[1:4]) or plain(*given)
    )
    again = evaluate_corruptions(*arguments, directory=tmp_path)
    assert not called
    pd.testing.assert_frame_equal(again.table(), first.table())
    # One batch is lost: it alone is computed again.
    next((tmp_path / "contrast-5" / "shards").rglob("000002.parquet")).unlink()
    evaluate_corruptions(*arguments, directory=tmp_path)
    assert called == [("contrast", 5, 4)]
    # Another seed has other noise.
    other = evaluate_corruptions(*arguments[:-1], seed=5, directory=tmp_path)
    assert len(called) == 1 + 6 * 4
    assert other.accuracy("gaussian_noise", 5) == accuracy(data, "gaussian_noise", 5, 5)


def test_the_batch_size_makes_no_difference(data, result):
    other = evaluate_corruptions(Steps(), data, NAMES, (1, 3, 5), batch_size=30, seed=4)
    for key, part in result.evaluations.items():
        assert np.array_equal(other.evaluations[key].correct(), part.correct())


def test_all_corruptions_and_severities_are_the_default(data):
    calls = []
    result = evaluate_corruptions(
        Steps(), data.take(2), progress=lambda *report: calls.append(report)
    )
    assert list(result.evaluations) == [(name, s) for name in CORRUPTIONS for s in range(1, 6)]
    assert calls[0] == ("clean", 2, 2)
    assert [call for call in calls if call[0] == "fog"] == [("fog", 2 * s, 10) for s in range(1, 6)]


def test_bars_are_shown(data, capsys):
    evaluate_corruptions(Steps(), data, ["fog"], [1], progress=True)
    assert "fog" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["fogg"]}, "Did you mean 'fog'"),
        ({"names": "fog"}, "names: expected several"),
        ({"names": []}, "names: expected at least one"),
        ({"names": ["fog", "fog"]}, "none of them twice"),
        ({"severities": []}, "severities: expected at least one"),
        ({"severities": 3}, "severities: expected several"),
        ({"severities": (1, 6)}, "found 6"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_named(data, changes, message):
    with pytest.raises(InputError, match=message):
        evaluate_corruptions(Steps(), data, **changes)


def test_a_setting_that_was_not_evaluated_is_an_error(result):
    for name, severity in (("fog", 1), ("contrast", 2)):
        with pytest.raises(InputError, match="was not evaluated"):
            result.accuracy(name, severity)
