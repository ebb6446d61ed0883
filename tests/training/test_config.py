"""The configuration: defaults, checks, building from plain data."""

import dataclasses

import pytest

import onmanifold as om
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS, Context, build_component, describe
from onmanifold.training import (
    DMAT,
    AdversarialTraining,
    RandomPerturbationTraining,
    TrainingConfig,
)
from onmanifold.training.schedules import Cosine, Step


def build(values):
    return build_component(TrainingConfig, values, Context(), "training")


def test_defaults_are_those_of_disentangling():
    config = TrainingConfig()
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 0.01, 1e-4)
    assert (config.batch_size, config.epochs) == (100, 20)
    assert config.schedule.factor(2.5, 20) == pytest.approx(0.95**2)


def test_built_from_plain_data():
    config = build(
        {
            "optimizer": "sgd",
            "schedule": {"type": "step", "milestones": [75, 90]},
            "validation_attack": {"type": "pgd", "threat": {"type": "image_ball"}, "steps": 3},
        }
    )
    assert config.schedule == Step(milestones=(75, 90))
    assert config.validation_attack == om.PGD(om.ImageBall(), steps=3)
    assert build({"schedule": "cosine"}).schedule == Cosine()
    assert TrainingConfig(schedule="cosine").schedule == Cosine()
    without_type = {key: value for key, value in describe(config).items() if key != "type"}
    assert build(without_type) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown key 'epoch'. Did you mean 'epochs'"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, found 0"),
        ({"epochs": "many"}, "epochs"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"ema": 1.0}, "ema: expected a number in"),
        ({"precision": "16"}, "precision"),
        ({"attack_precision": "16"}, "attack_precision"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"snapshot_epochs": 0}, "snapshot_epochs: expected an integer >= 1, found 0"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"validation_attack": "pdg"}, "Did you mean 'pgd'"),
        ({"betas": [0.9]}, "betas"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ConfigError) as caught:
        build(values)
    assert message in str(caught.value)


def test_methods_are_built_from_plain_data():
    context = Context(named={"threat": {"image": om.ImageBall(radius=0.1)}})
    attack = {"type": "pgd", "threat": "image", "steps": 5}
    method = METHODS.build({"type": "adversarial", "attack": attack, "variant": "half"}, context)
    assert method == AdversarialTraining(om.PGD(om.ImageBall(radius=0.1), steps=5), "half")
    dual = METHODS.build(
        {"type": "dual_manifold", "image_attack": attack, "latent_attack": attack}, context
    )
    assert isinstance(dual, DMAT)
    assert dual.attacks == (method.attack, method.attack)
    for built in (method, dual, RandomPerturbationTraining(om.ImageBall())):
        assert METHODS.build(describe(built)) == built


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdversarialTraining(om.PGD(om.ImageBall()), "quarter"),
        lambda: AdversarialTraining(om.ImageBall()),
        lambda: DMAT(om.PGD(om.ImageBall()), om.PGD(om.ImageBall()), -1.0),
        lambda: DMAT(om.PGD(om.ImageBall()), om.PGD(om.ImageBall()), 0.0, 0.0),
        lambda: RandomPerturbationTraining(om.PGD(om.ImageBall())),
        lambda: RandomPerturbationTraining(om.ImageBall(), start="zero"),
    ],
)
def test_bad_methods(make):
    with pytest.raises(ConfigError, match=r"expected|'full', 'half'|'uniform'"):
        make()


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().epochs = 3
