"""Two processes against one: the same training, in float64 to rounding."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.training import (
    ATLD,
    AWP,
    DMAT,
    IAT,
    IJSAT,
    MART,
    RLAT,
    SAM,
    TRADES,
    VAT,
    AdversarialTraining,
    AdvProp,
    Cutout,
    FeatureScattering,
    InputMixup,
    JointAdversarialTraining,
    LabelSmoothing,
    ManifoldMixup,
    Method,
    Normal,
    RandomPerturbationTraining,
    Staged,
    TrainingConfig,
    train,
)

SCRIPT = """
import importlib.util, json, sys
import safetensors.torch, torch
from lightning_fabric import Fabric

where, out = sys.argv[1:]

def load(name):
    spec = importlib.util.spec_from_file_location(name, f"{where}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

problem, test = load("conftest"), load("test_processes")
torch.set_num_threads(1)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
fabric.launch()
for name, (method, norm, config) in test.cases(problem.Tint()).items():
    network = test.with_norm(problem.make_network(batch_norm=False), norm)
    dataset = problem.make_dataset(count=107, codes=True)
    directory = f"{out}/{name}"
    result = test.train(method, network, dataset, config, directory=directory, fabric=fabric)
    weights = result.classifier.state_dict()
    flat = torch.cat([tensor.double().flatten() for tensor in weights.values()])
    spread = (fabric.all_reduce(flat.clone(), reduce_op="mean") - flat).abs().max().item()
    assert spread == 0, f"the processes differ by {spread}"
    if fabric.is_global_zero:
        safetensors.torch.save_file(weights, f"{directory}/result.safetensors")
fabric.barrier()
torch.distributed.destroy_process_group()
"""

CONFIG = TrainingConfig(
    epochs=2,
    batch_size=28,
    optimizer="sgd",
    learning_rate=0.1,
    precision="64-true",
    ema=0.9,
    validation_fraction=0.1,
    threads=1,
)


# One step that changes no weight.
STILL = replace(CONFIG, epochs=1, batch_size=200, learning_rate=0.0, ema=None)


class SteadyNorm(nn.BatchNorm2d):
    """Normalises by its running statistics and leaves them as they are; scale and shift are learned."""

    def forward(self, images):
        statistics = self.running_mean, self.running_var
        return functional.batch_norm(images, *statistics, self.weight, self.bias)


def with_norm(network, norm):
    network[1] = norm(4)
    return network


@dataclass(frozen=True)
class InShares(Method):
    """In one process what two do: each takes the method's loss on its own part of the batch.

    The running statistics of each part begin where the step begins, and are averaged. Where a turn moves
    several networks, they follow one loss.
    """

    method: Method

    @property
    def attacks(self):
        return self.method.attacks

    def players(self, classifier, image):
        return self.method.players(classifier, image)

    def turns(self, step):
        yield dict.fromkeys(["classifier", *step.players], self.loss(step))

    def loss(self, step):
        networks = nn.ModuleList([step.classifier, *step.players.values()])
        before = copy.deepcopy(dict(networks.named_buffers()))
        total, found = 0, []
        for rank in range(2):
            own = slice(rank, None, 2)
            fields = {
                name: getattr(step, name)[own] for name in ("images", "labels", "codes", "indices")
            }
            part = replace(step, **fields)
            with torch.no_grad():
                for name, buffer in networks.named_buffers():
                    # Changed in place, it would spoil the graph of the first part.
                    buffer.data = before[name].clone()
            total = total + len(part.images) / len(step.images) * self.method.loss(part)
            found.append({name: buffer.clone() for name, buffer in networks.named_buffers()})
            step.correct += part.correct
            step.counted += part.counted
        for name, buffer in networks.named_buffers():
            if buffer.is_floating_point():
                buffer.data = (found[0][name] + found[1][name]) / 2
        return total


@dataclass(frozen=True)
class Twice(Method):
    """Two forward passes in one step."""

    def loss(self, step):
        return step.cross_entropy(step.images) + step.cross_entropy(step.images)


def cases(tint):
    image, latent = om.ImageBall(radius=0.05), om.LatentBall(tint, radius=0.2)
    dual = DMAT(om.PGD(image, steps=2), om.PGD(latent, steps=2))
    half = AdversarialTraining(om.PGD(image, steps=2), "half")
    game = ATLD(om.PGD(image, steps=1), discriminator_features="logits", discriminator_width=8)
    near = om.PGD(image, steps=2, start="nearby")
    both = om.PGD(om.JointBall(image, latent), steps=2)
    props = AdvProp(om.PGD(image, steps=2))
    apart = {
        "normal": Normal(),
        "random": RandomPerturbationTraining(om.JointBall(image, latent), "half"),
        "cutout": Cutout(side=4),
        "smoothing": LabelSmoothing(0.3),
        "dual": dual,
        "half": half,
        "trades": TRADES(near, latent_attack=replace(near, threat=latent)),
        "mart": MART(near),
        "worst": JointAdversarialTraining((om.PGD(image, steps=2), both), "worst"),
        "atld": game,
        "sam": SAM(dual, 0.3),
        "awp": AWP(VAT(0.2), 0.05),
        "staged": Staged(AdversarialTraining(both), epochs=1),
        "rlat": SAM(RLAT(0.5), 0.1),
        # Where nothing is mixed, partners do not matter.
        "mixup_0": InputMixup(0.0),
        "hidden_0": ManifoldMixup(0.0),
        "iat_0": IAT(om.PGD(image, steps=2), 0.0),
        "ijsat_0": IJSAT(both, 0.0),
        # Where all logits stay near to the clean ones, the plan moves each to its own, whatever the others are.
        "scattering_0": FeatureScattering(om.ImageBall(radius=1e-3), regularisation=1e-9),
    }
    # Where norms do not look at the batch.
    steady = {"advprop_0": props, "props_sam": SAM(props, 0.1), "props_awp": AWP(props, 0.05)}
    return {
        **{name: (method, nn.Identity, CONFIG) for name, method in apart.items()},
        **{name: (method, SteadyNorm, CONFIG) for name, method in steady.items()},
        **together(image, both),
        "twice": (Twice(), nn.BatchNorm2d, STILL),
    }


def together(image, both):
    """The samples of a batch meet here, and each process has its own part of them."""
    attack = om.PGD(image, steps=2)
    methods = {
        "mixup": InputMixup(),
        "hidden": ManifoldMixup(layers=("", "2", "4")),
        "iat": IAT(attack),
        "ijsat": IJSAT(both, concentration=1.0),
        "late": IJSAT(both, concentration=1.0, order="attack_first"),
        "scattering": FeatureScattering(image),
    }
    return {
        **{name: (method, nn.Identity, CONFIG) for name, method in methods.items()},
        "advprop": (AdvProp(attack), nn.BatchNorm2d, CONFIG),
    }


PLAIN = ["normal", "random", "cutout", "smoothing", "half", "dual", "trades", "mart", "worst"]
OTHER = ["atld", "staged", "sam", "awp", "rlat", "props_sam", "props_awp"]
UNCOUPLED = ["mixup_0", "hidden_0", "iat_0", "ijsat_0", "scattering_0", "advprop_0"]
# How far, relatively, the losses of an epoch are from those with the whole batch.
TOGETHER = {
    **dict.fromkeys(["mixup", "hidden", "iat", "ijsat", "late"], 0.01),
    "scattering": 1e-4,
    "advprop": 0.05,
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("processes")
    (out / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, str(out / "script.py"), str(Path(__file__).parent), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        arguments, env=environment, timeout=240, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out


def curve(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same(directory, result):
    found = safetensors.torch.load_file(directory / "result.safetensors")
    for key, tensor in result.classifier.state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-11)
    for theirs, entry in zip(curve(directory), result.history, strict=True):
        for key, value in entry.items():
            if value is None:
                assert theirs[key] is None, key
            elif "second" not in key:
                assert theirs[key] == pytest.approx(value, rel=1e-9), key


@pytest.fixture
def by_one(fresh_network, fresh_dataset, tint):
    """Trains a case in this process alone, its method as it is or wrapped."""

    def trained(name, wrap=lambda method: method):
        method, norm, config = cases(tint)[name]
        network = with_norm(fresh_network(batch_norm=False), norm)
        return train(wrap(method), network, fresh_dataset(count=107, codes=True), config)

    return trained


@pytest.mark.parametrize("name", [*PLAIN, *OTHER, *UNCOUPLED])
def test_two_processes_give_what_one_gives(two_processes, by_one, name):
    """Batches of 24 and 25 images: the shares of the two processes differ in size."""
    assert_same(two_processes / name, by_one(name))


@pytest.mark.parametrize("name", TOGETHER)
def test_where_samples_meet_two_processes_give_what_the_two_parts_of_each_batch_give(
    two_processes, by_one, name
):
    """Partners, the layer that is mixed, the transport plan, batch statistics: each process has its own."""
    assert_same(two_processes / name, by_one(name, InShares))


@pytest.mark.parametrize("name", TOGETHER)
def test_where_samples_meet_two_processes_nearly_give_what_the_whole_batch_gives(
    two_processes, by_one, name
):
    found = [entry["train_loss"] for entry in curve(two_processes / name)]
    expected = [entry["train_loss"] for entry in by_one(name).history]
    assert found == pytest.approx(expected, rel=TOGETHER[name])


def test_every_case_is_looked_at(tint):
    assert sorted(cases(tint)) == sorted([*PLAIN, *OTHER, *UNCOUPLED, *TOGETHER, "twice"])


def test_batch_norm_statistics_are_averaged(two_processes, fresh_network, fresh_dataset):
    """That both processes hold the same, the script checks; here: that it is the mean of what they saw."""
    found = safetensors.torch.load_file(two_processes / "twice" / "result.safetensors")
    trained, _ = fresh_dataset(count=107, codes=True).split(0.1, 0)
    assert len(trained) == 96
    images = trained.batch(torch.arange(96)).images.double()
    with torch.no_grad():
        expected = fresh_network().double()[0](images).mean((0, 2, 3))
    torch.testing.assert_close(found["1.running_mean"], (1 - 0.9**2) * expected, rtol=1e-9, atol=0)
    assert found["1.num_batches_tracked"] == 2
