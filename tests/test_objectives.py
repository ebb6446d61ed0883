import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import OBJECTIVES
from onmanifold.objectives import (
    DLR,
    CrossEntropy,
    KullbackLeibler,
    ManifoldLoss,
    Margin,
    TargetedCrossEntropy,
    TargetedDLR,
    TargetedMargin,
    likeliest_others,
)

# Probabilities 1/8, 5/8, 2/8 and 4/8, 2/8, 2/8; shifted, which no objective may notice.
LOGITS = torch.tensor([[1.0, 5.0, 2.0], [4.0, 2.0, 2.0]]).double().log() + 3
LABELS = torch.tensor([0, 0])
TARGETS = torch.tensor([1, 2])
CLEAN = torch.tensor([[1.0, 1.0, 2.0], [4.0, 2.0, 2.0]]).double()
CLEAN = (CLEAN / CLEAN.sum(1, keepdim=True)).log()

GOLDEN = [
    # −log p_y
    (CrossEntropy(), {}, [math.log(8), math.log(2)]),
    # log 5 − log 1; log 2 − log 4
    (Margin(), {}, [math.log(5), -math.log(2)]),
    (Margin(confidence=1.0), {}, [1.0, -math.log(2)]),
    (Margin(confidence=0.0), {}, [0.0, -math.log(2)]),
    # Σ p log(p/q), p = (1/4, 1/4, 1/2), q = (1/8, 5/8, 2/8): ¼ log 2 + ¼ log 2/5 + ½ log 2
    (
        KullbackLeibler(),
        {"clean": CLEAN},
        [0.75 * math.log(2) + 0.25 * math.log(2 / 5), 0.0],
    ),
    # log p_t
    (TargetedCrossEntropy(), {"targets": TARGETS}, [math.log(5 / 8), math.log(1 / 4)]),
    # log 5 − log 2; log 2 − log 4
    (TargetedMargin(), {"targets": TARGETS}, [math.log(5 / 2), -math.log(2)]),
    (TargetedMargin(confidence=0.5), {"targets": TARGETS}, [0.5, -math.log(2)]),
    # log σ(3) and log σ(3 + log 4)
    (ManifoldLoss(), {}, [-math.log(1 + math.exp(-3)), -math.log(1 + math.exp(-3) / 4)]),
]


@pytest.mark.parametrize(("objective", "extra", "expected"), GOLDEN)
def test_values_computed_by_hand(objective, extra, expected):
    values = objective.value(LOGITS, LABELS, **extra)
    assert values.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_margin_does_not_count_the_label_as_another_class():
    # Where all other logits are negative, setting the label's to 0 would be wrong.
    logits = torch.tensor([[-1.0, -5.0, -3.0]])
    assert Margin().value(logits, torch.tensor([0])).item() == -2
    assert TargetedMargin().value(logits, LABELS[:1], targets=torch.tensor([2])).item() == -2


@pytest.mark.parametrize(("objective", "extra", "expected"), GOLDEN)
def test_values_belong_to_their_sample(objective, extra, expected):
    for row in range(2):
        part = slice(row, row + 1)
        alone = objective.value(
            LOGITS[part], LABELS[part], **{name: tensor[part] for name, tensor in extra.items()}
        )
        assert alone.shape == (1,)
        assert alone.item() == pytest.approx(expected[row], abs=1e-12)


# The outputs of a discriminator are no logits of which only differences count.
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES.names()) - {"manifold_loss"}))
@given(
    st.lists(st.lists(st.integers(-40, 40), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(-100, 100),
)
@settings(max_examples=30, deadline=None)
def test_no_objective_sees_a_shift_of_all_logits(objective, rows, shift):
    logits = torch.tensor(rows).double() / 8
    count = len(logits)
    extra = {
        "targets": torch.full((count,), 2),
        "ranking": torch.full((count, 1), 2),
        "clean": torch.log_softmax(torch.arange(4).double().expand(count, 4), 1),
    }
    labels = torch.zeros(count, dtype=torch.int64)
    one, two = (
        OBJECTIVES.build(objective).value(tensor, labels, **extra)
        for tensor in (logits, logits + shift)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("objective", "extra", "expected"), GOLDEN)
def test_gradients(objective, extra, expected):
    leaf = (LOGITS + torch.tensor([[0.1, -0.2, 0.3]])).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective.value(z, LABELS, **extra), leaf)


def test_gradients_of_cross_entropy_and_margin_in_closed_form():
    leaf = LOGITS.clone().requires_grad_()
    gradient = torch.autograd.grad(CrossEntropy().value(leaf, LABELS).sum(), leaf)[0]
    one_hot = torch.tensor([[1.0, 0, 0], [1, 0, 0]]).double()
    torch.testing.assert_close(gradient, LOGITS.softmax(1) - one_hot)
    gradient = torch.autograd.grad(Margin().value(leaf, LABELS)[0], leaf)[0]
    assert gradient.tolist() == [[-1, 1, 0], [0, 0, 0]]


def test_beyond_the_confidence_there_is_no_gradient():
    leaf = LOGITS.clone().requires_grad_()
    gradient = torch.autograd.grad(Margin(confidence=1.0).value(leaf, LABELS).sum(), leaf)[0]
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).any()


@pytest.mark.parametrize(("objective", "extra", "expected"), GOLDEN)
def test_large_logits_stay_finite(objective, extra, expected):
    values = objective.value(1e4 * LOGITS.float(), LABELS, **extra)
    assert values.isfinite().all()


@pytest.fixture
def linear():
    """Images (B, 1, 1, 3) that are their logits."""
    return nn.Flatten()


IMAGES = torch.tensor([[0.1, 0.9, 0.3], [0.6, 0.2, 0.4]]).view(2, 1, 1, 3)


def test_a_bound_objective_gives_values_logits_and_who_is_fooled(linear):
    bound = Margin().bind(linear, IMAGES, LABELS)
    values, logits = bound(IMAGES)
    torch.testing.assert_close(values, torch.tensor([0.8, -0.2]))
    assert torch.equal(logits, IMAGES.flatten(1))
    assert bound.fooled(logits).tolist() == [True, False]
    kept = bound.keep(torch.tensor([False, True]))
    torch.testing.assert_close(kept(IMAGES[1:])[0], torch.tensor([-0.2]))
    assert kept.fooled(logits[1:]).tolist() == [False]


def test_kl_compares_with_the_clean_prediction(linear):
    bound = KullbackLeibler().bind(linear, IMAGES, LABELS)
    torch.testing.assert_close(bound(IMAGES)[0], torch.zeros(2), rtol=0, atol=1e-6)
    moved = IMAGES.flip(3)
    p, q = IMAGES.flatten(1).softmax(1), moved.flatten(1).softmax(1)
    torch.testing.assert_close(bound(moved)[0], (p * (p / q).log()).sum(1))
    kept = bound.keep(torch.tensor([1]))
    torch.testing.assert_close(kept(moved[1:])[0], bound(moved)[0][1:])
    # The labels play no part.
    other = KullbackLeibler().bind(linear, IMAGES, 1 + LABELS)
    assert torch.equal(other(moved)[0], bound(moved)[0])


@pytest.mark.parametrize("form", [TargetedCrossEntropy, TargetedMargin])
def test_targets_by_choice_by_rank_and_their_success(linear, form):
    # Wrong classes of the first image by rank: 1, 2; of the second: 2, 1.
    for target, expected in (("second", [1, 2]), ("least", [2, 1])):
        bound = form(target=target).bind(linear, IMAGES, LABELS)
        assert bound.extra["targets"].tolist() == expected
    bound = form().bind(linear, IMAGES, LABELS, torch.tensor([2, 2]))
    logits = IMAGES.flatten(1)
    assert bound.fooled(logits).tolist() == [False, False]  # class 1 is wrong, but not the target
    assert bound.fooled(logits.flip(1)).tolist() == [False, True]
    assert bound.fooled(torch.tensor([[0.0, 0, 1], [1, 0, 0]])).tolist() == [True, False]
    assert bound.keep(torch.tensor([True, False])).fooled(torch.eye(3)[2:]).tolist() == [True]


@pytest.mark.parametrize("form", [TargetedCrossEntropy, TargetedMargin])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1]), "differ from the label"),
        (torch.tensor([1]), r"expected int64 \(2,\).*\(1,\)"),
        (torch.tensor([1.0, 2.0]), r"expected int64.*float32"),
    ],
)
def test_wrong_targets(linear, form, targets, message):
    with pytest.raises(InputError, match=f"targets: .*{message}"):
        form().bind(linear, IMAGES, LABELS, targets)


@pytest.mark.parametrize("objective", [CrossEntropy(), Margin(), KullbackLeibler()])
def test_an_untargeted_objective_takes_no_targets(linear, objective):
    with pytest.raises(InputError, match=r"targets: .* is untargeted"):
        objective.bind(linear, IMAGES, LABELS, TARGETS)


def test_binding_leaves_no_graph(linear):
    images = IMAGES.clone().requires_grad_()
    bound = KullbackLeibler().bind(linear, images, LABELS)
    assert not bound.extra["clean"].requires_grad


@pytest.mark.parametrize("confidence", [-1.0, math.nan])
@pytest.mark.parametrize("form", [Margin, TargetedMargin])
def test_a_negative_confidence_is_an_error(form, confidence):
    with pytest.raises(InputError, match="confidence: expected"):
        form(confidence=confidence)


def test_objectives_of_an_experiment_file():
    assert OBJECTIVES.build("ce") == CrossEntropy()
    assert OBJECTIVES.build({"type": "margin", "confidence": 3}) == Margin(confidence=3.0)
    assert OBJECTIVES.build({"type": "targeted_ce", "target": "least"}).target == "least"
    with pytest.raises(ConfigError, match=r"targeted_ce.*target.*'second' or 'least'.*'last'"):
        OBJECTIVES.build({"type": "targeted_ce", "target": "last"})
    with pytest.raises(ConfigError, match=r"Unknown objective 'marginn'\. Did you mean 'margin'"):
        OBJECTIVES.build("marginn")


# The label's rank is first, second, last; twice the two largest are equal.
RATIO_LOGITS = torch.tensor(
    [
        [5.0, 3.0, 2.0, -1.0, -4.0],
        [3.0, 5.0, 2.0, -1.0, -4.0],
        [-4.0, 5.0, 3.0, 2.0, -1.0],
        [4.0, 4.0, 1.0, 0.0, -7.0],
        [0.0, 4.0, 4.0, 2.0, 0.0],
    ]
).double()
RATIO_LABELS = torch.zeros(5, dtype=torch.int64)


def test_the_ratio_by_hand():
    # −(z_y − max of the others) / (1st − 3rd)
    expected = [-2 / 3, 2 / 3, 9 / 3, 0 / 3, 4 / 2]
    assert DLR().value(RATIO_LOGITS, RATIO_LABELS).tolist() == pytest.approx(expected, abs=1e-9)
    # With the label at another place.
    rolled = DLR().value(RATIO_LOGITS.roll(2, 1), RATIO_LABELS + 2)
    assert rolled.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        # (z_t − z_y) / (1st − (3rd + 4th) / 2)
        (1, [-2 / 4.5, 2 / 4.5, 9 / 4.5, 0 / 3.5, 4 / 3]),
        (3, [-6 / 4.5, -4 / 4.5, 6 / 4.5, -4 / 3.5, 2 / 3]),
        (4, [-9 / 4.5, -7 / 4.5, 3 / 4.5, -11 / 3.5, 0]),
    ],
)
def test_the_targeted_ratio_by_hand(target, expected):
    ranking = torch.full((5, 1), target)
    values = TargetedDLR().value(RATIO_LOGITS, RATIO_LABELS, ranking=ranking)
    assert values.tolist() == pytest.approx(expected, abs=1e-9)


def test_ratios_of_few_classes_are_margins():
    two, three = torch.tensor([[1.0, 4.0], [4.0, 1.0]]), torch.tensor([[1.0, 4.0, 2.0]] * 2)
    labels = torch.tensor([0, 0])
    first, last = torch.tensor([[1], [1]]), torch.tensor([[1], [2]])
    assert DLR().value(two, labels).tolist() == [3, -3]
    assert DLR().value(three, labels).tolist() == pytest.approx([1, 1])  # 3 / (4 − 1)
    assert TargetedDLR().value(two, labels, ranking=first).tolist() == [3, -3]
    assert TargetedDLR().value(three, labels, ranking=last).tolist() == [3, 1]


@pytest.mark.parametrize("classes", [3, 4, 6])
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_ratios_see_neither_shift_nor_positive_scale(classes, data):
    numbers = st.lists(st.integers(-50, 50), min_size=classes, max_size=classes, unique=True)
    logits = torch.tensor([data.draw(numbers)]).double() / 8
    label = torch.tensor([data.draw(st.integers(0, classes - 1))])
    shift = data.draw(st.floats(-100, 100))
    scale = data.draw(st.floats(1e-3, 1e3))
    moved = scale * logits + shift
    one, two = DLR().value(logits, label), DLR().value(moved, label)
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)
    assert (one > 0) == (logits.argmax(1) != label)
    for target in set(range(classes)) - {label.item()}:
        ranking = torch.tensor([[target]])
        one, two = (
            TargetedDLR().value(tensor, label, ranking=ranking) for tensor in (logits, moved)
        )
        # Below four classes it is a margin.
        factor = scale if classes == 3 else 1.0
        torch.testing.assert_close(two, factor * one, rtol=1e-6, atol=1e-6)
        assert (one > 0) == (logits[0, target] > logits[0, label])


@pytest.mark.parametrize("objective", [DLR(), TargetedDLR()])
def test_gradients_of_ratios(objective):
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(4, 6, generator=generator).double().requires_grad_()
    labels, ranking = torch.tensor([0, 1, 2, 3]), torch.tensor([[5], [4], [0], [1]])
    assert torch.autograd.gradcheck(lambda z: objective.value(z, labels, ranking=ranking), leaf)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_equal_logits_give_no_infinite_ratio(classes):
    leaf = torch.zeros(2, classes, requires_grad=True)
    labels, ranking = torch.zeros(2, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)
    for objective in (DLR(), TargetedDLR()):
        values = objective.value(leaf, labels, ranking=ranking)
        assert values.tolist() == [0, 0]
        assert torch.autograd.grad(values.sum(), leaf)[0].isfinite().all()


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=7), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_the_likeliest_others_are_the_clean_ranking_without_the_label(logits, count, data):
    label = data.draw(st.integers(0, len(logits) - 1))
    found = likeliest_others(torch.tensor([logits]).double(), torch.tensor([label]), count)
    # Equal ones in the order of their numbers.
    ranked = sorted(range(len(logits)), key=lambda place: (-logits[place], place))
    ranked.remove(label)
    assert found.tolist() == [ranked[:count]]


@pytest.mark.parametrize(("targets", "turns"), [(1, 1), (2, 2), (9, 4)])
def test_targets_in_turn(targets, turns):
    images = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.5], [0.6, 0.2, 0.4, 0.9, 0.1]]).view(2, 1, 1, 5)
    labels = torch.tensor([4, 0])
    rankings = torch.tensor([[1, 2, 3, 0], [3, 2, 1, 4]])
    bound = TargetedDLR(targets=targets).bind(nn.Flatten(), images, labels)
    assert bound.turns == turns
    assert torch.equal(bound.extra["ranking"], rankings[:, :turns])
    # The ranking stays that of the clean images.
    moved = images.flip(3)
    for number in range(turns):
        turn = bound.turn(number)
        one = TargetedDLR().value(
            moved.flatten(1), labels, ranking=rankings[:, number : number + 1]
        )
        torch.testing.assert_close(turn(moved)[0], one)
        kept = bound.keep(torch.tensor([False, True])).turn(number)
        torch.testing.assert_close(kept(moved[1:])[0], one[1:])
        # Any misclassification is a success, not the target's alone.
        assert turn.fooled(torch.eye(5)[[0, 4]]).tolist() == [True, True]
        assert turn.fooled(torch.eye(5)[[4, 0]]).tolist() == [False, False]


def test_ratios_of_an_experiment_file():
    assert OBJECTIVES.build("dlr") == DLR()
    assert OBJECTIVES.build({"type": "targeted_dlr", "targets": 3}) == TargetedDLR(targets=3)
    for targets in (0, -1):
        with pytest.raises(ConfigError, match="targets: expected at least 1"):
            OBJECTIVES.build({"type": "targeted_dlr", "targets": targets})
    with pytest.raises(InputError, match=r"targets: .* is untargeted"):
        TargetedDLR().bind(nn.Flatten(), IMAGES, LABELS, TARGETS)
