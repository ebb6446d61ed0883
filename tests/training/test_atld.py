"""ATLD: each player's loss and gradient against plain references, the game itself, its files, and resuming."""

import copy
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.attacks import PGD, Engine
from onmanifold.attacks.engine import frozen
from onmanifold.attacks.folding import template_of
from onmanifold.classifiers import Discriminator, load_discriminator, save_discriminator
from onmanifold.foundation.errors import CheckpointError, ConfigError, InputError
from onmanifold.foundation.registry import METHODS, OBJECTIVES, describe
from onmanifold.objectives import ManifoldLoss
from onmanifold.training import Step, TrainingConfig, train
from onmanifold.training.checkpoint import Checkpoint
from onmanifold.training.loop import Training
from onmanifold.training.methods import ATLD

RADIUS = 0.1
BALL = om.ImageBall(radius=RADIUS)
ATTACK = om.PGD(BALL, steps=1, step_size=RADIUS)
METHOD = ATLD(ATTACK, discriminator_width=16)
CONFIG = TrainingConfig(
    epochs=3, batch_size=20, learning_rate=0.02, ema=0.9, validation_fraction=0.2, threads=1
)


def make_classifier(seed=0, **options):
    options = {"channels": (4, 6), "hidden": 10, **options}
    return om.build_classifier("conv_net", 3, (1, 8, 8), seed, **options)


def make_step(method, classifier, dataset, seed=5, count=12):
    images, labels, codes, indices = dataset.batch(torch.arange(count))
    classifier = classifier.double().train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        players = method.players(classifier, images[:1].double())
    for player in players.values():
        player.double().train()
    step = Step(classifier, classifier, images.double(), labels, codes, indices, 0, seed)
    step.players = players
    return step


def moved(discriminator):
    """Larger weights, so that the outputs differ; not so large that a plain logarithm rounds to 0."""
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(1.5)


def features_of(method, classifier, images):
    reads = method.discriminator_features
    return (
        classifier(images) if reads == "logits" else classifier.body(classifier.normalize(images))
    )


def plain_examples(method, step):
    """One sign step up log D from a uniform start, sample by sample; the better end is kept."""
    classifier = copy.deepcopy(step.classifier).eval()
    discriminator = copy.deepcopy(step.players["discriminator"]).eval()
    region = BALL.around(step.images, step.labels)
    starts = region.random("uniform", step.seed, step.indices)["image"]

    def log_probability(image):
        output = discriminator(features_of(method, classifier, image.unsqueeze(0)))[0, 0]
        return torch.log(1 / (1 + torch.exp(-output)))

    found = []
    for image, start in zip(step.images, starts, strict=True):
        point = start.clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_probability(image + point), point)
        end = (start + RADIUS * slope.sign()).clamp(-RADIUS, RADIUS)
        end = (image + end).clamp(0, 1) - image
        better = log_probability(image + end) > log_probability(image + start)
        found.append(image + (end if better else start))
    return torch.stack(found)


def plain_losses(step, features):
    """Eq. 6 corrected, and the class loss of eq. 7: means over the samples."""
    count, manifold, classes = len(step.labels), 0, 0
    outputs = step.players["discriminator"](features)
    for row, label in enumerate(step.labels):
        clean, perturbed = outputs[row], outputs[count + row]
        manifold = manifold + torch.log(torch.sigmoid(perturbed[0]))
        manifold = manifold + torch.log(1 - torch.sigmoid(clean[0]))
        for output in (clean, perturbed):
            classes = classes - torch.log_softmax(output[1:], 0)[label]
    return manifold / count, classes / count


def plain_smoothed(logits, labels, amount):
    others = amount / (logits.shape[1] - 1)
    targets = torch.full_like(logits, others)
    for row, label in enumerate(labels):
        targets[row, label] = 1 - amount
    return -(targets * torch.log_softmax(logits, 1)).sum(1).mean()


def assert_same_gradients(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def gradients(module, loss):
    found = torch.autograd.grad(
        loss, list(module.parameters()), allow_unused=True, retain_graph=True
    )
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


@pytest.mark.parametrize("reads", ["last_hidden", "logits"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_game_of_the_paper_equals_the_reference(dataset, reads, shared):
    method = replace(
        METHOD,
        discriminator_features=reads,
        shared_class_loss=shared,
        invariance_weight=0.7,
        class_weight=0.4,
        smoothing=0.3,
    )
    classifier = make_classifier()
    step = make_step(method, classifier, dataset)
    discriminator = step.players["discriminator"]
    moved(discriminator)
    reference = copy.deepcopy(classifier)
    examples = plain_examples(method, step)
    both = torch.cat([step.images, examples])
    features = features_of(method, reference, both)
    logits = features if reads == "logits" else reference.head(features)

    turns = method.turns(step)
    for _ in range(2):
        turn = next(turns)
        assert set(turn) == {"discriminator"}
        manifold, classes = plain_losses(step, features.detach())
        expected = 0.4 * classes - manifold
        torch.testing.assert_close(turn["discriminator"], expected, rtol=1e-10, atol=0)
        slopes = gradients(discriminator, turn["discriminator"])
        assert_same_gradients(slopes, gradients(discriminator, expected))
        with torch.no_grad():
            for parameter, slope in zip(discriminator.parameters(), slopes, strict=True):
                parameter.sub_(0.5 * slope)

    (turn,) = list(turns)
    torch.testing.assert_close(step.made[0], examples, rtol=0, atol=1e-12)
    assert len(step.made) == 1
    # Under the discriminator that has moved twice.
    manifold, classes = plain_losses(step, features)
    expected = plain_smoothed(logits[12:], step.labels, 0.3) + 0.7 * manifold
    expected = expected + (0.4 * classes if shared else 0)
    assert set(turn) == {"classifier"}
    torch.testing.assert_close(turn["classifier"], expected, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(classifier, turn["classifier"]), gradients(reference, expected))
    assert step.counted == 12
    assert step.correct == (logits[12:].argmax(1) == step.labels).sum()


def test_loss_is_the_classifier_s_under_the_discriminator_as_it_stands(dataset):
    step = make_step(METHOD, make_classifier(), dataset)
    before = copy.deepcopy(step.players["discriminator"].state_dict())
    loss = METHOD.loss(step)
    *_, last = METHOD.turns(step.again())
    torch.testing.assert_close(loss, last["classifier"], rtol=1e-12, atol=0)
    for name, tensor in step.players["discriminator"].state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("reads", ["last_hidden", "logits"])
def test_the_released_code_s_variant_equals_the_reference(dataset, reads):
    method = replace(METHOD, invariance="logits", discriminator_features=reads)
    classifier = make_classifier()
    step = make_step(method, classifier, dataset)
    moved(step.players["discriminator"])
    reference = copy.deepcopy(classifier)
    frozen = copy.deepcopy(classifier).eval()
    examples = plain_examples(method, step)
    leaf = examples.clone().requires_grad_()
    logits = reference(leaf)
    entropy = plain_smoothed(logits, step.labels, 0.5)
    squared = (logits - frozen(step.images).detach()).square().mean()
    first, second = (
        torch.autograd.grad(loss, leaf, retain_graph=True)[0].abs().max()
        for loss in (entropy, squared)
    )
    expected = entropy + 0.5 * (first / second) * squared

    turns = list(method.turns(step))

    assert [next(iter(turn)) for turn in turns] == ["discriminator"] * 2 + ["classifier"]
    torch.testing.assert_close(turns[2]["classifier"], expected, rtol=1e-10, atol=0)
    assert_same_gradients(
        gradients(classifier, turns[2]["classifier"]), gradients(reference, expected)
    )
    with torch.no_grad():
        features = features_of(method, frozen, torch.cat([step.images, examples]))
    manifold, _ = plain_losses(step, features)
    outputs = step.players["discriminator"](features)[:, 1:]
    classes = sum(plain_smoothed(half, step.labels, 0.5) for half in outputs.chunk(2))
    torch.testing.assert_close(turns[0]["discriminator"], classes - manifold, rtol=1e-10, atol=0)
    assert step.counted == 12
    assert all(part.training for part in classifier.modules())
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_equal_logits_give_no_scale(fresh_network, dataset):
    attack = om.FGSM(om.ImageBall(radius=0.0))
    method = ATLD(attack, invariance="logits", discriminator_features="logits")
    step = make_step(method, fresh_network(batch_norm=False), dataset)
    loss = method.loss(step)
    expected = plain_smoothed(step.classifier(step.images), step.labels, 0.5)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reads", ["last_hidden", "logits"])
def test_examples_leave_every_player_untouched(dataset, reads):
    method = replace(METHOD, discriminator_features=reads)
    step = make_step(method, make_classifier(), dataset)
    modules = {"classifier": step.classifier, **step.players}
    before = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
    discriminator = step.players["discriminator"]
    step.examples(
        replace(ATTACK, objective=ManifoldLoss()), model=discriminator.behind(step.classifier)
    )
    for name, module in modules.items():
        assert all(part.training for part in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name][key]), key
    assert discriminator.behind(step.classifier) is discriminator.behind(step.classifier)
    assert not any("classifier" in name for name in discriminator.state_dict())
    assert list(discriminator.children()) == [discriminator.layers]
    assert not step.classifier.head._forward_pre_hooks


def test_the_manifold_loss_as_an_objective_of_its_own(dataset):
    step = make_step(METHOD, make_classifier(), dataset)
    moved(step.players["discriminator"])
    model = step.players["discriminator"].behind(step.classifier).eval()
    attack = PGD(BALL, steps=5, objective=OBJECTIVES.build("manifold_loss"), early_stop=False)
    result = attack(model, step.images, step.labels)
    outputs = model(result.images)[:, 0]
    assert torch.equal(result.success, outputs > 0)
    fooled = result.success
    torch.testing.assert_close(
        result.objective[fooled], functional.logsigmoid(outputs[fooled]).detach()
    )
    assert (outputs >= model(step.images)[:, 0]).all()


# The game, played.


def test_the_discriminator_learns_to_tell_perturbed_images(dataset):
    """A classifier that stands still: the discriminator's loss falls below that of guessing."""
    method = replace(METHOD, discriminator_rate=1000.0, class_weight=0.0)
    config = replace(CONFIG, learning_rate=1e-5, epochs=8, validation_fraction=0.0, ema=None)
    config = replace(config, weight_decay=0.0)
    result = train(method, make_classifier(), dataset, config)
    losses = [entry["train_loss_discriminator"] for entry in result.history]
    assert losses[0] == pytest.approx(2 * 0.6931, abs=0.25)
    assert losses[-1] < 0.75 * losses[0]
    assert losses[-1] < 2 * 0.6931 - 0.2
    discriminator = result.players["discriminator"]
    attack = replace(ATTACK, objective=ManifoldLoss(), early_stop=False)
    images = dataset.batch(torch.arange(100)).images
    model = discriminator.behind(result.classifier)
    perturbed = attack.examples(model, images, dataset.labels[:100])
    with torch.no_grad():
        told = torch.cat([model(perturbed)[:, 0] > 0, model(images)[:, 0] < 0])
    assert told.float().mean() > 0.7


@pytest.mark.parametrize("fields", [{}, {"invariance": "logits"}])
def test_the_classifier_learns_too(dataset, fields):
    config = replace(CONFIG, epochs=6, ema=None)
    results = [train(replace(METHOD, **fields), make_classifier(), dataset, config) for _ in "12"]
    assert results[0].history[-1]["train_accuracy"] > 0.8
    assert {"train_loss_classifier", "train_loss_discriminator"} <= set(results[0].history[0])
    assert results[0].history[0]["validation_robust_accuracy"] is not None
    for networks in (
        [r.classifier for r in results],
        [r.players["discriminator"] for r in results],
    ):
        for one, other in zip(*(network.parameters() for network in networks), strict=True):
            assert torch.equal(one, other)
        assert not networks[0].training


def test_mixed_precision(dataset):
    config = replace(CONFIG, epochs=2, precision="bf16-mixed", attack_precision="bf16")
    result = train(METHOD, make_classifier(), dataset, config)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] + 0.5
    assert next(result.players["discriminator"].parameters()).dtype == torch.float32


def test_the_discriminator_has_a_learning_rate_of_its_own(dataset):
    still = replace(METHOD, discriminator_rate=0.0)
    results = [
        train(method, make_classifier(), dataset, replace(CONFIG, epochs=epochs, weight_decay=0.0))
        for method, epochs in ((still, 1), (still, 2), (METHOD, 1), (METHOD, 2))
    ]
    weights = [result.players["discriminator"].layers[0].weight for result in results]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3])


# Files.


def test_the_discriminator_is_kept_beside_the_classifier(dataset, tmp_path):
    result = train(METHOD, make_classifier(), dataset, CONFIG, directory=tmp_path)
    plain = train(METHOD, make_classifier(), dataset, CONFIG)
    found = load_discriminator(tmp_path / "discriminator.safetensors")
    assert not found.training
    assert found.spec == {
        "feature_size": 10,
        "num_classes": 3,
        "width": 16,
        "depth": 2,
        "reads": "last_hidden",
    }
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, result.players["discriminator"].state_dict()[name]), name
        assert torch.equal(tensor, plain.players["discriminator"].state_dict()[name]), name
    # It is that of the best epoch, which here is not the last one.
    assert result.best_epoch == plain.best_epoch
    last = Checkpoint.read(tmp_path / "last.ckpt").tensors
    same = torch.equal(last["module/discriminator/layers.0.weight"], found.layers[0].weight)
    assert same == (result.best_epoch == CONFIG.epochs)
    again = train(METHOD, make_classifier(), dataset, CONFIG, directory=tmp_path)
    for name, tensor in again.players["discriminator"].state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name])


def test_the_best_epoch_is_that_of_both(dataset, tmp_path, monkeypatch):
    from onmanifold.training.classification import Classification

    monkeypatch.setattr(Classification, "score", lambda self, entry: -float(entry["epoch"]))
    kept = []
    for directory in (tmp_path, None):
        result = train(METHOD, make_classifier(), dataset, CONFIG, directory=directory)
        assert result.best_epoch == 1
        kept.append(result.players["discriminator"].state_dict())
    first = train(METHOD, make_classifier(), dataset, replace(CONFIG, epochs=1))
    last = Checkpoint.read(tmp_path / "last.ckpt").tensors
    for name, tensor in first.players["discriminator"].state_dict().items():
        assert torch.equal(kept[0][name], kept[1][name])
        # Another number of epochs, another schedule: near, and far from the last.
        torch.testing.assert_close(kept[0][name], tensor, rtol=0, atol=0.02)
    weight = last["module/discriminator/layers.0.weight"]
    assert not torch.equal(weight, kept[0]["layers.0.weight"])


def test_a_discriminator_survives_a_file(tmp_path):
    discriminator = Discriminator(5, 3, width=4, depth=1, reads="logits")
    path = save_discriminator(discriminator, tmp_path / "some.safetensors", {"a": 1})
    found = load_discriminator(path)
    features = torch.rand(2, 5)
    assert torch.equal(found(features), discriminator(features))
    assert found(features).shape == (2, 4)
    assert found.reads == "logits"
    om.save_classifier(make_classifier(), tmp_path / "classifier.safetensors")
    with pytest.raises(CheckpointError, match="not one of an onmanifold discriminator"):
        load_discriminator(tmp_path / "classifier.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_discriminator(tmp_path / "none.safetensors")
    strange = tmp_path / "strange.safetensors"
    discriminator = Discriminator(4, 3)
    discriminator.spec = {**discriminator.spec, "colour": "red"}
    save_discriminator(discriminator, strange)
    with pytest.raises(CheckpointError, match="makes no discriminator of this version"):
        load_discriminator(strange)


def test_interrupted_and_resumed_it_ends_with_the_same_bits(dataset, tmp_path, monkeypatch):
    config = replace(CONFIG, checkpoint_minutes=60.0)
    real, calls = Training._step, []

    def step(self, positions):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, positions)

    monkeypatch.setattr(Training, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(METHOD, make_classifier(), dataset, config, directory=tmp_path / "stopped")
    monkeypatch.undo()
    progress = Checkpoint.read(tmp_path / "stopped" / "last.ckpt").progress
    assert (progress["epoch"], progress["step"]) == (1, 2)
    for name in ("stopped", "undisturbed"):
        train(METHOD, make_classifier(), dataset, config, directory=tmp_path / name)
    for file in ("best.safetensors", "discriminator.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in ("stopped", "undisturbed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    one, other = (
        Checkpoint.read(tmp_path / name / "last.ckpt") for name in ("stopped", "undisturbed")
    )
    assert one.tensors.keys() == other.tensors.keys()
    assert any(name.startswith("optimizer/discriminator") for name in one.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    histories = [
        [
            {key: value for key, value in json.loads(line).items() if "second" not in key}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("stopped", "undisturbed")
    ]
    assert histories[0] == histories[1]


# What is wrong is said.


def test_it_is_built_from_a_specification():
    assert METHODS.build("atld") == ATLD(
        PGD(om.ImageBall("linf", 8 / 255), steps=1, step_size=8 / 255)
    )
    assert METHODS.build(describe(METHOD)) == METHOD
    assert METHOD.rates() == {"discriminator": 0.1}
    assert METHOD.attacks == (PGD(BALL, steps=10),)


def test_classifiers_that_do_not_show_their_features(network, dataset):
    with pytest.raises(InputError, match=r"Sequential has no method `features`.* 'logits'"):
        train(METHOD, network, dataset, CONFIG)
    logits = replace(METHOD, discriminator_features="logits")
    result = train(logits, network, dataset, replace(CONFIG, epochs=1))
    assert result.players["discriminator"].reads == "logits"

    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def features(self, images):
            return images.flatten(1)

        def forward(self, images):
            return self.linear(self.features(images))

    with pytest.raises(InputError, match="Headless has no module `head`"):
        train(METHOD, Headless(), dataset, CONFIG)

    class Maps(Headless):
        def features(self, images):
            return images

        def forward(self, images):
            return self.linear(images.flatten(1))

    with pytest.raises(InputError, match=r"features \(B, D\), found \(1, 1, 8, 8\)"):
        train(METHOD, Maps(), dataset, CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attack": 3}, "attack: .*found 3"),
        ({"attack": om.RayS(BALL)}, "RayS follows no objective"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"invariance": "mse"}, r"invariance: .*'divergence' or 'logits', found 'mse'"),
        ({"discriminator_features": "first"}, "discriminator_features: .* found 'first'"),
        ({"invariance_weight": -1.0}, "invariance_weight: expected a finite number >= 0"),
        ({"class_weight": float("inf")}, "class_weight"),
        ({"discriminator_rate": -1.0}, "discriminator_rate"),
        ({"discriminator_width": 0}, "discriminator_width: expected at least 1, found 0"),
        ({"discriminator_depth": 0}, "discriminator_depth"),
        ({"discriminator_updates": 0}, "discriminator_updates"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(METHOD, **fields)


def test_wrong_discriminators():
    with pytest.raises(InputError, match="reads: expected 'last_hidden' or 'logits', found 'x'"):
        Discriminator(3, 3, reads="x")


def test_a_compiled_classifier_shows_its_features(dataset):
    classifier = make_classifier()
    compiled = torch.compile(classifier, backend="eager")
    # As in the first epochs of a staged training: made without the hook, it would not call it later.
    images = make_step(METHOD, classifier, dataset).images
    compiled(torch.cat([images, images]))
    plain = make_step(METHOD, copy.deepcopy(classifier), dataset)
    expected = [next(iter(turn.values())) for turn in METHOD.turns(plain)]
    found = METHOD.turns(replace(make_step(METHOD, classifier, dataset), model=compiled))
    for turn, loss in zip(found, expected, strict=True):
        torch.testing.assert_close(next(iter(turn.values())), loss)


@pytest.mark.parametrize("reads", ["last_hidden", "logits"])
def test_attacks_prepare_classifier_and_discriminator_once(dataset, reads):
    """A composition made anew in each step would be traced anew, which costs more than the attack."""
    method = replace(METHOD, discriminator_features=reads)
    step = make_step(method, make_classifier(), dataset)
    model = step.players["discriminator"].behind(step.classifier)
    templates = []
    for _ in range(2):
        method.loss(step)
        with frozen(model, step.images, Engine()) as network:
            assert network.folded
        templates.append(template_of(model)[0])
    assert templates[0] is not None
    assert templates[0] is templates[1]
