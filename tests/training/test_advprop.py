"""AdvProp: the loss by hand, whose statistics are whose, and that evaluation uses the main norms."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import METHODS
from onmanifold.training import AdvProp, Step, TrainingConfig, train
from onmanifold.training.checkpoint import Checkpoint
from onmanifold.training.methods.advprop import AuxiliaryNorms
from onmanifold.training.methods.base import persistent

ATTACK = om.PGD(om.ImageBall(radius=0.1), steps=3)
CONFIG = TrainingConfig(epochs=3, batch_size=30, learning_rate=0.01, threads=1)


def make_step(network, dataset, method):
    images, labels, _, indices = dataset.batch(torch.arange(20))
    network = network.double()
    players = method.players(network, images[:1].double())
    for module in (network, *players.values()):
        module.double().train()
    step = Step(network, network, images.double(), labels, None, indices, 0, 5)
    step.players = players
    return step


def disturb(norm):
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor += torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.2)])
def test_loss_gradients_and_statistics_equal_two_networks(network, dataset, weights):
    method = AdvProp(ATTACK, *weights)
    step = make_step(network, dataset, method)
    (auxiliary,) = step.players["auxiliary"].norms
    disturb(auxiliary)
    # Two networks, the second with the other norm, written out.
    main, other = copy.deepcopy(network), copy.deepcopy(network)
    other[1] = copy.deepcopy(auxiliary)
    examples = persistent(ATTACK).examples(
        other, step.images, step.labels, seed=step.seed, indices=step.indices
    )
    adversarial = weights[1] * functional.cross_entropy(other(examples), step.labels)
    clean = weights[0] * functional.cross_entropy(main(step.images), step.labels)

    (turn,) = method.turns(step)
    torch.testing.assert_close(turn["classifier"], clean + adversarial, rtol=1e-12, atol=0)
    assert turn["auxiliary"] is turn["classifier"]
    torch.testing.assert_close(step.made[0], examples, rtol=0, atol=1e-12)
    assert step.counted == 40

    found = torch.autograd.grad(turn["classifier"], list(network.parameters()), retain_graph=True)
    own = torch.autograd.grad(clean, list(main.parameters()))
    theirs = torch.autograd.grad(adversarial, list(other.parameters()))
    for name, ours, first, second in zip(
        dict(network.named_parameters()), found, own, theirs, strict=True
    ):
        # The main norm sees clean images alone.
        wanted = first if name.startswith("1.") else first + second
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    found = torch.autograd.grad(turn["auxiliary"], list(auxiliary.parameters()))
    names = [name for name, _ in other.named_parameters()]
    wanted = [theirs[names.index(f"1.{name}")] for name, _ in auxiliary.named_parameters()]
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)

    for name, buffer in network[1].named_buffers():
        torch.testing.assert_close(buffer, main[1].get_buffer(name), msg=name)
        torch.testing.assert_close(auxiliary.get_buffer(name), other[1].get_buffer(name), msg=name)
    assert not torch.allclose(auxiliary.running_mean, network[1].running_mean)
    assert network[1].num_batches_tracked == auxiliary.num_batches_tracked == 1


def test_the_attack_sees_the_auxiliary_norms_again_and_again(network, dataset):
    """The copy that attacks make of a model is kept between steps; it must follow the norms."""
    method = AdvProp(ATTACK)
    step = make_step(network, dataset, method)
    (auxiliary,) = step.players["auxiliary"].norms
    for _ in range(3):
        other = copy.deepcopy(network)
        other[1] = copy.deepcopy(auxiliary)
        # In between others attack the network with its main norms, as validation does.
        main = ATTACK(network.eval(), step.images, step.labels, indices=step.indices).images
        network.train()
        arguments = {"seed": step.seed, "indices": step.indices}
        expected = persistent(ATTACK).examples(other, step.images, step.labels, **arguments)
        step.made.clear()
        method.loss(step)
        torch.testing.assert_close(step.made[0], expected, rtol=0, atol=1e-12)
        disturb(auxiliary)
    assert not torch.allclose(main, expected)


def test_the_norms_are_put_back_also_after_errors(network, dataset):
    norm, auxiliary = network[1], AuxiliaryNorms(network)
    network.eval()
    images = dataset.batch(torch.arange(5))[0]
    before = network(images)
    disturb(auxiliary.norms[0])
    auxiliary.eval()
    with auxiliary.inside(network):
        assert network[1] is auxiliary.norms[0]
        assert not torch.allclose(network(images), before)
    with pytest.raises(KeyboardInterrupt), auxiliary.inside(network):
        raise KeyboardInterrupt
    assert network[1] is norm
    assert torch.equal(network(images), before)


def test_a_shared_norm_is_replaced_everywhere():
    norm = nn.BatchNorm1d(4)
    network = nn.Sequential(nn.Linear(4, 4), norm, nn.Sequential(nn.Linear(4, 4), norm))
    auxiliary = AuxiliaryNorms(network)
    assert len(auxiliary.norms) == 1
    with auxiliary.inside(network):
        assert network[1] is network[2][1] is auxiliary.norms[0]
    assert network[1] is network[2][1] is norm


def test_training_keeps_and_validates_the_main_norms(network, dataset, tmp_path):
    config = replace(CONFIG, epochs=6, validation_fraction=0.2)
    result = train(AdvProp(ATTACK), network, dataset, config, directory=tmp_path)
    assert result.classifier.state_dict().keys() == network.state_dict().keys()
    entry = result.history[-1]
    assert {"train_loss_classifier", "train_loss_auxiliary"} <= entry.keys()
    assert entry["validation_accuracy"] > 0.8
    assert entry["train_loss"] < result.history[0]["train_loss"]
    tensors = Checkpoint.read(tmp_path / "last.ckpt").tensors
    name = "module/auxiliary/norms.0.running_mean"
    assert not torch.equal(tensors[name], tensors["module/model/1.running_mean"])


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)]
)
def test_a_classifier_without_batch_norm(network, dataset, norm):
    network[1] = norm
    with pytest.raises(InputError, match=r"AdvProp needs batch norm .* found none in Sequential"):
        train(AdvProp(ATTACK), network, dataset, CONFIG)


def test_fields():
    attack = {"type": "pgd", "threat": "image_ball", "steps": 3}
    built = METHODS.build({"type": "advprop", "attack": attack, "clean_weight": 0.5})
    assert built == AdvProp(om.PGD(om.ImageBall(), steps=3), 0.5)
    # What is kept has the main norms: clean images judge it.
    assert built.attacks == ()
    with pytest.raises(ConfigError, match=r"attack: .*'threat' is missing"):
        AdvProp("pgd")
    with pytest.raises(ConfigError, match="clean_weight: expected a finite number >= 0, found -1"):
        AdvProp(ATTACK, -1)
    with pytest.raises(ConfigError, match="clean_weight and adversarial_weight: found 0 for both"):
        AdvProp(ATTACK, 0, 0)
