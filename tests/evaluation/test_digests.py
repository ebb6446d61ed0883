"""What tells models apart, and what does not: settings against caches, addresses and the process."""

import argparse
import copy
import enum
import functools
import io
import logging
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from onmanifold.evaluation import evaluate, model_digest, recheck
from onmanifold.evaluation.digests import Digests
from onmanifold.foundation.errors import CheckpointError

SCALE = 2.0


class Cooled(nn.Module):
    """A net whose logits are divided by a temperature; takes further settings of any kind."""

    def __init__(self, temperature=1.0, **settings):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Dropout(0.2))
        self.temperature = temperature
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.net(images) / self.temperature


class Mode(enum.Enum):
    SOFT = 1
    HARD = 2


@dataclass(frozen=True, slots=True)
class Options:
    strength: float


class Rounder:
    def __init__(self, levels):
        self.levels = levels
        self._last = object()

    def __call__(self, images):
        return (self.levels * images).round() / self.levels

    def twice(self, images):
        return self(self(images))


def scaled(images):
    return SCALE * images


def faded(images, share=0.5):
    return share * images


def powered(exponent):
    return lambda images: images**exponent


def nested(exponent):
    def outer(images):
        # The constant is in the code of a function inside this one.
        return [(lambda image: image**2.5 + exponent)(image) for image in images]

    return outer


def linear(value):
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


DIFFERENT = {
    "numbers": [1, 1.0, 2, True, None, "1", 1j],
    "functions": [scaled, faded, torch.relu, torch.tanh, nn.functional.relu, nn.functional.gelu],
    "closures": [powered(2), powered(3), nested(2), nested(3)],
    "partials": [functools.partial(faded, share=0.1), functools.partial(faded, share=0.2), faded],
    "cached": [functools.lru_cache(powered(2)), functools.lru_cache(powered(3))],
    "compiled": [torch.compile(powered(2)), torch.compile(powered(3))],
    "methods": [Rounder(2).twice, Rounder(3).twice, Rounder(2).__call__],
    "objects": [Rounder(2), Rounder(3), Options(2), Options(3), Rounder, Options],
    "choices": [Mode.SOFT, Mode.HARD],
    "namespaces": [argparse.Namespace(a=1), argparse.Namespace(a=2)],
    "distributions": [torch.distributions.Normal(0.0, scale) for scale in (0.1, 0.2)],
    "lists": [[1, 2], [2, 1], (1, 2), [1, 2, 2], []],
    "dicts": [{"a": 1}, {"a": 2}, {"b": 1}, {"a": {"b": [1]}}, {"a": {"b": [2]}}, {}],
    "sets": [{1, 2}, {1, 3}, frozenset({1, 2})],
    "tensors": [
        torch.zeros(2),
        torch.zeros(2, 1),
        torch.ones(2),
        torch.zeros(2).double(),
        torch.zeros(2).bfloat16(),
        torch.zeros(0),
        torch.zeros(()),
    ],
    "arrays": [np.zeros(2), np.ones(2), np.zeros(2, "f4"), np.array(["a"], object), np.float32(1)],
    "modules in a list": [[linear(1.0)], [linear(2.0)], [linear(1.0), linear(1.0)]],
    "functions of modules": [functools.partial(faded, share=linear(value)) for value in (1.0, 2.0)],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_settings_tell_models_apart(kind):
    values = DIFFERENT[kind]
    digests = [model_digest(Cooled(setting=value)) for value in values]
    assert len(set(digests)) == len(values)
    # A copy is the same model, whatever new addresses it has.
    assert [model_digest(copy.deepcopy(Cooled(setting=value))) for value in values] == digests


def test_one_number_tells_models_apart():
    assert model_digest(Cooled(1.0)) != model_digest(Cooled(1.1))
    assert model_digest(Cooled()) == model_digest(Cooled())
    # Also that of a submodule, and one that a library's module does not print.
    other = Cooled()
    other.net[1].strength = 1
    assert model_digest(other) != model_digest(Cooled())
    conv, replicated = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)
    replicated.load_state_dict(conv.state_dict())
    assert model_digest(conv) == model_digest(replicated)
    replicated.training, replicated.stride = False, (2, 2)
    assert model_digest(conv) != model_digest(replicated)


def test_names_from_outside_of_a_function_count(monkeypatch):
    before = model_digest(Cooled(setting=scaled))
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert model_digest(Cooled(setting=scaled)) != before
    # And no others: an attribute of that name is not the variable.
    before = model_digest(Cooled(setting=lambda images: images.SCALE))
    monkeypatch.setitem(globals(), "SCALE", 4.0)
    assert model_digest(Cooled(setting=lambda images: images.SCALE)) == before


def test_order_sharing_and_private_attributes_do_not_count():
    assert model_digest(Cooled(a=1, b=2)) == model_digest(Cooled(b=2, a=1))
    one, other = ({"a": 1, "b": {3, 4}}, {"b": {4, 3}, "a": 1})
    assert model_digest(Cooled(setting=one)) == model_digest(Cooled(setting=other))
    shared = [1]
    twice, apart = Cooled(setting=[shared, shared]), Cooled(setting=[[1], [1]])
    assert model_digest(twice) == model_digest(apart)
    assert model_digest(Cooled(_cache=1)) == model_digest(Cooled(_cache=[2]))
    assert model_digest(Cooled().eval()) == model_digest(Cooled().train())


def test_what_contains_itself_has_a_digest():
    ring = [1]
    ring.append(ring)
    model = Cooled(ring=ring)
    model.back = model.forward
    model.net.owner = [model]
    digest = model_digest(model)
    assert digest == model_digest(copy.deepcopy(model))
    ring[0] = 2
    assert digest != model_digest(model)


def test_a_variable_without_a_value_has_a_digest():
    def maker():
        if False:
            late = 1
        return lambda: late

    assert model_digest(Cooled(setting=maker())) == model_digest(Cooled(setting=maker()))


class Anything:
    """Has every attribute that it is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


def odd_model():
    """With all kinds of attributes that stand for something in this process."""
    model = Cooled(
        lock=threading.Lock(),
        condition=threading.Condition(),
        logger=logging.getLogger(__name__),
        buffer=io.BytesIO(),
        rng=random.Random(),
        generator=torch.Generator(),
        numpy_generator=np.random.default_rng(),
        compiled=torch.compile(faded),
        names={"one", "two", "three"},
        levels={"b": {"x", "y"}, "a": 1},
        function=lambda images: scaled(images),
        anything=Anything(),
        empty=object(),
        mode=Mode.SOFT,
        device=torch.device("cpu"),
    )
    model.handles = [model.net.register_forward_hook(lambda *_: None) for _ in range(2)]
    model.normed = nn.utils.spectral_norm(linear(1.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("weight_u", "weight_v"):
            getattr(model.normed, name).normal_()
    return model.eval()


def test_two_processes_find_the_same():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('digests', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['digests'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(module.model_digest(module.odd_model()))\n"
    )
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == model_digest(odd_model())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_forward_pass_changes_nothing():
    old_weight_norm = nn.utils.weight_norm(nn.Linear(2, 2))
    pruned = prune.l1_unstructured(nn.Linear(2, 2), "weight", 1)
    for model, images in (
        (odd_model(), torch.rand(2, 1, 6, 6)),
        (nn.utils.spectral_norm(nn.Linear(2, 2)).eval(), torch.rand(1, 2)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), torch.rand(1, 2)),
        (old_weight_norm, torch.rand(1, 2)),
        (pruned, torch.rand(1, 2)),
        (torch.compile(nn.Linear(2, 2), backend="eager"), torch.rand(1, 2)),
        (torch.jit.script(nn.Linear(2, 2)), torch.rand(1, 2)),
        (nn.BatchNorm1d(2).eval(), torch.rand(3, 2)),
    ):
        before = model_digest(model)
        model(images)
        getattr(model, "rng", random).gauss(0, 1)
        assert model_digest(model) == before
        # The weights behind a norm are seen nevertheless.
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        assert model_digest(model) != before


def test_ids_are_not_mistaken_for_values():
    # Temporary objects take each other's place in memory.
    digests = Digests()
    found = [digests.of([number, [number]]) for number in range(50)]
    assert len(set(found)) == 50


def test_results_of_another_setting_are_not_reused(toys, tmp_path):
    model, dataset = toys.make_model(), toys.make_dataset()
    attacks = {"FGSM": toys.make_attacks()["FGSM"]}

    def run(temperature):
        wrapped = nn.Sequential(model, Cooled(temperature))
        wrapped[1].net = nn.Identity()
        evaluate(wrapped, dataset, attacks, batch_size=10, directory=tmp_path, save_images=True)
        return wrapped, len(list(tmp_path.glob("shards/*")))

    first, one = run(1.0)
    assert run(1.0)[1] == one
    recheck(first, tmp_path)
    second, two = run(2.0)
    assert two == 2 * one
    recheck(second, tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        recheck(first, tmp_path)
