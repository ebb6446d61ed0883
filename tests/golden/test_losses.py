"""Losses of training methods as numbers worked out by hand.

The source of each number is the formula above it. The numbers were computed from the formulas with 30 digits by
mpmath, without any code of the library.

One classifier serves all: an image is one pixel x, and its logits are (ln 2, (8x − 4) ln 2, 0). So with
u = 2^(8x − 4) the likelihoods are p = (2, u, 1) / (3 + u), and 1/8 more in x doubles u:

    x    1/4   3/8   1/2   5/8   3/4
    u    1/4   1/2   1     2     4

Attacks have the radius 1/8. Only one logit moves, so they end where x moves as far as it can.
"""

import math

import pytest
import torch
from torch import nn

import onmanifold as om
from onmanifold.objectives import divergence
from onmanifold.training import IAT, IJSAT, MART, TRADES, InputMixup, LabelSmoothing, Step
from onmanifold.training.methods.mixup import Mixture
from onmanifold.training.methods.trades import boosted_cross_entropy
from onmanifold.training.smoothing import smoothed
from onmanifold.training.transport import sinkhorn

# The divergence has a maximum on either side: some restarts find the larger one.
ATTACK = om.PGD(om.ImageBall(radius=1 / 8), steps=4, step_size=1 / 8, restarts=8)


def loss_of(method, pixels, labels):
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 3)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[0.0], [8.0], [0.0]]).double() * math.log(2))
        network[1].bias.copy_(torch.tensor([1.0, -4.0, 0.0]).double() * math.log(2))
    images = torch.tensor(pixels).double().view(-1, 1, 1, 1)
    rows = torch.arange(len(images))
    step = Step(network, network, images, torch.tensor(labels), None, rows, 0, 0)
    return method.loss(step).item()


@pytest.fixture
def shares(monkeypatch):
    """Two samples are each other's partners; 3/4 of the first and 1/2 of the second are their own."""
    mixture = Mixture(torch.tensor([1, 0]), torch.tensor([0.75, 0.5], dtype=torch.float64))
    monkeypatch.setattr(Mixture, "draw", staticmethod(lambda *_: mixture))


def test_trades():
    # x = 1/2, y = 0: p = (2, 1, 1)/4, CE = ln 2.
    #   x' = 5/8: q = (2, 2, 1)/5, KL(p ‖ q) = 3/4 ln 5/4 + 1/4 ln 5/8 = 0.04986, the larger;
    #   x' = 3/8: q = (4, 1, 2)/7, KL(p ‖ q) = 3/4 ln 7/8 + 1/4 ln 7/4 = 0.03976.
    # x = 5/8, y = 2: p = (2, 2, 1)/5, CE = ln 5.
    #   x' = 3/4: q = (2, 4, 1)/7, KL(p ‖ q) = 3/5 ln 7/5 + 2/5 ln 7/10 = 0.05921, the larger;
    #   x' = 1/2: q = (2, 1, 1)/4, KL(p ‖ q) = 3/5 ln 4/5 + 2/5 ln 8/5 = 0.05412.
    # Mean CE + 6 · mean KL.
    found = loss_of(TRADES(ATTACK, weight=6.0), [1 / 2, 5 / 8], [0, 2])
    assert found == pytest.approx(1.478502908211398, rel=1e-12)


def test_mart():
    # x = 1/2, y = 0: p = (2, 1, 1)/4. Cross-entropy is worst at x' = 5/8: q = (2, 2, 1)/5,
    #   BCE = −ln 2/5 − ln(1.0001 − 2/5 + 1e-12),
    #   KL(p ‖ q) (1.0000001 − 1/2) = (3/4 ln 5/4 + 1/4 ln 5/8) · 0.5000001.
    # x = 1/2, y = 1: worst at x' = 3/8: q = (4, 1, 2)/7,
    #   BCE = −ln 1/7 − ln(1.0001 − 4/7 + 1e-12),
    #   KL(p ‖ q) (1.0000001 − 1/4) = (3/4 ln 7/8 + 1/4 ln 7/4) · 0.7500001.
    # Mean BCE + 5 · mean of the weighted KL.
    found = loss_of(MART(ATTACK, weight=5.0), [1 / 2, 1 / 2], [0, 1])
    assert found == pytest.approx(2.246824550429312, rel=1e-12)


# Of the mixed loss: cross-entropy with the labels t is ln(3 + u) − t₀ ln 2 − t₁ ln u. Here x = (1/4, 3/4) and
# y = (0, 1), so that mixed labels are t = (3/4, 1/4, 0) and (1/2, 1/2, 0), mixed images 3/8 and 1/2.


@pytest.mark.usefixtures("shares")
def test_input_mixup():
    # u = 1/2: ln 7/2 − 3/4 ln 2 + 1/4 ln 2 = ln 7/2 − 1/2 ln 2.
    # u = 1: ln 4 − 1/2 ln 2.
    found = loss_of(InputMixup(), [1 / 4, 3 / 4], [0, 1])
    assert found == pytest.approx(0.9729550745276567, rel=1e-12)


@pytest.mark.usefixtures("shares")
def test_robust_mixup():
    # The slope of the loss in ln u is p₁ − t₁. Around 3/8, p₁ = u/(3 + u) is below t₁ = 1/4 for u < 1: worst is
    #   u = 1/4: ln 13/4 − 3/4 ln 2 + 1/4 ln 4 = ln 13/4 − 1/4 ln 2.
    # Around 1/2, p₁ is at most 2/5, below t₁ = 1/2: worst is
    #   u = 1/2: ln 7/2 − 1/2 ln 2 + 1/2 ln 2 = ln 7/2.
    found = loss_of(IJSAT(ATTACK), [1 / 4, 3 / 4], [0, 1])
    assert found == pytest.approx(1.129065584848514, rel=1e-12)


@pytest.mark.usefixtures("shares")
def test_mixup_of_finished_examples():
    # Before they are mixed, 1/4 goes to 3/8 against its label 0, and 3/4 to 5/8 against its label 1.
    # Mixed: 7/16, where u = 2^(−1/2): ln(3 + 2^(−1/2)) − 3/4 ln 2 + 1/8 ln 2;
    #        1/2, where u = 1: ln 4 − 1/2 ln 2.
    adversarial = 0.9583777560136743
    found = loss_of(IJSAT(ATTACK, order="attack_first"), [1 / 4, 3 / 4], [0, 1])
    assert found == pytest.approx(adversarial, rel=1e-12)
    # IAT: half of this, half of `test_input_mixup`.
    found = loss_of(IAT(ATTACK), [1 / 4, 3 / 4], [0, 1])
    assert found == pytest.approx(0.9656664152706655, rel=1e-12)


def test_label_smoothing():
    # x = 1/2, y = 0, t = (1/2, 1/4, 1/4): −1/2 ln 1/2 − 1/2 ln 1/4 = 3/2 ln 2.
    # x = 5/8, y = 2, t = (1/4, 1/4, 1/2): −1/2 ln 2/5 − 1/2 ln 1/5 = 1/2 ln 25/2.
    found = loss_of(LabelSmoothing(0.5), [1 / 2, 5 / 8], [0, 2])
    assert found == pytest.approx(1.151292546497023, rel=1e-12)


def test_smoothed_labels():
    # (1 − δ − δ/(K − 1)) · onehot + δ/(K − 1) in the released code of Feature Scattering: for K = 10 and δ = 1/2,
    # 1/2 and 1/18; for two classes and δ = 0.3, (0.7, 0.3).
    found = smoothed(torch.tensor([3]), 10, 0.5, torch.float64)
    assert found[0].tolist() == pytest.approx([0.05555555555555556] * 3 + [0.5] + [1 / 18] * 6)
    assert smoothed(torch.tensor([0]), 2, 0.3).tolist()[0] == pytest.approx([0.7, 0.3])


def test_divergence():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3 = ln(2 / sqrt 3).
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    found = divergence(torch.zeros(1, 2, dtype=torch.float64), logits)
    assert found.item() == pytest.approx(0.14384103622589045, rel=1e-12)


def test_boosted_cross_entropy():
    # p = (0.5, 0.3, 0.2) and label 1: −ln 0.3 − ln(1.0001 − 0.5 + 1e-12).
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    found = boosted_cross_entropy(logits, torch.tensor([1])).item()
    assert found == pytest.approx(1.896920004881215, rel=1e-12)


def test_plan_of_two_against_two():
    # By symmetry T = (a, b; b, a) with a / b = exp(1 / 0.5) and a + b = 1/2: a = 1/2 / (1 + e^−2).
    plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), regularisation=0.5)
    large, small = 0.44039853898894116, 0.05960146101105877
    assert plan.flatten().tolist() == pytest.approx([large, small, small, large], rel=1e-12)
