"""Two processes against one: the same training, in float64 to rounding."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

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
    FeatureScattering,
    InputMixup,
    JointAdversarialTraining,
    ManifoldMixup,
    Method,
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
for name, (method, batch_norm, config) in test.cases(problem.Tint()).items():
    network = problem.make_network(batch_norm=batch_norm)
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
    alone = {
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
    }
    # These mix the samples of a batch, of which each process has its own.
    mixing = {
        "mixup": InputMixup(),
        "hidden": ManifoldMixup(layers=("2",)),
        "iat": IAT(om.PGD(image, steps=2)),
        "ijsat": IJSAT(both, concentration=1.0),
        "scattering": FeatureScattering(image),
    }
    return {
        **{name: (method, False, CONFIG) for name, method in alone.items()},
        **{name: (method, False, STILL) for name, method in mixing.items()},
        "twice": (Twice(), True, STILL),
        # Each process has statistics of its own: what is checked is that both end with the same.
        "advprop": (AdvProp(om.PGD(image, steps=2)), True, CONFIG),
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


@pytest.mark.parametrize(
    "name", ["dual", "half", "trades", "mart", "worst", "atld", "sam", "awp", "staged", "rlat"]
)
def test_two_processes_give_what_one_gives(two_processes, fresh_network, fresh_dataset, tint, name):
    """Batches of 24 and 25 images: the shares of the two processes differ in size."""
    method, batch_norm, config = cases(tint)[name]
    result = train(
        method, fresh_network(batch_norm=batch_norm), fresh_dataset(count=107, codes=True), config
    )
    found = safetensors.torch.load_file(two_processes / name / "result.safetensors")
    for key, tensor in result.classifier.state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-11)
    lines = (two_processes / name / "metrics.jsonl").read_text().splitlines()
    for line, entry in zip(lines, result.history, strict=True):
        theirs = json.loads(line)
        for key, value in entry.items():
            if value is None:
                assert theirs[key] is None, key
            elif "second" not in key:
                assert theirs[key] == pytest.approx(value, rel=1e-9), key


@pytest.mark.parametrize("name", ["mixup", "hidden", "iat", "ijsat", "scattering"])
def test_methods_that_mix_samples_agree_up_to_the_choice_of_partners(
    two_processes, fresh_network, fresh_dataset, tint, name
):
    method, batch_norm, config = cases(tint)[name]
    dataset = fresh_dataset(count=107, codes=True)
    losses = [
        train(method, fresh_network(batch_norm=batch_norm), dataset, config, seed=seed).history[0]
        for seed in range(6)
    ]
    alone = torch.tensor([entry["train_loss"] for entry in losses])
    line = (two_processes / name / "metrics.jsonl").read_text().splitlines()[0]
    found = json.loads(line)["train_loss"]
    assert abs(found - alone.mean()) < 5 * alone.std() + 1e-3
    assert alone.std() < 0.05


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
