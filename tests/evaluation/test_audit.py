"""Alarms on models that only seem robust, silence on honest ones."""

import copy
import importlib.util
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor, nn

from onmanifold.attacks import APGD, FGSM, PGD
from onmanifold.attacks.autoattack import AutoAttack
from onmanifold.data.dataset import Dataset
from onmanifold.evaluation import evaluate
from onmanifold.evaluation.audits import Audit, Budget, Finding, audit
from onmanifold.evaluation.audits.checks import surely_above, surely_below, surely_more
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.threats import ImageBall, JointBall, LatentBall, TransformationBall


def _load_models():
    path = Path(__file__).with_name("masked_models.py")
    spec = importlib.util.spec_from_file_location("evaluation_masked_models", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


models = _load_models()
BALL = models.BALL
SMALL = Budget(samples=50, steps=10, queries=150, draws=40, planted=12, student_steps=60, factor=4)

# What must be raised at least; each model may raise more.
EXPECTED = {
    "saturated": {
        "zero gradients",
        "objectives agree",
        "random perturbations",
        "planted adversarial examples",
    },
    "quantised": {"zero gradients", "gradients agree with the model", "black box", "loss rises"},
    "shattered": {"gradients agree with the model", "loss rises"},
    "rugged": {"gradients agree with the model", "loss rises", "black box"},
    "noisy": {"randomness"},
    "dropped": {"randomness"},
    "compressed": {"zero gradients", "gradients agree with the model", "black box"},
    "detached": {"zero gradients", "black box", "unlimited radius", "planted adversarial examples"},
    "cut off": {"zero gradients", "black box", "unlimited radius", "planted adversarial examples"},
    "clipped": {"zero gradients", "black box", "unlimited radius"},
    "probabilities": {"probabilities as outputs"},
    "purified": {"optimisation inside the forward pass"},
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return models.make_dataset()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """An ordinary network, not robust."""
    return models.HONEST["conv"]()


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return models.HONEST["small conv, adversarial training"]()


def raised(found: Audit) -> set[str]:
    return {finding.name for finding in found.alarms}


def test_each_masked_model_has_its_expectation():
    assert set(EXPECTED) == set(models.MASKED)


@pytest.mark.parametrize("name", models.MASKED)
def test_masked_models_raise_the_alarm(name, net, data):
    found = audit(models.MASKED[name](net), data, BALL, budget=SMALL)
    assert raised(found) >= EXPECTED[name]


@pytest.mark.parametrize("name", models.HONEST)
def test_honest_models_are_left_alone(name, data):
    found = audit(models.HONEST[name](), data, BALL, budget=SMALL)
    assert raised(found) == set()
    assert {finding.verdict for finding in found.findings} == {"ok", "not applicable"}


def test_a_straight_through_gradient_is_no_mask(net, data):
    assert raised(audit(models.StraightThrough(net), data, BALL, budget=SMALL)) == set()


@pytest.mark.parametrize(
    "threat", [ImageBall("l2", 1.0), ImageBall("l1", 6.0), TransformationBall(0.5)]
)
def test_other_threat_models_of_an_honest_model_are_left_alone(threat, net, data):
    assert raised(audit(net, data, threat, budget=SMALL)) == set()


def test_the_model_is_left_as_it_was_and_the_audit_is_the_same_again(net, data):
    net.train()
    flags = [parameter.requires_grad for parameter in net.parameters()]
    state = torch.get_rng_state()
    chosen = ["zero gradients", "loss rises", "black box", "planted adversarial examples"]
    first, second = (audit(net, data, BALL, budget=SMALL, checks=chosen) for _ in range(2))
    assert first.findings == second.findings
    assert all(module.training for module in net.modules())
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    net.eval()


def test_the_batch_size_plays_no_part(robust, data):
    chosen = ["zero gradients", "more steps", "inside the threat model", "random perturbations"]
    found = [
        audit(robust, data, BALL, budget=SMALL, checks=chosen, batch_size=size) for size in (13, 60)
    ]
    for one, other in zip(found[0].findings, found[1].findings, strict=True):
        assert one.numbers == pytest.approx(other.numbers, abs=1e-5)


def test_a_weak_attack_is_not_converged_and_misses_what_is_planted(net, data):
    weak = PGD(BALL, steps=1, step_size=0.03, start="zero")
    found = audit(net, data, weak, budget=replace(SMALL, factor=10))
    assert raised(found) >= {"converged", "planted adversarial examples"}


@dataclass(frozen=True)
class Cheat(PGD):
    """PGD that goes twice as far as its threat model says."""

    def __call__(self, model, images, labels, *rest, **options):
        beyond = PGD(replace(self.threat, radius=2 * self.threat.radius), steps=self.steps)
        return beyond(model, images, labels, *rest, **options)


def test_images_outside_of_the_ball_are_noticed(net, data):
    found = audit(net, data, Cheat(BALL, steps=5), budget=SMALL, checks=["inside the threat model"])
    assert raised(found) == {"inside the threat model"}
    numbers = found["inside the threat model"].numbers
    assert numbers["largest"] == pytest.approx(0.3, rel=1e-3)


class _TurnedWhereBright(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:
        bright = (images.flatten(1).mean(1) > 0.5).float().view(-1, 1, 1, 1)
        ctx.sign = 1 - 2 * bright
        return 1 * images

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return ctx.sign * gradient


class TurnedWhereBright(nn.Module):
    """A trace has not the gradient of the function, which is the model's own on bright images only."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(_TurnedWhereBright.apply(images))


def test_a_copy_with_other_gradients_is_noticed_and_not_used(net, data):
    means = data.images.flatten(1).mean(1)
    dark, bright = (means <= 0.5).nonzero().squeeze(1), (means > 0.5).nonzero().squeeze(1)
    # Attacks themselves compare the first few images.
    mixed = data.subset(torch.cat([dark[:4], bright[:40]]))
    chosen = ["attacked copy", "objectives agree"]
    arguments = {"budget": SMALL, "checks": chosen}
    found = audit(TurnedWhereBright(net), mixed, replace(BALL, radius=0.3), **arguments)
    assert raised(found) >= {"attacked copy"}
    assert found["attacked copy"].numbers["median_cosine"] == pytest.approx(-1, abs=1e-3)
    # The audit's own attacks follow the model's gradient, which leads them astray; the copy's does not.
    plain = audit(net, mixed, replace(BALL, radius=0.3), **arguments)
    left = [part["objectives agree"].numbers["accuracy_cross_entropy"] for part in (found, plain)]
    assert left[0] > left[1] + 0.3
    # On dark images alone there is nothing to notice.
    found = audit(TurnedWhereBright(net), data.subset(dark), BALL, **arguments)
    assert found["attacked copy"].verdict == "ok"


class Rooted(nn.Module):
    """The square root of zero: right forward, NaN backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) + (images - images.detach()).abs().sqrt().flatten(1).sum(
            1, keepdim=True
        )


def test_gradients_that_are_nan_raise_the_alarm(net, data):
    found = audit(Rooted(net), data, BALL, budget=SMALL, checks=["zero gradients"])
    assert raised(found) == {"zero gradients"}
    assert found["zero gradients"].numbers["margin_not_finite"] == 1


class Fragile(Rooted):
    """Infinite where the image is rough, as noise is."""

    def forward(self, images: Tensor) -> Tensor:
        rough = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1, keepdim=True) > 0.25
        return self.net(images) / (~rough).float()


def test_logits_that_are_not_finite_raise_the_alarm(net, data):
    found = audit(Fragile(net), data, BALL, budget=SMALL, checks=["finite outputs"])
    assert raised(found) == {"finite outputs"}


def test_dlr_on_too_few_classes(net, data):
    chosen = data.subset((data.labels < 3).nonzero().squeeze(1))
    three = replace(chosen, classes=("a", "b", "c"))
    few = nn.Sequential(*net[:-1], nn.Linear(576, 3))
    few[-1].weight.data, few[-1].bias.data = net[-1].weight.data[:3], net[-1].bias.data[:3]
    attacks = {
        objective: APGD(BALL, steps=5, objective=objective) for objective in ("dlr", "targeted_dlr")
    }
    verdicts = [
        audit(few, three, attack, budget=SMALL, checks=["number of classes"]).findings[0].verdict
        for attack in (*attacks.values(), FGSM(BALL))
    ]
    assert verdicts == ["ok", "alarm", "not applicable"]
    found = audit(few, three, BALL, budget=SMALL, checks=["objectives agree", "black box"])
    assert not found.alarms


def test_thorough_audit_of_the_standard_ensemble(net, data):
    thorough = replace(SMALL, decision_queries=300, targeted=True, planted=6)
    attack = AutoAttack(BALL, steps=10, queries=150)
    honest = audit(net, data, attack, budget=thorough)
    assert raised(honest) == set()
    assert honest["black box"].numbers["accuracy_rays"] < 0.9
    masked = audit(models.Quantised(net), data, attack, budget=thorough)
    assert raised(masked) >= {"zero gradients", "loss rises", "unlimited radius"}


def test_inside_inference_mode_and_in_float64(net, data):
    chosen = ["zero gradients", "loss rises", "more steps", "planted adversarial examples"]
    plain = audit(net, data, BALL, budget=SMALL, checks=chosen)
    with torch.inference_mode():
        assert audit(net, data, BALL, budget=SMALL, checks=chosen).findings == plain.findings
    double = audit(copy.deepcopy(net).double(), data, BALL, budget=SMALL, checks=chosen)
    for one, other in zip(double.findings, plain.findings, strict=True):
        assert one.verdict == other.verdict == "ok"
        assert one.numbers == pytest.approx(other.numbers, rel=1e-2, abs=1e-3)


def test_a_surrogate_of_the_callers_own(net, data):
    masked = models.Quantised(net)
    found = audit(masked, data, BALL, budget=SMALL, surrogate=net, checks=["black box"])
    assert found["black box"].numbers["only_transfer_breaks"] > 0.3


# On the manifold.


class Plane(Manifold):
    """Images 1/2 + W z of eight latents z: the directions in which the toy images differ most."""

    name, code_size, latent_size, image_shape = "plane", 8, 8, models.SHAPE
    fingerprint = "plane"

    def __init__(self, data: Dataset, ripples: float = 0.0, columns: int = 8) -> None:
        super().__init__()
        self.ripples = ripples
        self.code_size = self.latent_size = columns
        flat = (data.images - 0.5).flatten(1)
        self.register_buffer("weight", torch.linalg.svd(flat, full_matrices=False)[2][:columns])

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T.to(images)

    def decode(self, codes: Tensor) -> Tensor:
        # A ripple of fine period leaves the image where it is and turns the gradient around.
        moved = codes + self.ripples * torch.sin(codes * 997.0)
        return (0.5 + moved @ self.weight.to(codes)).clamp(0, 1).view(-1, *models.SHAPE)


LATENT = {"reconstruction", "on-manifold metric", "random subspace"}


def test_an_honest_model_on_a_good_manifold_is_left_alone(net, data):
    threat = LatentBall(Plane(data, columns=40), "l2", 1.0, keep_residual=True)
    found = audit(net, data, threat, budget=SMALL)
    assert raised(found) == set()
    assert all(found[name].verdict == "ok" for name in LATENT)
    numbers = found["random subspace"].numbers
    assert numbers["accuracy_manifold"] < numbers["accuracy_subspace"]
    assert numbers["dimension"] == 40


def test_a_poor_reconstruction_is_noticed(net, data):
    threat = LatentBall(Plane(data, columns=2), "l2", 0.1)
    found = audit(net, data, threat, budget=SMALL, checks=["reconstruction", "random subspace"])
    assert raised(found) == {"reconstruction"}


def test_a_weak_on_manifold_metric_is_noticed(net, data):
    threat = LatentBall(Plane(data, ripples=0.02), "l2", 1.5, keep_residual=True)
    found = audit(net, data, threat, budget=SMALL, checks=["on-manifold metric"])
    assert raised(found) == {"on-manifold metric"}
    assert "the papers' on-manifold metric overstates robustness" in found.findings[0].sentence


def test_joint_balls_and_several_threat_models_at_once(net, data):
    manifold = Plane(data, columns=40)
    latent = LatentBall(manifold, "l2", 0.2, keep_residual=True)
    joint = JointBall(ImageBall("linf", 0.1), latent)
    attacks = {"PGD": PGD(BALL, steps=5), "JSA": PGD(joint, steps=5), "FGSM": FGSM(BALL)}
    chosen = ["randomness", "inside the threat model", "larger radius", "unlimited radius"]
    found = audit(net, data, attacks, budget=SMALL, checks=chosen)
    assert raised(found) == set()
    labels = ["image ball linf 0.15", "image ball linf 0.1 + latent ball l2 0.2"]
    assert [part.threat for part in found.findings] == [
        "",
        *[label for label in labels for _ in range(3)],
    ]


# An evaluation that was made before.

SAVED = ["saved images", "recomputed accuracy", "reported accuracy"]


@pytest.fixture
def evaluated(robust, data, tmp_path):
    def run(attack: PGD) -> Path:
        part = data.take(80)
        evaluate(robust, part, {"PGD": attack}, batch_size=30, directory=tmp_path, save_images=True)
        return tmp_path

    return run


def test_an_evaluation_that_holds(evaluated, robust, data):
    attack = PGD(BALL, steps=10)
    found = audit(
        robust, data.take(80), attack, evaluation=evaluated(attack), budget=SMALL, checks=SAVED
    )
    assert all(found[name].verdict == "ok" for name in SAVED)
    assert found["saved images"].numbers["largest"] == pytest.approx(0.15, rel=1e-3)


def test_images_changed_after_the_evaluation_are_noticed(evaluated, robust, data):
    attack = PGD(BALL, steps=10)
    directory = evaluated(attack)
    for path in directory.glob("shards/*/*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        tensors["images"] = 1 - tensors["images"]
        safetensors.torch.save_file(tensors, path)
    found = audit(robust, data.take(80), attack, evaluation=directory, budget=SMALL, checks=SAVED)
    assert raised(found) == {"saved images", "recomputed accuracy"}


def test_an_evaluation_by_a_weak_attack_is_noticed(evaluated, net, robust, data):
    weak = PGD(BALL, steps=1, step_size=0.001)
    directory = evaluated(weak)
    arguments = {"budget": SMALL, "checks": ["reported accuracy"]}
    found = audit(robust, data.take(80), weak, evaluation=directory, **arguments)
    assert raised(found) == {"reported accuracy"}
    # Without a directory; of a weak attack on a network that is not robust at all.
    evaluation = evaluate(net, data, {"weak": weak})
    found = audit(net, data, BALL, evaluation=evaluation, **arguments)
    assert raised(found) == {"reported accuracy"}
    # Of other samples, or of another threat model.
    others = replace(data, indices=data.indices + 1000)
    found = audit(net, others, BALL, evaluation=evaluation, **arguments)
    assert found.findings[0].verdict == "not applicable"
    found = audit(robust, data, ImageBall("l2", 0.1), evaluation=directory, **arguments)
    assert found.findings[0].verdict == "not applicable"


# What comes out.


def test_tables(net, data, tmp_path):
    found = audit(
        models.Saturated(net),
        data,
        BALL,
        budget=SMALL,
        checks=["randomness", "zero gradients", "saved images"],
    )
    frame = found.to_pandas()
    assert list(frame.columns) == ["threat", "check", "verdict", "sentence", "numbers"]
    assert list(frame["verdict"]) == ["ok", "alarm", "not applicable"]
    lines = found.to_markdown().splitlines()
    assert lines[0] == "1 alarm, 1 ok, 1 not applicable (50 samples; image ball linf 0.15)"
    assert lines[4].startswith("| alarm | zero gradients | At a random point")
    written = json.loads(found.to_json(tmp_path / "audit.json"))
    assert json.loads((tmp_path / "audit.json").read_text()) == written
    assert written["facts"]["samples"] == 50
    assert [part["check"] for part in written["findings"]] == list(frame["check"])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.to_rich())
    assert "zero gradients" in console.export_text()
    assert "zero gradients" in repr(found)


def test_numbers_that_are_not_finite_are_null_in_json():
    found = Audit((Finding("a", "ok", {"x": float("nan")}, "A sentence | with a bar."),), {})
    assert json.loads(found.to_json())["findings"][0]["numbers"] == {"x": None}
    assert "with a bar" in found.to_markdown()
    with pytest.raises(InputError, match="unknown check 'b'"):
        found["b"]


def test_progress_is_told(net, data):
    told = []
    audit(
        net,
        data,
        {"PGD": PGD(BALL, steps=2), "L2": PGD(ImageBall("l2", 0.1), steps=2)},
        budget=SMALL,
        checks=["randomness", "inside the threat model"],
        progress=lambda *parts: told.append(parts),
    )
    assert told == [
        ("randomness", 2, 2),
        ("inside the threat model", 1, 2),
        ("inside the threat model", 2, 2),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: expected a torch.nn.Module"),
        ({"threat_or_attacks": "pgd"}, "threat_or_attacks: expected a threat model"),
        ({"threat_or_attacks": {"A": 3}}, "threat_or_attacks: 'A'"),
        ({"samples": 0}, "samples: expected an integer"),
        ({"batch_size": 0}, "batch_size: expected an integer"),
        ({"budget": "quik"}, "Did you mean 'quick'"),
        ({"checks": ["randomnes"]}, "Did you mean 'randomness'"),
    ],
)
def test_what_is_refused(changes, message, net, data):
    arguments = {"model": net, "dataset": data, "threat_or_attacks": BALL} | changes
    with pytest.raises((InputError, ConfigError), match=message):
        audit(**arguments)


def test_a_model_that_is_always_wrong_cannot_be_audited(net, data):
    wrong = replace(data, labels=(data.labels + 1) % 5)
    with pytest.raises(InputError, match="right on none"):
        audit(net, wrong, BALL, budget=SMALL)


def test_small_samples_raise_no_alarm():
    hits = np.zeros(40, dtype=bool)
    hits[:2] = True
    assert not surely_above(hits, 0.001)
    hits[:6] = True
    assert surely_above(hits, 0.05)
    assert not surely_above(hits, 0.1)
    assert surely_below(hits, 0.5)
    assert not surely_below(~hits, 0.9)
    assert surely_more(~hits, hits, 0.2)
    assert not surely_more(hits, ~hits, 0.0)
