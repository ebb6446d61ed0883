import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from onmanifold.attacks import APGD, PGD, Engine, RandomPerturbation
from onmanifold.attacks.engine import frozen
from onmanifold.attacks.square import Square
from onmanifold.data.dataset import Dataset
from onmanifold.evaluation import WORST_CASE, Evaluation, evaluate, model_digest
from onmanifold.evaluation.defence_evaluation import (
    TransferAttack,
    evaluate_defence,
    ways_through,
)
from onmanifold.evaluation.defence_projection import ManifoldProjection
from onmanifold.evaluation.defence_result import TRANSFER
from onmanifold.evaluation.defences import (
    BPDA,
    Defence,
    Differentiable,
    Unrolled,
    inner_gradient,
)
from onmanifold.foundation.errors import InputError
from onmanifold.threats import ImageBall

BALL = ImageBall(norm="linf", radius=0.06)
SHAPE = (1, 6, 6)


def smooth_net(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        layers = nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 4)
        net = nn.Sequential(*layers)
        for parameter in net.parameters():
            parameter.data *= 4
    return net.eval().to(dtype)


def some_images(count=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, *SHAPE, generator=generator).to(dtype)


def some_dataset(net, count=24):
    images = some_images(count)
    with torch.no_grad():
        labels = net(images).argmax(1)
    return Dataset(
        "toy", images, labels, tuple("abcd"), "toy", indices=torch.arange(50, 50 + count)
    )


class Descent(Defence):
    """Some steps down the classifier's own free energy: an inner optimisation."""

    def __init__(self, classifier, step=0.05, steps=3):
        super().__init__(classifier)
        self.step, self.steps = step, steps

    def transform(self, images, differentiable=False):
        for _ in range(self.steps):
            slope = inner_gradient(
                lambda x: self.classifier(x).logsumexp(1), images, differentiable
            )
            images = images - self.step * torch.tanh(3 * slope)
        return images


def flipped(images):
    return images.flip(-1)


def rounded(images, levels=4):
    return (levels * images).round() / levels


def stepped(images):
    """An inner gradient without a thought for whether gradients are on outside."""
    inputs = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(inputs.square().sum(), inputs)
    return images - 0.1 * slope


class Noisy(nn.Module):
    def __init__(self, deviation=0.2):
        super().__init__()
        self.deviation = deviation

    def forward(self, images):
        return images + self.deviation * torch.randn_like(images)


def gradient_of(model, images, weights):
    inputs = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad((model(inputs) * weights).sum(), inputs)
    return slope


def weights_for(images):
    return torch.randn(len(images), 4, generator=torch.Generator().manual_seed(7)).to(images)


def make_blur():
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).view(1, 1, 3, 3) / 16
    return functools.partial(functional.conv2d, weight=kernel, padding=1)


# The ways through.


@pytest.mark.parametrize("transform", [rounded, flipped])
def test_bpda_has_the_identity_as_its_backward_pass(transform):
    net, images = smooth_net(), some_images()
    weights = weights_for(images)
    expected = gradient_of(net, transform(images), weights)
    found = gradient_of(BPDA(Defence(net, transform)), images, weights)
    assert torch.equal(found, expected)
    assert not torch.equal(found, gradient_of(net, images, weights))


def test_bpda_takes_the_backward_pass_of_its_surrogate():
    net, images, blur = smooth_net(), some_images(), make_blur()
    weights = weights_for(images)
    at_seen = gradient_of(net, rounded(images), weights)
    inputs = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(blur(inputs), inputs, at_seen)
    found = gradient_of(BPDA(Defence(net, rounded), blur), images, weights)
    torch.testing.assert_close(found, expected)


def test_the_unrolled_gradient_is_the_slope_of_the_whole_defence():
    defence = Descent(smooth_net(torch.float64))
    images = some_images(dtype=torch.float64)
    weights = weights_for(images)
    slope = gradient_of(Unrolled(defence), images, weights)
    generator = torch.Generator().manual_seed(8)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        values = [(defence(images + s * direction) * weights).sum() for s in (step, -step)]
    numeric = (values[0] - values[1]) / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-6)
    # The direct path, and the identity, are other gradients: the test would notice.
    direct = gradient_of(Differentiable(defence), images, weights)
    assert not torch.isclose((direct * direction).sum(), numeric, rtol=1e-2)
    torch.testing.assert_close(direct, gradient_of(BPDA(defence), images, weights))


@pytest.mark.parametrize(
    "make",
    [
        lambda net: Defence(net, rounded),
        lambda net: Defence(net, stepped),
        lambda net: Defence(net, Noisy()),
        Descent,
    ],
    ids=["rounded", "stepped", "noisy", "descent"],
)
def test_every_way_has_the_values_of_the_defence(make):
    defence, images = make(smooth_net()), some_images()

    def logits(model, mode, **requires):
        torch.manual_seed(0)
        with mode():
            return model(images.clone().requires_grad_(**requires)).detach().clone()

    torch.manual_seed(0)
    expected = defence.classifier(defence.transform(images)).detach()
    ways, _ = ways_through(defence, images)
    assert ways
    for model in (defence, *ways.values()):
        for mode in (torch.no_grad, torch.enable_grad):
            assert torch.equal(logits(model, mode), expected)
        with torch.inference_mode():
            torch.manual_seed(0)
            assert torch.equal(model(images), expected)


def test_only_ways_with_a_gradient_are_taken():
    net, images = smooth_net(), some_images()
    ways, left_out = ways_through(Defence(net, rounded), images)
    assert set(ways) == {"BPDA"}
    assert "zero" in left_out["differentiable"]
    assert "differentiable" in left_out["unrolled"]
    ways, left_out = ways_through(Defence(net, lambda x: x.detach() + 0.1), images)
    assert set(ways) == {"BPDA"}
    assert "BPDA" in left_out["differentiable"]
    small = Defence(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), lambda x: x[..., ::2, ::2])
    ways, left_out = ways_through(small, images)
    assert set(ways) == {"differentiable"}
    assert "(5, 1, 3, 3)" in left_out["BPDA"]
    ways, left_out = ways_through(
        Defence(net, rounded), images, {"blur": make_blur(), "cut": lambda x: x[..., 1:, 1:]}
    )
    assert set(ways) == {"BPDA", "BPDA with blur"}
    assert "(5, 1, 5, 5)" in left_out["BPDA with cut"]
    assert set(ways_through(Descent(net), images)[0]) == {"differentiable", "BPDA", "unrolled"}


@pytest.mark.parametrize("way", ["BPDA", "unrolled"])
def test_an_attack_meets_the_way_itself_and_leaves_it_untouched(way):
    defence = Descent(smooth_net())
    for parameter, flag in zip(defence.parameters(), [True, False, True, True], strict=True):
        parameter.requires_grad_(flag)
    defence.train()
    defence.classifier[2].eval()
    model = ways_through(defence, some_images())[0][way]
    before = {name: tensor.clone() for name, tensor in defence.state_dict().items()}
    flags = [module.training for module in model.modules()]
    images, weights = some_images(), weights_for(some_images())
    state = torch.get_rng_state()
    with frozen(model, images, Engine()) as network:
        assert not network.folded  # a traced copy would have another gradient
        assert torch.equal(
            gradient_of(network, images, weights), gradient_of(model, images, weights)
        )
    result = PGD(BALL, steps=3)(model, images, torch.zeros(len(images), dtype=torch.int64))
    assert torch.equal(result.predictions, defence.eval()(result.images).argmax(1))
    defence.train()
    defence.classifier[2].eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in defence.parameters()] == [
        True,
        False,
        True,
        True,
    ]
    assert all(parameter.grad is None for parameter in defence.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in defence.state_dict().items())


@pytest.mark.parametrize("transform", [rounded, stepped])
def test_no_trace_loses_a_backward_pass(transform):
    images, weights = some_images(), weights_for(some_images())
    for model in (BPDA(Defence(smooth_net(), transform)), Defence(smooth_net(), transform)):
        with frozen(model, images, Engine()) as network:
            assert not network.folded
            found = gradient_of(network, images, weights)
        # But for rounding, which another number of threads changes.
        torch.testing.assert_close(found, gradient_of(model, images, weights), rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_said():
    net, images = smooth_net(), some_images()
    with pytest.raises(InputError, match="overrides"):
        Defence(net)
    with pytest.raises(InputError, match="Module"):
        Defence(flipped, flipped)
    with pytest.raises(InputError, match="use BPDA"):
        Unrolled(Defence(net, rounded))
    with pytest.raises(InputError, match="use BPDA"):
        PGD(BALL, steps=1)(
            Differentiable(Defence(net, torch.Tensor.detach)), images, torch.zeros(5).long()
        )
    with pytest.raises(InputError, match="5 rows"):
        Defence(net, lambda x: x[:2])(images)
    with pytest.raises(InputError, match=r"surrogate.*\(5, 1, 5, 5\)"):
        gradient_of(BPDA(Defence(net, rounded), lambda x: x[..., 1:, 1:]), images, 1)
    with pytest.raises(InputError, match="'A'"):
        evaluate_defence(
            Defence(net, flipped),
            some_dataset(net),
            BALL,
            attacks={"A": PGD(BALL)},
            black_box={"A": PGD(BALL)},
        )


# The protocols.


def attacks():
    return {"PGD": PGD(BALL, steps=10), "T": APGD(BALL, steps=5, objective="targeted_dlr")}


def queries(number=150):
    return {"Square": Square(BALL, number)}


@functools.cache
def flipped_result():
    net = smooth_net()
    defence = Defence(net, flipped)
    dataset = some_dataset(nn.Sequential(Defence(net, flipped)))
    found = evaluate_defence(
        defence, dataset, BALL, attacks=attacks(), black_box=queries(), seed=3, batch_size=9
    )
    return defence, dataset, found


def test_images_made_for_the_static_model_are_shown_to_the_defence():
    defence, dataset, found = flipped_result()
    for name, attack in attacks().items():
        attack = dataclasses.replace(attack, early_stop=False)
        made = attack(
            defence.classifier, dataset.images, dataset.labels, seed=3, indices=dataset.indices
        )
        predicted = defence(made.images).argmax(1)
        rows = found.defence.to_pandas().query(f"attack == '{name}, {TRANSFER}'")
        assert rows["adversarial_prediction"].tolist() == predicted.tolist()
        assert rows["success"].tolist() == (predicted != dataset.labels).tolist()
        assert rows["forwards"].tolist() == made.forwards.tolist()


def test_attacks_through_the_defence_find_what_transferred_images_do_not():
    defence, dataset, found = flipped_result()
    # The defence is a permutation: worth nothing, but images made for the static model miss it.
    assert found.accuracy("standard") == 1
    assert found.accuracy(TRANSFER) > found.accuracy("BPDA")
    assert found.accuracy(TRANSFER) > found.accuracy("differentiable") + 0.2
    assert found.accuracy() <= min(map(found.accuracy, found.protocols))
    own = evaluate(nn.Sequential(defence), dataset, {"PGD, differentiable": attacks()["PGD"]}, 9, 3)
    name = "PGD, differentiable"
    assert np.array_equal(found.defence.correct(name), own.correct(name))
    assert found.left_out.keys() == {"unrolled"}
    assert not found.random
    assert found.cost.passes == 1
    assert found.cost.time > 0


def test_the_table_and_the_summary_say_it():
    _, dataset, found = flipped_result()
    table = found.table()
    row = table.loc["defence", "differentiable", "all of these"]
    assert row["accuracy"] == found.accuracy("differentiable")
    assert row["low"] < row["accuracy"] + 1e-9 <= row["high"] + 1e-9
    assert table.loc["defence", "worst case", ""]["accuracy"] == found.accuracy()
    assert table.loc["static", "white box", "PGD"]["accuracy"] == found.static.accuracy("PGD")
    assert table.loc["static", "black box", "Square"]["forwards"] > 1
    assert set(table["n"]) == {len(dataset)}
    assert f"{100 * found.accuracy():.1f} %" in found.summary()
    assert f"{100 * found.static.accuracy(WORST_CASE):.1f} %" in found.summary()
    assert found.verdict in found.summary()
    with pytest.raises(InputError, match="differentiable"):
        found.accuracy("diferentiable")


def test_the_verdict_compares_worst_cases():
    net = smooth_net()
    dataset = some_dataset(net)
    strong = evaluate(net, dataset, {"A": RandomPerturbation(ImageBall("linf", 0.0))})
    weak = evaluate(net, dataset, {"A": PGD(ImageBall("linf", 0.5))})
    assert strong.worst_case() > weak.worst_case() + 0.5
    _, _, found = flipped_result()
    for static, defence, verdict in (
        (weak, strong, "better"),
        (strong, weak, "worse"),
        (weak, weak, "not better"),
    ):
        found = dataclasses.replace(found, static=static, defence=defence, protocols={})
        assert found.verdict == verdict
        sign = {"better": 1, "worse": -1, "not better": 0}[verdict]
        assert np.sign(found.comparison().difference) == sign
    missed = dataclasses.replace(found, protocols={"BPDA": (), TRANSFER: ()})
    assert missed.missed() == len(dataset) - weak.correct("A").sum()
    assert "lower" in missed.summary()


def test_rounding_is_broken_by_bpda():
    net = smooth_net()
    defence = Defence(net, rounded)
    dataset = some_dataset(defence, 40)
    found = evaluate_defence(
        *(defence, dataset, BALL),
        attacks=attacks(),
        black_box=queries(),
        surrogates={"blur": make_blur()},
    )
    assert set(found.protocols) == {TRANSFER, "BPDA", "BPDA with blur", "black box"}
    assert not np.array_equal(found.correct("BPDA"), found.correct("BPDA with blur"))
    assert found.accuracy("BPDA") < found.accuracy(TRANSFER)


def test_a_random_defence_is_averaged_and_judged_by_majority():
    net = smooth_net()
    defence = Defence(net, Noisy(0.08))
    dataset = some_dataset(net)
    assert defence.given.training
    found = evaluate_defence(
        defence, dataset, BALL, attacks=attacks(), black_box=queries(20), passes=3
    )
    assert found.random
    frame = found.defence.to_pandas()
    through = frame.query("attack == 'PGD, differentiable'")
    assert set(through["forwards"]) == {3 * 11}
    assert set(frame.query(f"attack == 'PGD, {TRANSFER}'")["forwards"]) == {11}
    # Clean predictions are the most frequent ones.
    torch.manual_seed(1)
    votes = torch.stack([defence(dataset.images).argmax(1) for _ in range(400)])
    frequent = votes.mode(0).values
    share = (votes == frequent).float().mean(0)
    clear = (share > 0.8).numpy()
    assert 5 < clear.sum() < len(dataset)
    clean = found.defence.to_pandas().iloc[: len(dataset)]["clean_prediction"].to_numpy()
    assert np.array_equal(clean[clear], frequent.numpy()[clear])
    # More passes are asked for by default.
    again = evaluate_defence(
        defence, dataset.take(4), BALL, attacks={"P": attacks()["PGD"]}, black_box={}
    )
    assert set(again.defence.to_pandas().query("attack == 'P, BPDA'")["forwards"]) == {20 * 11}


def test_images_of_another_model_are_shown_too():
    net, other = smooth_net(), Defence(smooth_net(), flipped)
    defence = Defence(net, flipped)
    dataset = some_dataset(defence)
    found = evaluate_defence(
        defence,
        dataset,
        BALL,
        attacks={"PGD": attacks()["PGD"]},
        black_box={},
        sources={"twin": other},
    )
    # The twin is the defence itself.
    strong = TransferAttack.of(attacks()["PGD"], other)(defence, dataset.images, dataset.labels)
    assert found.accuracy("transfer from twin") < found.accuracy(TRANSFER)
    assert float((~strong.success).float().mean()) < found.accuracy(TRANSFER)


class NoisyInTheLight(nn.Module):
    """Random, but not on dark images."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        bright = images.flatten(1).mean(1).view(-1, 1, 1, 1) > 0.4
        return self.net(images + bright * torch.randn_like(images))


@pytest.mark.parametrize("bright", [True, False])
def test_a_source_that_is_random_on_some_images_is_recognised(bright, monkeypatch):
    net, images = smooth_net(), some_images(6)
    images[0] = 0.1
    images[1:] *= 1.0 if bright else 0.5
    labels = net(images).argmax(1)
    searches = []

    def spy(attack, search):
        searches.append(search)
        return own(attack, search)

    own = PGD.search
    monkeypatch.setattr(PGD, "search", spy)
    transfer = TransferAttack.of(PGD(BALL, steps=2), NoisyInTheLight(net))
    assert not transfer.attack.early_stop
    transfer(net, images, labels)
    assert [search.random for search in searches] == [bright]


def test_a_second_start_computes_nothing_twice(tmp_path, monkeypatch):
    net = smooth_net()
    dataset = some_dataset(net, 8)

    def run(defence):
        return evaluate_defence(
            defence,
            dataset,
            BALL,
            attacks={"PGD": attacks()["PGD"]},
            black_box=queries(5),
            batch_size=4,
            directory=tmp_path,
        )

    first = run(Descent(net))
    loaded = Evaluation.load(tmp_path / "ledger.parquet")
    assert loaded.names == first.defence.names
    assert np.array_equal(loaded.correct(WORST_CASE), first.correct())

    def fails(*arguments):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(PGD, "search", fails, raising=False)
        patch.setattr(Square, "search", fails)
        again = run(Descent(net))
        assert again.defence.ledger.equals(first.defence.ledger)
        # Another strength of the same defence, its weights the same, is another defence.
        with pytest.raises(AssertionError, match="computed again"):
            run(Descent(net, step=0.06))


def test_a_digest_tells_settings_apart():
    net = smooth_net()

    def levels(number):
        return lambda images: rounded(images, number)

    defences = [
        Defence(net, rounded),
        Defence(net, flipped),
        Defence(net, levels(4)),
        Defence(net, levels(5)),
        Defence(net, functools.partial(rounded, levels=4)),
        Defence(net, functools.partial(rounded, levels=5)),
        Defence(net, Noisy(0.1)),
        Defence(net, Noisy(0.2)),
        Descent(net, step=0.1),
        Descent(net, step=0.2),
        BPDA(Defence(net, rounded)),
        BPDA(Defence(net, rounded), make_blur()),
        Differentiable(Defence(net, rounded)),
    ]
    assert len({model_digest(defence) for defence in defences}) == len(defences)
    assert model_digest(Defence(net, levels(4))) == model_digest(Defence(net, levels(4)))


# The projection.


def test_the_projection_goes_to_the_nearest_image_and_cuts_the_gradient(plane):
    generator = torch.Generator().manual_seed(0)
    codes = 1.2 * torch.rand(300, 6, generator=generator).double() - 0.6
    transform = ManifoldProjection(plane, codes[100:], steps=200).double()
    clean = plane.decode(codes[:10])
    noise = 0.05 * torch.randn(clean.shape, generator=generator).double()
    images = (clean + noise).clamp(0, 1)
    basis = plane.weight.T  # orthogonal columns of equal length
    projector = basis @ torch.linalg.pinv(basis)
    exact = 0.5 + (images.flatten(1) - 0.5) @ projector
    seen = transform(images)
    torch.testing.assert_close(seen.flatten(1), exact, atol=2e-3, rtol=0)
    assert not transform(images.clone().requires_grad_()).requires_grad
    # Followed, it has the values, and the gradient of the projection.
    inputs = images.clone().requires_grad_()
    followed = transform(inputs, differentiable=True)
    assert torch.equal(followed, seen)
    weights = torch.randn(images.shape, generator=generator).double()
    (slope,) = torch.autograd.grad((followed * weights).sum(), inputs)
    torch.testing.assert_close(
        slope.flatten(1), weights.flatten(1) @ projector, atol=1e-3, rtol=1e-3
    )
    # The smooth stand-in is one of its codes' images where no other is near.
    spread = ManifoldProjection(plane, torch.cat([codes[:1], 40 * codes[1:2]])).double()
    torch.testing.assert_close(spread.smooth(images[:1]), clean[:1], atol=1e-4, rtol=0)
    (slope,) = torch.autograd.grad(transform.smooth(inputs).sum(), inputs)
    assert bool(slope.flatten(1).any(1).all())
    # An image does not depend on its batch.
    torch.testing.assert_close(transform(images[3:4]), seen[3:4], atol=1e-9, rtol=0)


def test_more_search_never_goes_further_and_encoders_serve_as_well(squashed):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 8, 8, generator=generator)
    codes = torch.randn(50, 8, generator=generator)
    distances = [
        ManifoldProjection(squashed, codes, starts=starts, steps=steps, restarts=restarts)
        .nearest(images)
        .distance
        for starts, steps, restarts in ((1, 0, 0), (3, 0, 0), (3, 20, 0), (3, 20, 2))
    ]
    for further, nearer in itertools.pairwise(distances):
        assert bool((nearer <= further + 1e-6).all())
    assert bool((distances[2] < distances[1] - 1e-3).any())
    encoded = ManifoldProjection(squashed, steps=0)
    expected = squashed.decode(squashed.encode(images, torch.zeros(6, dtype=torch.int64)))
    torch.testing.assert_close(encoded(images), expected)
    with pytest.raises(InputError, match="starts"):
        ManifoldProjection(squashed, starts=0)
    with pytest.raises(InputError, match="codes"):
        ManifoldProjection(squashed, codes[:, :3])
