"""Learning manifolds: players and their turns, best weights, pictures, resuming; and what is solved at once."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import CheckpointError, ConfigError, DivergenceError, InputError
from onmanifold.manifolds import LearnedManifold
from onmanifold.training.checkpoint import Checkpoint
from onmanifold.training.fits import ClosedForm, Fit
from onmanifold.training.loop import Training
from onmanifold.training.run_fit import fit

CONFIG = {
    "epochs": 3,
    "batch_size": 24,
    "learning_rate": 0.02,
    "ema": 0.9,
    "validation_fraction": 0.2,
    "checkpoint_minutes": 0.0,
    "threads": 1,
}


class Linear(LearnedManifold):
    """A linear autoencoder of 8x8 images."""

    name = "linear"

    def __init__(self, image_shape=(1, 8, 8), num_classes=3):
        super().__init__(image_shape, num_classes, latent_size=2)
        self.encoder, self.decoder = nn.Linear(64, 2), nn.Linear(2, 64)

    def encode(self, images, labels):
        return self.encoder(images.flatten(1))

    def decode(self, codes):
        return torch.sigmoid(self.decoder(codes)).view(-1, *self.image_shape)


@dataclass(frozen=True)
class Duel(Fit):
    """A decoder against a critic, and the encoder with the decoder: three players, two turns."""

    defaults: ClassVar = {"optimizer": "adamax"}
    score: ClassVar = "reconstruction_l2"
    scale: float = 1.0

    def players(self, manifold):
        critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
        return {"encoder": manifold.encoder, "decoder": manifold.decoder, "critic": critic}

    def rates(self):
        return {"critic": 0.1}

    def start(self, manifold, images, labels):
        manifold.decoder.bias.copy_(torch.logit(images.mean(0).flatten().clamp(0.01, 0.99)))

    def turns(self, step):
        manifold, critic = step.manifold, step.players["critic"]
        codes = manifold.encode(step.images, step.labels)
        made = manifold.decode(codes + 0.01 * torch.randn_like(codes))
        error = (made - step.images).square().mean()
        step.metrics["error"] = error.detach()
        factor = self.scale if step.number == 5 else 1.0
        yield {"encoder": error * factor, "decoder": error - 0.01 * critic(made).mean()}
        made = manifold.decode(manifold.encode(step.images, step.labels)).detach()
        yield {"critic": functional.softplus(critic(made) - critic(step.images)).mean()}


@dataclass(frozen=True)
class Mean(ClosedForm):
    """The decoder's bias is the mean image."""

    def solve(self, manifold, dataset):
        mean = dataset.batch(torch.arange(len(dataset))).images.mean(0).flatten()
        with torch.no_grad():
            manifold.decoder.weight.zero_()
            manifold.decoder.bias.copy_(torch.logit(mean.clamp(0.01, 0.99)))


def make_manifold():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Linear()


def test_a_manifold_is_learned(dataset, tmp_path):
    manifold = make_manifold()
    before = {name: tensor.clone() for name, tensor in manifold.state_dict().items()}
    result = fit(manifold, dataset, {**CONFIG, "epochs": 12}, fit=Duel(), directory=tmp_path)
    errors = [entry["validation_reconstruction_l2"] for entry in result.history]
    assert errors[-1] < 0.9 * errors[0]
    assert result.best_epoch == 1 + min(range(12), key=lambda at: (errors[at], -at))
    entry = result.history[-1]
    names = {"train_error", "train_loss_encoder", "train_loss_decoder", "train_loss_critic"}
    assert names <= entry.keys()
    parts = sum(entry[f"train_loss_{name}"] for name in ("encoder", "decoder", "critic"))
    assert entry["train_loss"] == pytest.approx(parts, rel=1e-5)
    assert not result.manifold.training
    assert all(torch.equal(manifold.state_dict()[name], before[name]) for name in before)
    saved = om.manifolds.load_manifold(result.best, Linear())
    for name, tensor in result.manifold.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
    metadata = om.manifolds.manifold_metadata(result.best)
    assert metadata["epoch"] == result.best_epoch
    assert metadata["dataset"] == dataset.fingerprint
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == [f"epoch-{epoch:04d}.png" for epoch in range(1, 13)]
    with Image.open(tmp_path / "pictures" / pictures[0]) as picture:
        assert picture.width > 3 * 8
        assert picture.height > 8 * 8


def test_each_player_follows_its_own_loss_and_turns_come_one_after_the_other(dataset):
    """One epoch of two steps, written out."""
    config = {**CONFIG, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "ema": None}
    config |= {"epochs": 1, "batch_size": 60, "validation_fraction": 0.0, "schedule": "constant"}
    config |= {"precision": "64-true"}

    @dataclass(frozen=True)
    class Plain(Duel):
        def players(self, manifold):
            found = super().players(manifold)
            with torch.no_grad():
                found["critic"][1].weight.fill_(0.01)
                found["critic"][1].bias.zero_()
            return found

        def turns(self, step):
            manifold, critic = step.manifold, step.players["critic"]
            made = manifold.decode(manifold.encode(step.images, step.labels))
            error = (made - step.images).square().mean()
            yield {"encoder": error, "decoder": error - 0.01 * critic(made).mean()}
            made = manifold.decode(manifold.encode(step.images, step.labels)).detach()
            yield {"critic": functional.softplus(critic(made) - critic(step.images)).mean()}

    result = fit(make_manifold(), dataset, config, fit=Plain())

    manifold = make_manifold().double()
    weight = torch.full((1, 64), 0.01, dtype=torch.float64)
    bias = torch.zeros(1, dtype=torch.float64)
    order = om.foundation.randomness.permutation(0, 120, stream="order/0")
    for number, batch in enumerate(order.split([60, 60])):
        images = dataset.batch(batch).images.double()
        if number == 0:
            with torch.no_grad():
                Duel().start(manifold, images, None)
        made = manifold.decode(manifold.encode(images, None))
        error = (made - images).square().mean()
        against = error - 0.01 * (made.flatten(1) @ weight.T + bias).mean()
        encoder, decoder = list(manifold.encoder.parameters()), list(manifold.decoder.parameters())
        gradients = [
            *torch.autograd.grad(error, encoder, retain_graph=True),
            *torch.autograd.grad(against, decoder),
        ]
        with torch.no_grad():
            for parameter, gradient in zip([*encoder, *decoder], gradients, strict=True):
                parameter -= 0.02 * gradient
            made = manifold.decode(manifold.encode(images, None))
        leaves = [weight.requires_grad_(), bias.requires_grad_()]
        scores = [flat.flatten(1) @ weight.T + bias for flat in (made, images)]
        found = torch.autograd.grad(functional.softplus(scores[0] - scores[1]).mean(), leaves)
        weight, bias = (
            (leaf - 0.1 * 0.02 * gradient).detach()
            for leaf, gradient in zip(leaves, found, strict=True)
        )
    for name, tensor in result.manifold.state_dict().items():
        torch.testing.assert_close(tensor, manifold.state_dict()[name], rtol=1e-9, atol=1e-12)


KILLED = """
import importlib.util, os, signal, sys

where, directory, count = sys.argv[1:]

def load(name):
    spec = importlib.util.spec_from_file_location(name, f"{where}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

problem, test = load("conftest"), load("test_fit")
left, replace = int(count), os.replace

def counted(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*arguments)

os.replace = counted
test.fit(test.make_manifold(), problem.make_dataset(), test.CONFIG, fit=test.Duel(), directory=directory)
"""


@pytest.mark.parametrize("count", [3, 8, 14])
def test_killed_and_started_again(dataset, tmp_path, count):
    directory, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(directory)]
    ended = subprocess.run([*arguments, str(count)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    for folder in (directory, undisturbed):
        fit(make_manifold(), dataset, CONFIG, fit=Duel(), directory=folder)
    first, second = (Checkpoint.read(folder / "last.ckpt") for folder in (directory, undisturbed))
    assert any(name.startswith("module/critic/") for name in first.tensors)
    assert any(name.startswith("optimizer/critic/") for name in first.tensors)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    best = [
        safetensors.torch.load_file(folder / "best.safetensors")
        for folder in (directory, undisturbed)
    ]
    for name, tensor in best[0].items():
        assert torch.equal(tensor, best[1][name]), name
    lines = [
        (folder / "metrics.jsonl").read_text().splitlines() for folder in (directory, undisturbed)
    ]
    for one, other in zip(*lines, strict=True):
        one, other = (
            {k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in (one, other)
        )
        assert one == other


def test_a_finished_fit_is_not_repeated_and_another_one_is_refused(dataset, tmp_path, monkeypatch):
    first = fit(make_manifold(), dataset, CONFIG, fit=Duel(), directory=tmp_path)
    monkeypatch.setattr(Training, "_step", None)
    again = fit(make_manifold(), dataset, CONFIG, fit=Duel(), directory=tmp_path)
    assert again.history == first.history
    with pytest.raises(CheckpointError, match=r"fit\.scale was 1\.0, now it is 2.0"):
        fit(make_manifold(), dataset, CONFIG, fit=Duel(scale=2.0), directory=tmp_path)


@pytest.mark.parametrize("scale", [float("nan"), 1e9])
def test_a_fit_that_diverges_stops(dataset, tmp_path, scale):
    with pytest.raises(DivergenceError, match="epoch 2, step 2 of 4") as caught:
        fit(make_manifold(), dataset, CONFIG, fit=Duel(scale=scale), directory=tmp_path)
    assert "last.ckpt" in str(caught.value)
    kept = om.manifolds.load_manifold(tmp_path / "best.safetensors", Linear())
    assert all(bool(tensor.isfinite().all()) for tensor in kept.state_dict().values())


def test_without_a_score_the_last_weights_are_kept(dataset):
    @dataclass(frozen=True)
    class Endless(Duel):
        score: ClassVar = None

    assert fit(make_manifold(), dataset, CONFIG, fit=Endless()).best_epoch == 3


def test_what_is_solved_is_solved_once(dataset, tmp_path, monkeypatch):
    result = fit(make_manifold(), dataset, fit=Mean(), directory=tmp_path)
    mean = dataset.batch(torch.arange(120)).images.mean(0)
    torch.testing.assert_close(result.manifold.decode(torch.zeros(1, 2))[0], mean)
    assert result.history == []
    monkeypatch.setattr(Mean, "solve", None)
    again = fit(make_manifold(), dataset, fit=Mean(), directory=tmp_path)
    for name, tensor in again.manifold.state_dict().items():
        assert torch.equal(tensor, result.manifold.state_dict()[name])
    with pytest.raises(CheckpointError, match="seed was 0, now it is 1"):
        fit(make_manifold(), dataset, fit=Mean(), directory=tmp_path, seed=1)


def test_bad_arguments(dataset, fresh_dataset):
    plane = om.FontsManifold(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="fonts is known already"):
        fit(plane, dataset, CONFIG, fit=Duel())
    with pytest.raises(
        InputError, match=r"images \(1, 9, 9\); toy has 3 classes of images \(1, 8, 8\)"
    ):
        fit(Linear((1, 9, 9)), dataset, CONFIG, fit=Duel())
    with pytest.raises(ConfigError, match="there is none for 'linear'"):
        fit(make_manifold(), dataset, CONFIG)
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        fit(make_manifold(), dataset, {"epoch": 3}, fit=Duel())


TWO = """
import importlib.util, sys
import safetensors.torch, torch
from lightning_fabric import Fabric

where, out = sys.argv[1:]

def load(name):
    spec = importlib.util.spec_from_file_location(name, f"{where}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

problem, test = load("conftest"), load("test_fit")
torch.set_num_threads(1)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
fabric.launch()
result = test.fit(test.make_manifold(), problem.make_dataset(), test.EXACT, fit=test.Still(), fabric=fabric)
if fabric.is_global_zero:
    safetensors.torch.save_file(result.manifold.state_dict(), out)
# Left to the interpreter's end, threads of the group are at times still alive, which ends the process by a signal.
fabric.barrier()
torch.distributed.destroy_process_group()
"""

EXACT = {**CONFIG, "precision": "64-true"}


@dataclass(frozen=True)
class Still(Duel):
    """Without random numbers, which each process draws for itself."""

    def turns(self, step):
        manifold, critic = step.manifold, step.players["critic"]
        made = manifold.decode(manifold.encode(step.images, step.labels))
        error = (made - step.images).square().mean()
        yield {"encoder": error, "decoder": error - 0.01 * critic(made).mean()}
        yield {"critic": functional.softplus(critic(made.detach()) - critic(step.images)).mean()}


def test_two_processes_give_what_one_gives(dataset, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "two.safetensors"
    script.write_text(TWO)
    arguments = [sys.executable, str(script), str(Path(__file__).parent), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(arguments, env=environment, timeout=240, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    one = fit(make_manifold(), dataset, EXACT, fit=Still()).manifold
    for name, tensor in safetensors.torch.load_file(out).items():
        torch.testing.assert_close(tensor, one.state_dict()[name], rtol=1e-9, atol=1e-11)
