"""The loop: learning, batches, validation, averages, divergence; what it leaves alone."""

import copy
import json
import math
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation import randomness
from onmanifold.foundation.errors import ConfigError, DataError, DivergenceError, InputError
from onmanifold.training import (
    DMAT,
    AdversarialTraining,
    Method,
    Normal,
    RandomPerturbationTraining,
    TrainingConfig,
    train,
)
from onmanifold.training.ema import MovingAverage

QUICK = TrainingConfig(epochs=2, batch_size=25, validation_fraction=0.2, threads=1)


def pgd(radius=0.1, steps=3):
    return om.PGD(om.ImageBall(radius=radius), steps=steps)


@torch.no_grad()
def accuracy(network, dataset):
    images, labels, _, _ = dataset.batch(torch.arange(len(dataset)))
    return (network(images).argmax(1) == labels).double().mean().item()


def methods(tint):
    latent = om.PGD(om.LatentBall(tint, radius=0.2), steps=3)
    return {
        "normal": Normal(),
        "AT": AdversarialTraining(pgd()),
        "AT half": AdversarialTraining(pgd(), "half"),
        "AT weak": AdversarialTraining(pgd(), "weak"),
        "random": RandomPerturbationTraining(om.ImageBall(radius=0.1)),
        "transformations": AdversarialTraining(om.PGD(om.TransformationBall(radius=0.2), steps=2)),
        "DMAT": DMAT(pgd(), latent),
        "JSA": AdversarialTraining(
            om.PGD(om.JointBall(image=om.ImageBall(radius=0.05), latent=latent.threat), steps=2)
        ),
    }


@pytest.mark.parametrize(
    "name", ["normal", "AT", "AT half", "AT weak", "random", "transformations"]
)
def test_methods_learn(network, dataset, fresh_dataset, tint, name):
    config = TrainingConfig(epochs=6, batch_size=25, validation_fraction=0.2, threads=1)
    result = train(methods(tint)[name], network, dataset, config)
    assert accuracy(result.classifier, fresh_dataset(count=200, seed=1)) > 0.9
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["DMAT", "JSA"])
def test_methods_on_the_manifold_learn_the_training_loss(network, coded, tint, name):
    result = train(methods(tint)[name], network, coded, QUICK)
    first, last = (result.history[at]["train_loss"] for at in (0, -1))
    assert last < first
    assert result.history[-1]["validation_robust_accuracy"] is not None


def test_adversarial_training_makes_robust(network, dataset, fresh_dataset):
    config = TrainingConfig(epochs=8, batch_size=25, validation_fraction=0.0, threads=1)
    test = fresh_dataset(count=150, seed=1)
    images, labels, _, _ = test.batch(torch.arange(150))
    attack = pgd(radius=0.15, steps=10)
    robust = {}
    for name, method in {"normal": Normal(), "AT": AdversarialTraining(pgd(0.15))}.items():
        trained = train(method, network, dataset, config).classifier
        robust[name] = 1 - attack(trained, images, labels).success.double().mean().item()
    assert robust["AT"] > robust["normal"] + 0.1


def test_plain_loop_gives_the_same_weights(fresh_network, dataset):
    """Normal training of two epochs, written out."""
    network = fresh_network().double()
    config = TrainingConfig(
        epochs=2,
        batch_size=32,
        optimizer="sgd",
        learning_rate=0.1,
        schedule={"type": "step", "milestones": [1]},
        gradient_clip=1.0,
        precision="64-true",
        validation_fraction=0.0,
        threads=1,
    )
    result = train("normal", network, dataset, config, seed=3)

    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=False
    )
    losses = []
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1**epoch
        order = randomness.permutation(3, 120, stream=f"order/{epoch}")
        for batch in order.split([30, 30, 30, 30]):
            images, labels, _, _ = dataset.batch(batch)
            loss = functional.cross_entropy(network(images.double()), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    for name, tensor in result.classifier.state_dict().items():
        torch.testing.assert_close(tensor, network.state_dict()[name], rtol=1e-9, atol=1e-12)
    assert result.history[1]["train_loss"] == pytest.approx(sum(losses[4:]) / 4)
    assert result.history[1]["learning_rate"] == pytest.approx(0.01)


class Recording(Method):
    """Remembers what it was shown; its loss has a gradient."""

    def __init__(self):
        self.steps = []

    def loss(self, step):
        self.steps.append(step)
        return step.model(step.images).square().mean()


def record(dataset, network, **fields):
    from lightning_fabric import Fabric

    from onmanifold.training.classification import Classification
    from onmanifold.training.loop import Training

    method = Recording()
    config = TrainingConfig(**{"threads": 1, "validation_fraction": 0.0, **fields})
    fabric = Fabric(accelerator="cpu", devices=1)
    task = Classification(method, network, config, torch.zeros(1, 1, 8, 8))
    training = Training(task, dataset, config, 0, None, fabric)
    training.run(lambda epoch, step, loss: None, lambda entry: None)
    return method.steps


def test_every_image_once_per_epoch_in_batches_of_nearly_equal_size(network, dataset):
    steps = record(dataset.take(103), network, epochs=2, batch_size=25)
    assert [len(step.images) for step in steps] == [21, 21, 21, 20, 20] * 2
    epochs = [
        torch.cat([step.indices for step in steps if step.epoch == epoch]) for epoch in (0, 1)
    ]
    for seen in epochs:
        assert torch.equal(seen.sort().values, dataset.indices[:103])
    assert not torch.equal(*epochs)
    assert steps[0].seed != steps[5].seed


def test_augmentation_is_per_sample_and_takes_the_codes_away(network, coded):
    from onmanifold.data.augment import Augmentation

    augmentation = Augmentation(flip=True, crop_padding=2)
    plain = record(coded, network, epochs=1)
    small = record(coded, network, epochs=1, batch_size=7, augmentation=augmentation)
    large = record(coded, network, epochs=1, batch_size=120, augmentation=augmentation)
    assert plain[0].codes is not None
    assert small[0].codes is None

    def by_index(steps):
        indices = torch.cat([step.indices for step in steps])
        return torch.cat([step.images for step in steps])[indices.argsort()]

    torch.testing.assert_close(by_index(small), by_index(large), rtol=0, atol=0)
    assert not torch.equal(by_index(large), by_index(plain))


def test_the_moving_average_follows_weights_and_statistics():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, decay=0.9)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(1, 200):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean):
                tensor.add_(torch.randn_like(tensor))
            model[1].num_batches_tracked += 1
        average.update(number)
        decay = min(0.9, (1 + number) / (10 + number))
        for name, tensor in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * tensor
            expected[name] = mixed if tensor.is_floating_point() else tensor.clone()
    for name, tensor in average.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_with_an_average_the_average_is_the_result(network, dataset):
    config = TrainingConfig(epochs=1, batch_size=25, validation_fraction=0.0, threads=1)
    plain = train("normal", network, dataset, config)
    averaged = train("normal", network, dataset, TrainingConfig(**{**vars(config), "ema": 0.9}))
    assert plain.history[0]["train_loss"] == averaged.history[0]["train_loss"]
    first, second = (result.classifier.state_dict()["0.weight"] for result in (plain, averaged))
    assert not torch.allclose(first, second)


def test_best_weights_are_those_of_the_best_robust_accuracy(network, dataset, tmp_path):
    config = TrainingConfig(
        epochs=5, batch_size=25, learning_rate=0.03, validation_fraction=0.3, threads=1
    )
    method = AdversarialTraining(pgd(0.2))
    result = train(method, network, dataset, config, directory=tmp_path)
    scores = [entry["validation_robust_accuracy"] for entry in result.history]
    best = max(range(5), key=lambda at: (scores[at], at))
    assert result.best_epoch == best + 1
    assert om.classifiers.read_metadata(result.best)["epoch"] == best + 1
    # Measured again, on the held-out images, with the weights that were kept.
    _, held_out = dataset.split(0.3, 0)
    images, labels, _, indices = held_out.batch(torch.arange(len(held_out)))
    from onmanifold.training.loop import derive

    seed = derive(0, "validation")
    found = pgd(0.2)(result.classifier, images, labels, seed=seed, indices=indices)
    assert 1 - found.success.double().mean().item() == pytest.approx(scores[best])
    again = copy.deepcopy(network)
    om.classifiers.load_classifier(result.best, again)
    for name, tensor in result.classifier.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_validation_is_held_out_of_the_training_images(network, dataset, monkeypatch):
    from onmanifold.training import classification

    validated = []

    def validate(classifier, held_out, attacks, **options):
        validated.append(held_out.indices)
        return 0.5, None

    monkeypatch.setattr(classification, "validate", validate)
    steps = record(dataset, network, epochs=1, batch_size=25, validation_fraction=0.25)
    trained = torch.cat([step.indices for step in steps])
    assert len(validated[0]) == 30
    assert torch.equal(torch.cat([trained, validated[0]]).sort().values, dataset.indices)


@pytest.mark.parametrize(
    ("method", "chosen", "robust"),
    [("normal", None, False), ("normal", pgd(), True), (AdversarialTraining(pgd()), None, True)],
)
def test_what_validation_measures(network, dataset, method, chosen, robust):
    config = TrainingConfig(
        epochs=1, batch_size=50, validation_fraction=0.2, validation_attack=chosen, threads=1
    )
    entry = train(method, network, dataset, config).history[0]
    assert 0 <= entry["validation_accuracy"] <= 1
    assert (entry["validation_robust_accuracy"] is not None) == robust
    if robust:
        assert entry["validation_robust_accuracy"] <= entry["validation_accuracy"]


def test_classifier_and_global_state_are_left_as_they_were(dataset):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    ).eval()
    before = copy.deepcopy(network.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    result = train(AdversarialTraining(pgd()), network, dataset, QUICK)
    assert result.classifier is not network
    assert all(tensor.is_contiguous() for tensor in result.classifier.state_dict().values())
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])  # noqa: NPY002
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert torch.is_grad_enabled()


def test_the_seed_decides_everything(fresh_network, dataset):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))

    def weights(seed):
        torch.rand(seed + 5)  # the state of the global generator must not matter
        result = train(AdversarialTraining(pgd()), network, dataset, QUICK, seed=seed)
        return result.classifier.state_dict()["2.weight"]

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_specification_of_a_classifier_is_built_from_the_seed(dataset):
    config = {"epochs": 1, "batch_size": 60, "threads": 1}
    result = train("normal", "mlp", dataset, config, seed=4)
    assert result.classifier.spec["seed"] == 4
    assert result.classifier.spec["num_classes"] == 3
    assert not result.classifier.training


def test_small_models_train_on_one_thread(dataset, network, monkeypatch):
    from onmanifold.attacks.threads import own_threads, suitable_threads

    large = om.build_classifier("resnet18", 10, (3, 32, 32), seed=0).train()
    small = om.build_classifier("conv_net", 10, (1, 28, 28), seed=0)
    with own_threads(2):
        assert suitable_threads(large, torch.zeros(64, 3, 32, 32)) is None
        assert suitable_threads(small, torch.zeros(100, 1, 28, 28)) == 1
        assert all(part.training for part in large.modules())
        used, plain = [], Normal.loss
        monkeypatch.setattr(
            Normal,
            "loss",
            lambda self, step: used.append(torch.get_num_threads()) or plain(self, step),
        )
        train("normal", network, dataset, TrainingConfig(epochs=1))
        assert set(used) == {1}
        used.clear()
        train("normal", network, dataset, TrainingConfig(epochs=1, threads=2))
        assert set(used) == {2}
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_precisions(network, dataset, precision):
    config = TrainingConfig(epochs=3, batch_size=25, precision=precision, threads=1)
    result = train(AdversarialTraining(pgd()), network, dataset, config)
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert all(p.dtype == expected for p in result.classifier.parameters())
    assert result.history[-1]["train_accuracy"] > 0.6


def test_attacks_in_bfloat16(network, dataset):
    config = TrainingConfig(**{**vars(QUICK), "attack_precision": "bf16"})
    assert (
        train(AdversarialTraining(pgd()), network, dataset, config).history[-1]["train_loss"] < 1.5
    )


def test_a_compiled_training_is_the_same(network, dataset, monkeypatch):
    # The eager backend stands for the real one, which needs a C++ compiler and minutes.
    compiled, compile_ = [], torch.compile

    def eager(model, **options):
        compiled.append(model)
        return compile_(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    plain, fast = (
        train(
            AdversarialTraining(pgd()),
            copy.deepcopy(network),
            dataset,
            TrainingConfig(**{**vars(QUICK), "compile": flag}),
        )
        for flag in (False, True)
    )
    # The network itself, and the copy that is attacked.
    assert len(compiled) == 2
    pairs = zip(plain.classifier.parameters(), fast.classifier.parameters(), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)
    assert not any("orig_mod" in name for name in fast.classifier.state_dict())


@dataclass(frozen=True)
class Breaking(Method):
    """Cross-entropy, multiplied by a factor in one step of the second epoch."""

    factor: ClassVar[float] = 1.0

    def loss(self, step):
        broken = step.epoch == 1 and 1005 in step.indices
        return step.cross_entropy(step.images) * (self.factor if broken else 1.0)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (float("nan"), "training loss became NaN in epoch 2, step 2 of 4, at learning rate 0.0095"),
        (float("inf"), "training loss grew to inf in epoch 2, step 2"),
        (1e9, r"training loss grew to .* in epoch 2, step 2"),
    ],
)
def test_divergence_is_explained_and_the_last_good_state_kept(
    network, dataset, tmp_path, monkeypatch, factor, message
):
    config = TrainingConfig(**{**vars(QUICK), "epochs": 3})
    monkeypatch.setattr(Breaking, "factor", factor)
    with pytest.raises(DivergenceError, match=message) as caught:
        train(Breaking(), network, dataset, config, directory=tmp_path)
    assert "smaller learning rate" in str(caught.value)
    assert str(tmp_path / "last.ckpt") in str(caught.value)
    kept = om.classifiers.load_classifier(tmp_path / "best.safetensors", copy.deepcopy(network))
    weights = kept.state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    # What is on disk is the end of the first epoch, from which training can go on.
    monkeypatch.undo()
    result = train(Breaking(), network, dataset, config, directory=tmp_path)
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3]


def test_weights_that_are_not_finite_are_never_kept(network, dataset, tmp_path):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    class Poisoning(Normal):
        def loss(self, step):
            return Poison.apply(super().loss(step))

    with pytest.raises(DivergenceError, match=r"(weights|loss) became NaN"):
        train(
            Poisoning(),
            network,
            dataset,
            TrainingConfig(epochs=1, batch_size=120, validation_fraction=0.0),
            directory=tmp_path,
        )
    assert not (tmp_path / "last.ckpt").exists()
    assert not (tmp_path / "best.safetensors").exists()


def test_metrics_are_json_lines(network, dataset, tmp_path):
    result = train("normal", network, dataset, QUICK, directory=tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    entry = result.history[0]
    assert set(entry) == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "validation_accuracy",
        "validation_robust_accuracy",
        "learning_rate",
        "seconds",
        "examples_per_second",
    }
    assert entry["seconds"] > 0
    assert math.isfinite(entry["examples_per_second"])


def test_nothing_is_written_without_a_directory(network, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train("normal", network, dataset, QUICK)
    assert result.best is None
    assert list(tmp_path.iterdir()) == []


def test_progress_bar(network, dataset, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    train("normal", network, dataset, QUICK, progress=True)
    shown = capsys.readouterr()
    assert "epoch 2/2" in shown.err
    assert shown.out == ""


def test_tensorboard_is_an_extra(network, dataset, tmp_path, monkeypatch):
    import sys

    with pytest.raises(InputError, match="tensorboard: needs a directory"):
        train("normal", network, dataset, QUICK, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"onmanifold\[tensorboard\]"):
        train("normal", network, dataset, QUICK, directory=tmp_path, tensorboard=True)


def test_tensorboard_receives_every_epoch(network, dataset, tmp_path, monkeypatch):
    import sys
    import types

    written = []

    class SummaryWriter:
        def __init__(self, directory):
            assert directory == str(tmp_path / "tensorboard")

        def add_scalar(self, name, value, epoch):
            written.append((name, epoch))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    train("normal", network, dataset, QUICK, directory=tmp_path, tensorboard=True)
    assert ("train_loss", 1) in written
    assert ("validation_accuracy", 2) in written
    assert not any(item[0] == "validation_robust_accuracy" for item in written[:-1])
    assert written[-1] == "closed"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "norml"}, ConfigError, "Did you mean 'normal'"),
        ({"method": 3}, InputError, "expected the method's name .*found 3"),
        ({"config": {"epoch": 1}}, ConfigError, "Did you mean 'epochs'"),
        ({"classifier": "conv_nett"}, ConfigError, "Did you mean 'conv_net'"),
    ],
)
def test_bad_arguments(network, dataset, arguments, error, message):
    given = {"method": "normal", "classifier": network, "dataset": dataset, "config": QUICK}
    with pytest.raises(error, match=message):
        train(**{**given, **arguments})


def test_too_few_images(network, dataset):
    with pytest.raises(InputError, match="1 images to train on and 0 held out are too few"):
        train("normal", network, dataset.take(1), QUICK)


def test_fabric_must_agree_with_the_configuration(network, dataset):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    with pytest.raises(
        InputError, match="precision 'bf16-mixed', the configuration says '32-true'"
    ):
        train("normal", network, dataset, QUICK, fabric=fabric)


def test_full_disk_leaves_what_was_there(network, dataset, tmp_path, monkeypatch):
    import errno

    from onmanifold.foundation import files

    train("normal", network, dataset, QUICK, directory=tmp_path)
    (tmp_path / "other").mkdir()
    real, calls = files.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:  # the best weights of the second epoch
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    other = tmp_path / "other"
    with pytest.raises(DataError, match="No space left on device"):
        train("normal", network, dataset, QUICK, directory=other)
    monkeypatch.undo()
    assert not list(other.glob(".*.tmp"))
    assert len((other / "metrics.jsonl").read_text().splitlines()) == 1
    resumed = train("normal", network, dataset, QUICK, directory=other)
    undisturbed = train("normal", network, dataset, QUICK, directory=tmp_path)
    for name, tensor in resumed.classifier.state_dict().items():
        assert torch.equal(tensor, undisturbed.classifier.state_dict()[name])


@pytest.mark.parametrize("name", ["classifier", "model", "best", "a/b"])
def test_players_may_not_take_the_names_of_the_training(fresh_network, fresh_dataset, name):
    @dataclass(frozen=True)
    class Clash(Normal):
        def players(self, classifier, image):
            return {name: nn.Linear(2, 2)}

    with pytest.raises(ConfigError, match="players: Clash calls one"):
        train(Clash(), fresh_network(), fresh_dataset())
