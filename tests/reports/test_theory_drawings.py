"""The theory's figures show what was measured."""

import numpy as np
import pytest

from onmanifold.analysis.theory import Setting, ToyDistribution, linear_model, robust_bound
from onmanifold.analysis.theory.curves import (
    attack_plane,
    risk_table,
    spectrum_table,
    trade_off_table,
)
from onmanifold.reports.drawings.theory import (
    draw_ellipses,
    draw_risk,
    draw_spectrum,
    draw_trade_off,
)
from onmanifold.reports.figures import to_svg

MODEL = linear_model([4.0, 2.0, 0.1, 0.1], 2)
SETTING = Setting(MODEL, image_multiplier=40.0, samples=500)


def labels_of(figure):
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_ellipses():
    image, latent = attack_plane((1.0, 0.1), 1.0)
    assert np.linalg.norm(image.moves, axis=1) == pytest.approx(np.full(12, np.sqrt(0.1)))
    # A latent of length 1 moves along the first eigenvector by its standard deviation above the noise.
    assert np.linalg.norm(latent.moves, axis=1) == pytest.approx(np.full(12, np.sqrt(0.9)))
    first = np.array([np.cos(0.5), np.sin(0.5)])
    assert np.abs(latent.moves @ first) == pytest.approx(np.full(12, np.sqrt(0.9)))
    for plane, kept in ((image, None), (latent, 0.1)):
        growth = np.linalg.eigvalsh(plane.trained - plane.data)
        assert (growth >= -1e-9).all()
        if kept is not None:
            assert np.linalg.eigvalsh(plane.trained)[0] == pytest.approx(kept)
    figure = draw_ellipses((image, latent))
    assert [pane.get_title() for pane in figure.axes] == [
        "image space, radius 0.32",
        "latent space, radius 1",
    ]
    assert "after adversarial training" in labels_of(figure)
    assert to_svg(figure) == to_svg(draw_ellipses((image, latent)))


def test_spectrum():
    table = spectrum_table(SETTING)
    assert table.attack.nunique() == 3
    image = table[table.attack == "image attack"]
    assert image.attacked.to_numpy() == pytest.approx((1 + 1 / (40 * MODEL.eigenvalues - 1)) ** 2)
    assert (np.abs(table.sampled - table.attacked) <= 5 * table.error + 1e-9).all()
    figure = draw_spectrum(table, 2)
    assert {"original", "image attack", "latent attack (prior)"} <= labels_of(figure)
    flat = spectrum_table(Setting(MODEL.flattened(), image_multiplier=40.0, samples=50))
    assert set(flat.direction) == {1, 2}
    draw_spectrum(flat, 2)


def test_risk():
    table = risk_table(SETTING, [1.5, 10.0, 50.0, 100.0], [0.1, 1.0])
    assert set(table.panel) == {"latent", "image", "radius"}
    drawn = table[table.sampled.notna()]
    assert len(drawn) == 6 + 2 + 2
    assert (np.abs(drawn.sampled - drawn.risk) <= 5 * drawn.error).all()
    level = table[(table.line == "rank q, each strategy") & (table.position == 100.0)]
    assert level.risk.item() == pytest.approx(2 * 100 * 199 / 99**2 / 2)
    assert len(draw_risk(table).axes) == 3
    flat = risk_table(Setting(MODEL.flattened(), samples=50), [2.0], [0.5])
    assert set(flat.panel) == {"latent", "radius"}
    assert len(draw_risk(flat).axes) == 2


def test_trade_off():
    toy = ToyDistribution()
    table = trade_off_table(toy, [0.1, toy.bayes_weight, 2.0, 9.0], 500)
    figure = draw_trade_off(table, toy.bayes_weight, robust_bound(toy, table.standard.to_numpy()))
    assert {"standard", "robust, every perturbation", "robust, valid perturbations"} <= labels_of(
        figure
    )
