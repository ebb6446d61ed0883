import copy
import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from onmanifold.attacks import APGD, FGSM, PGD
from onmanifold.evaluation import BudgetCurve, budget_curve, evaluate, wilson_interval
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.reports.curves import curves_figure
from onmanifold.reports.figures import to_svg
from onmanifold.threats import (
    Elastic,
    Fog,
    ImageBall,
    JointBall,
    LatentBall,
    Threat,
    TransformationBall,
)

RADII = (0.01, 0.02, 0.05, 0.1)
BALL = ImageBall(norm="linf", radius=1.0)
PGD_5 = PGD(BALL, steps=5)


def at(attack, radius):
    return dataclasses.replace(attack, threat=dataclasses.replace(attack.threat, radius=radius))


@pytest.fixture(scope="module")
def model(toys):
    return toys.make_model().double()


@pytest.fixture(scope="module")
def dataset(toys):
    return toys.make_dataset()


@pytest.fixture(scope="module")
def curve(model, dataset):
    return budget_curve(model, dataset, PGD_5, RADII, batch_size=7, seed=2)


@pytest.fixture(scope="module")
def apart(model, dataset):
    """What each radius alone gives."""
    attacks = {f"{radius}": at(PGD_5, radius) for radius in RADII}
    return evaluate(model, dataset, attacks, seed=2)


def test_each_radius_is_an_evaluation_of_its_own_on_those_that_stand(curve, apart):
    standing = apart.correct()
    np.testing.assert_array_equal(curve.correct(0), standing)
    for radius in RADII:
        alone = apart.correct(f"{radius}")
        # What breaks a sample alone breaks it here, and what broke it before still does.
        assert not (curve.correct(radius) & ~alone).any()
        standing = standing & alone
        np.testing.assert_array_equal(curve.correct(radius), standing)
    accuracies = [curve.accuracy(radius) for radius in (0, *RADII)]
    assert len(set(accuracies)) == 5
    assert accuracies == sorted(accuracies, reverse=True)


def test_the_ledger_tells_how_each_sample_broke(curve, apart, dataset):
    rows = curve.to_pandas()
    assert rows["sample"].tolist() == dataset.indices.tolist()
    assert rows["label"].tolist() == dataset.labels.tolist()
    assert np.array_equal(rows["breaking_radius"], curve.breaking_radius)
    frames = apart.to_pandas().set_index(["attack", "sample"])
    for row in rows.itertuples():
        if row.breaking_radius == 0:
            assert (row.size_image, row.forwards, row.backwards) == (0, 1, 0)
            continue
        last = min(row.breaking_radius, RADII[-1])
        there = frames.loc[(f"{last}", row.sample)]
        assert row.objective == pytest.approx(there["objective"], abs=1e-9)
        assert row.adversarial_prediction == there["adversarial_prediction"]
        assert row.size_image <= last + 1e-9
        spent = [frames.loc[(f"{r}", row.sample)] for r in RADII if r <= last]
        assert row.forwards == 1 + sum(part["forwards"] for part in spent)
        assert row.backwards == sum(part["backwards"] for part in spent)
    assert set(rows["breaking_radius"]) == {0, *RADII, np.inf} - (
        set() if np.isinf(curve.breaking_radius).any() else {np.inf}
    )


def curve_of(breaking, radii):
    table = pd.DataFrame(
        {
            "sample": range(len(breaking)),
            "label": 0,
            "clean_prediction": [0] * (len(breaking) - 1) + [1],
            "breaking_radius": breaking,
        }
    )
    return BudgetCurve(pa.table(table), radii)


def test_statistics_by_hand():
    curve = curve_of([0.0, 1.0, 1.0, 2.0, np.inf], (0.0, 1.0, 2.0))
    table = curve.table(0.9)
    assert table["accuracy"].tolist() == [4 / 5, 2 / 5, 1 / 5]
    assert table["broken"].tolist() == [1, 2, 1]
    assert table["n"].tolist() == [5, 5, 5]
    assert (table.loc[1.0, "low"], table.loc[1.0, "high"]) == wilson_interval(2, 5, 0.9)
    assert curve.mean_radius == pytest.approx((0 + 1 + 1 + 2 + 2) / 5)
    assert curve.median_radius == 1.0
    assert curve.clean_accuracy == 4 / 5
    assert curve_of([1.0, 2.0, np.inf, np.inf], (0.0, 1.0, 2.0)).median_radius == 2.0
    assert curve_of([1.0, np.inf, np.inf], (0.0, 1.0)).median_radius == np.inf
    with pytest.raises(InputError, match=r"tested \(0, 1, 2\), found 1.5"):
        curve.accuracy(1.5)


def test_broken_samples_are_not_attacked_again(dataset, curve, model):
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watched(PGD):
        def __call__(self, model, images, *args, **options):
            seen.append((self.threat.radius, options["indices"].tolist()))
            return super().__call__(model, images, *args, **options)

    budget_curve(model, dataset, Watched(BALL, steps=5), RADII, batch_size=7, seed=2)
    for radius, before in zip(RADII, (0, *RADII), strict=False):
        attacked = [sample for r, batch in seen if r == radius for sample in batch]
        assert attacked == curve.samples[curve.correct(before)].tolist()


def test_an_interrupted_curve_goes_on_where_it_stopped(toys, dataset, tmp_path, monkeypatch):
    def run(log, radii=RADII[:3], **options):
        attack = toys.Counting(BALL, steps=3, log=str(tmp_path / log))
        return budget_curve(toys.make_model(), dataset, attack, radii, batch_size=10, **options)

    undisturbed = run("other.txt")
    calls = (tmp_path / "other.txt").read_text().split()
    assert len(calls) > 5
    monkeypatch.setenv("TOY_FAIL_AFTER", "4")
    with pytest.raises(KeyboardInterrupt):
        run("calls.txt", directory=tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.parquet").exists()
    monkeypatch.delenv("TOY_FAIL_AFTER")
    resumed = run("calls.txt", directory=tmp_path / "run")
    assert (tmp_path / "calls.txt").read_text().split() == calls
    pd.testing.assert_frame_equal(resumed.to_pandas(), undisturbed.to_pandas())
    stored = BudgetCurve.load(tmp_path / "run" / "ledger.parquet")
    assert stored.ledger.equals(resumed.ledger)
    assert stored.radii == resumed.radii == (0.0, *RADII[:3])
    assert stored.provenance["evaluations"][1]["attacks"]["attack"]["attack"]["steps"] == 3
    # A larger radius is added; those before it are read.
    longer = run("calls.txt", RADII, directory=tmp_path / "run")
    added = (tmp_path / "calls.txt").read_text().split()[len(calls) :]
    assert 0 < len(added) <= 3
    for radius in RADII[:3]:
        assert longer.accuracy(radius) == undisturbed.accuracy(radius)
    (tmp_path / "foreign.parquet").write_bytes(
        (tmp_path / "run" / "radius-0.0" / "ledger.parquet").read_bytes()
    )
    with pytest.raises(DataError, match="'breaking_radius'"):
        BudgetCurve.load(tmp_path / "foreign.parquet")


def test_radius_0_is_the_accuracy_of_what_the_attack_starts_from(toys, model, dataset):
    # Images off the manifold: their reconstructions are classified otherwise.
    generator = torch.Generator().manual_seed(0)
    noisy = 0.4 * dataset.images + 0.6 * torch.rand(dataset.images.shape, generator=generator)
    noisy = dataclasses.replace(dataset, images=noisy, codes=None)
    latent = LatentBall(toys.Plane(), norm="l2", radius=0.1)
    curve = budget_curve(model, noisy, PGD(latent, steps=3), [0.2, 1.0])
    plane = toys.Plane()
    images = noisy.images.double()
    started = plane.decode(plane.encode(images, noisy.labels))
    model = copy.deepcopy(model).eval()
    assert curve.accuracy(0) == (model(started).argmax(1) == noisy.labels).double().mean()
    assert curve.clean_accuracy == (model(images).argmax(1) == noisy.labels).double().mean()
    assert curve.accuracy(0) != curve.clean_accuracy
    kept = dataclasses.replace(latent, keep_residual=True)
    kept = budget_curve(model, noisy, PGD(kept, steps=3), [0.2])
    assert kept.accuracy(0) == kept.clean_accuracy


@pytest.mark.parametrize("threat", [TransformationBall(), Fog(), Elastic()])
def test_any_threat_model_with_a_radius_will_do(model, dataset, threat):
    curve = budget_curve(model, dataset, FGSM(threat), [0, 0.5, 1.0])
    assert curve.radii == (0.0, 0.5, 1.0)
    assert curve.accuracy(1.0) < curve.accuracy(0) == curve.clean_accuracy


def test_radii_of_a_joint_ball_are_factors(toys, model, dataset):
    image, latent = ImageBall(radius=0.02), LatentBall(toys.Plane(), norm="l2", radius=0.2)
    curve = budget_curve(model, dataset, APGD(JointBall(image, latent), steps=5), [0.5, 2.0])
    rows = curve.to_pandas().query("breaking_radius > 0")
    factor = rows["breaking_radius"].clip(upper=2.0)
    assert (rows["size_image"] <= 0.02 * factor + 1e-9).all()
    assert (rows["size_latent"] <= 0.2 * factor + 1e-9).all()
    assert (rows["size_image"] > 0.02).any()
    assert (rows["size_latent"] > 0.2).any()


def test_a_function_may_make_the_attack(model, dataset, curve):
    def growing(radius):
        return PGD(ImageBall(radius=radius), steps=5, step_size=2.5 * radius / 5)

    made = budget_curve(model, dataset, growing, RADII, seed=2)
    np.testing.assert_array_equal(made.breaking_radius, curve.breaking_radius)


def test_members_that_broke_a_sample_are_named(model, dataset):
    @dataclasses.dataclass(frozen=True)
    class Pair(PGD):
        @property
        def members(self):
            return "clean", "second"

        def search(self, search):
            found = super().search(search)
            return dataclasses.replace(found, by=torch.ones_like(search.indices))

    curve = budget_curve(model, dataset, Pair(BALL, steps=3), [0.01, 0.02])
    names = curve.ledger["found_by"].to_pylist()
    assert names == ["second" if 0 < radius < np.inf else None for radius in curve.breaking_radius]


def test_progress_counts_broken_samples_as_done(model, dataset, curve):
    seen = []
    report = lambda *news: seen.append(news)  # noqa: E731
    budget_curve(model, dataset, PGD_5, RADII[:1], batch_size=20, seed=2, progress=report)
    assert seen == [
        ("radius 0", 20, 30),
        ("radius 0", 30, 30),
        ("radius 0.01", 26, 30),
        ("radius 0.01", 30, 30),
    ]


@dataclasses.dataclass(frozen=True)
class Unsized(Threat):
    def around(self, images, labels, codes=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radii": []}, "radii: expected increasing"),
        ({"radii": 0.1}, "radii: expected increasing"),
        ({"radii": [0.2, 0.1]}, "radii: expected increasing"),
        ({"radii": [0.1, 0.1]}, "radii: expected increasing"),
        ({"radii": [-0.1, 0.1]}, "radii: expected increasing"),
        ({"radii": [0.1, float("nan")]}, "radii: expected increasing"),
        ({"radii": [0.1, float("inf")]}, "radii: expected increasing"),
        ({"radii": "ab"}, "radii: expected increasing"),
        ({"attack": PGD(Unsized())}, "Unsized has no radius"),
        ({"attack": lambda radius: BALL}, "the function gave ImageBall"),
        ({"attack": PGD}, "expected an attack"),
        ({"attack": "pgd"}, "expected an attack"),
        ({"dataset": 3}, "expected an onmanifold Dataset"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments(model, dataset, change, message):
    given = {"model": model, "dataset": dataset, "attack": PGD_5, "radii": RADII}
    with pytest.raises(InputError, match=message):
        budget_curve(**(given | change))


def test_the_figure_shows_each_curve_with_its_band(curve):
    other = curve_of([0.0, 0.02, np.inf], (0.0, 0.02, 0.1))
    figure = curves_figure({"AT": curve, "DMAT": other}, "radius (grey levels)", scale=255)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    table = curve.table()
    np.testing.assert_allclose(lines["AT"].get_xdata(), 255 * np.array(curve.radii))
    np.testing.assert_allclose(lines["AT"].get_ydata(), 100 * table["accuracy"])
    assert lines["AT"].get_marker() != lines["DMAT"].get_marker()
    assert lines["AT"].get_linestyle() != lines["DMAT"].get_linestyle()
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(100 * table["low"].min())
    assert band[:, 1].max() == pytest.approx(100 * table["high"].max())
    assert to_svg(figure) == to_svg(figure)
    with pytest.raises(InputError, match="at least one"):
        curves_figure({})
