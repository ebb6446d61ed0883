"""SAM and AWP against passes written out by hand, with the optimizer's own step."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS, describe
from onmanifold.training import (
    ATLD,
    AWP,
    SAM,
    AdversarialTraining,
    AdvProp,
    Method,
    Normal,
    Staged,
    Step,
    TrainingConfig,
    train,
)
from onmanifold.training.methods.base import persistent

ATTACK = om.PGD(om.ImageBall(radius=0.1), steps=3)
CONFIG = TrainingConfig(epochs=2, batch_size=30, learning_rate=0.02, optimizer="sgd", threads=1)


def make_step(network, dataset, epoch=0):
    images, labels, _, indices = dataset.batch(torch.arange(20))
    network = network.double().train()
    return Step(network, network, images.double(), labels, None, indices, epoch, 5)


def sgd(*networks):
    weights = [weight for network in networks for weight in network.parameters()]
    return torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01)


def total_norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


def sam_changes(parameters, gradients):
    return [0.3 * gradient / total_norm(gradients) for gradient in gradients]


def asam_changes(parameters, gradients):
    scaled = [
        weight.abs() * gradient for weight, gradient in zip(parameters, gradients, strict=True)
    ]
    return [
        0.3 * weight**2 * gradient / total_norm(scaled)
        for weight, gradient in zip(parameters, gradients, strict=True)
    ]


def awp_changes(parameters, gradients):
    return [
        0.05 * weight.norm() * gradient / gradient.norm()
        if weight.ndim > 1
        else torch.zeros_like(weight)
        for weight, gradient in zip(parameters, gradients, strict=True)
    ]


def two_passes(networks, optimizer, loss, changes):
    """One step by hand: weights there and back; the running statistics are those of the first pass."""
    networks = nn.ModuleList(networks)
    parameters = list(networks.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    statistics = copy.deepcopy(dict(networks.named_buffers()))
    before = [weight.detach().clone() for weight in parameters]
    with torch.no_grad():
        for weight, change in zip(parameters, changes(before, gradients), strict=True):
            weight += change
    optimizer.zero_grad()
    loss().backward()
    with torch.no_grad():
        for weight, old in zip(parameters, before, strict=True):
            weight.copy_(old)
        for name, buffer in networks.named_buffers():
            buffer.copy_(statistics[name])
    optimizer.step()


def plain_loss(network, images, labels):
    return lambda: functional.cross_entropy(network(images), labels)


def follow(method, step, optimizer):
    """What the loop does."""
    for turn in method.turns(step):
        optimizer.zero_grad()
        turn["classifier"].backward()
        optimizer.step()


METHODS_AND_CHANGES = [
    (lambda inner: SAM(inner, 0.3), sam_changes),
    (lambda inner: SAM(inner, 0.3, adaptive=True), asam_changes),
    (lambda inner: AWP(inner, 0.05), awp_changes),
]
IDS = ["sam", "asam", "awp"]


@pytest.mark.parametrize(("make", "changes"), METHODS_AND_CHANGES, ids=IDS)
@pytest.mark.parametrize("adversarial", [False, True])
def test_steps_equal_two_passes_by_hand(network, dataset, make, changes, adversarial):
    reference = copy.deepcopy(network).double().train()
    ours, theirs = sgd(network.double()), sgd(reference)
    inner = AdversarialTraining(ATTACK) if adversarial else Normal()
    for _ in range(3):
        step = make_step(network, dataset)
        images = step.images
        if adversarial:
            images = persistent(ATTACK).examples(
                reference, images, step.labels, seed=step.seed, indices=step.indices
            )
        with torch.no_grad():
            # Train mode: the accuracy is that of the first pass.
            logits = copy.deepcopy(reference)(images)
        two_passes([reference], theirs, plain_loss(reference, images, step.labels), changes)
        follow(make(inner), step, ours)
        assert step.counted == 20
        assert step.correct == (logits.argmax(1) == step.labels).sum()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(
            tensor, reference.state_dict()[name], rtol=1e-10, atol=1e-12, msg=name
        )
    assert network[1].num_batches_tracked == 3


def advprop_loss(network, norm, images, examples, labels):
    """Layer by layer, adversarial images through the other norm."""

    def loss():
        clean, adversarial = images, examples
        for place, part in enumerate(network):
            clean = part(clean)
            adversarial = norm(adversarial) if place == 1 else part(adversarial)
        return functional.cross_entropy(clean, labels) + 0.5 * functional.cross_entropy(
            adversarial, labels
        )

    return loss


@pytest.mark.parametrize(("make", "changes"), METHODS_AND_CHANGES, ids=IDS)
def test_advprop_is_one_loss_of_the_classifier_and_the_auxiliary_norms(
    network, dataset, make, changes
):
    method = make(AdvProp(ATTACK, adversarial_weight=0.5))
    players = method.players(network, dataset.batch(torch.arange(1)).images)
    (norm,) = players["auxiliary"].double().train().norms
    with torch.no_grad():
        norm.weight.mul_(1.5)
        norm.bias.add_(0.3)
    reference, other = copy.deepcopy(network).double().train(), copy.deepcopy(norm)
    ours, theirs = sgd(network.double(), norm), sgd(reference, other)
    for _ in range(3):
        step = replace(make_step(network, dataset), players=players)
        attacked = copy.deepcopy(reference)
        attacked[1] = copy.deepcopy(other)
        arguments = {"seed": step.seed, "indices": step.indices}
        examples = persistent(ATTACK).examples(attacked, step.images, step.labels, **arguments)
        loss = advprop_loss(reference, other, step.images, examples, step.labels)
        two_passes([reference, other], theirs, loss, changes)
        (turn,) = method.turns(step)
        assert turn["auxiliary"] is turn["classifier"]
        ours.zero_grad()
        turn["classifier"].backward()
        ours.step()
        assert step.counted == 40
    for found, expected in ((network, reference), (norm, other)):
        for name, tensor in found.state_dict().items():
            torch.testing.assert_close(
                tensor, expected.state_dict()[name], rtol=1e-10, atol=1e-12, msg=name
            )
    assert norm.num_batches_tracked == network[1].num_batches_tracked == 3
    assert all(isinstance(part, nn.Parameter) for part in norm.parameters())


def test_the_classifier_of_a_game_is_perturbed_under_the_discriminator_that_has_moved(
    network, dataset
):
    game = ATLD(
        om.PGD(om.ImageBall(radius=0.1), steps=1),
        discriminator_features="logits",
        discriminator_width=8,
    )
    step = make_step(network, dataset)
    players = game.players(network, step.images[:1])
    step.players = {name: player.double() for name, player in players.items()}
    reference = copy.deepcopy(network)
    for turn in SAM(game, 0.3).turns(step):
        if "discriminator" in turn:
            with torch.no_grad():
                for weight in step.players["discriminator"].parameters():
                    weight.mul_(1.1)
        else:
            loss = turn["classifier"]
    # With the examples that were made before, at the weights as they are and then at those nearby.
    moving = list(reference.parameters())
    given = replace(step, model=reference, classifier=reference)
    first = game.loss(replace(given, given=iter(step.made)))
    gradients = torch.autograd.grad(first, moving)
    with torch.no_grad():
        for weight, change in zip(moving, sam_changes(moving, gradients), strict=True):
            weight += change
    expected = game.loss(replace(given, given=iter(step.made)))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert loss > first


def test_the_perturbation_is_as_long_as_it_says(network, dataset):
    step = make_step(network, dataset)
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(Normal().loss(step), parameters)
    sam = SAM(Normal(), 0.7).perturbation(parameters, gradients)
    torch.testing.assert_close(total_norm(sam), torch.tensor(0.7).double())
    asam = SAM(Normal(), 0.7, adaptive=True).perturbation(parameters, gradients)
    # Norms start with a shift of 0, which no adaptive perturbation moves.
    scaled = [c / w.abs() for c, w in zip(asam, parameters, strict=True) if bool((w != 0).all())]
    torch.testing.assert_close(total_norm(scaled), torch.tensor(0.7).double())
    for weight, change in zip(
        parameters, AWP(Normal(), 0.1).perturbation(parameters, gradients), strict=True
    ):
        wanted = 0.1 * weight.norm() if weight.ndim > 1 else torch.zeros(()).double()
        torch.testing.assert_close(change.norm(), wanted.detach())
    zeros = [torch.zeros_like(weight) for weight in parameters]
    for method in (SAM(Normal()), SAM(Normal(), adaptive=True), AWP(Normal())):
        assert all(bool((change == 0).all()) for change in method.perturbation(parameters, zeros))


@pytest.mark.parametrize("kind", [SAM, AWP])
def test_radius_0_is_the_method_itself(network, dataset, kind):
    step = make_step(network, dataset)
    expected = Normal().loss(make_step(copy.deepcopy(network), dataset))
    (turn,) = kind(Normal(), 0.0).turns(step)
    torch.testing.assert_close(turn["classifier"], expected, rtol=0, atol=0)


def test_awp_may_begin_later(network, dataset):
    method = AWP(Normal(), 0.1, after_epoch=2)
    losses = []
    for epoch in range(4):
        step = make_step(copy.deepcopy(network), dataset, epoch)
        (turn,) = method.turns(step)
        losses.append(turn["classifier"].item())
    assert losses[0] == losses[1] == Normal().loss(make_step(network, dataset)).item()
    assert losses[2] == losses[3] > losses[0]


class Failing(Method):
    """Fails in the pass of that number."""

    def __init__(self, number):
        self.left = number

    def loss(self, step):
        self.left -= 1
        loss = step.cross_entropy(step.images)
        if self.left == 0:
            raise RuntimeError("no")
        return loss


@pytest.mark.parametrize("kind", [SAM, AWP])
@pytest.mark.parametrize("number", [1, 2])
def test_after_an_error_the_network_is_as_it_was(network, dataset, kind, number):
    step = make_step(network, dataset)
    before = {name: (part, part.clone()) for name, part in network.named_parameters()}
    with pytest.raises(RuntimeError, match="no"):
        list(kind(Failing(number), 0.1).turns(step))
    for name, part in network.named_parameters():
        assert part is before[name][0], name
        assert torch.equal(part, before[name][1]), name
    assert network[1].num_batches_tracked == 1


def test_an_abandoned_turn_leaves_the_network_as_it_was(network, dataset):
    step = make_step(network, dataset)
    before = {name: (part, part.clone()) for name, part in network.named_parameters()}
    turns = SAM(Normal(), 0.5).turns(step)
    next(turns)
    turns.close()
    for name, part in network.named_parameters():
        assert part is before[name][0]
        assert torch.equal(part, before[name][1])


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.flat, self.first = nn.Flatten(), nn.Linear(64, 64)
        self.second, self.head = self.first, nn.Linear(64, 3)

    def forward(self, images):
        hidden = torch.tanh(self.first(self.flat(images)))
        return self.head(torch.tanh(self.second(hidden)))


def test_shared_and_fixed_weights(dataset):
    torch.manual_seed(0)
    network = Tied().double()
    network.head.weight.requires_grad_(False)
    reference = copy.deepcopy(network)
    step = make_step(network, dataset)
    moving = [part for part in reference.parameters() if part.requires_grad]
    loss = functional.cross_entropy(reference(step.images), step.labels)
    gradients = torch.autograd.grad(loss, moving)
    with torch.no_grad():
        for weight, change in zip(moving, sam_changes(moving, gradients), strict=True):
            weight += change
    expected = functional.cross_entropy(reference(step.images), step.labels)
    (turn,) = SAM(Normal(), 0.3).turns(step)
    torch.testing.assert_close(turn["classifier"], expected, rtol=1e-12, atol=0)


class Alternating(Method):
    """The classifier moves, then a player of the method's own, whose loss reads the classifier."""

    attacks = (ATTACK,)

    def loss(self, step):
        return step.cross_entropy(step.images) + 0.1 * step.players["critic"](step.images).mean()

    def turns(self, step):
        yield {"classifier": self.loss(step)}
        yield {"critic": step.players["critic"](step.images).square().mean()}

    def players(self, classifier, image):
        return {"critic": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))}

    def rates(self):
        return {"critic": 0.5}


class Together(Alternating):
    def turns(self, step):
        yield {"classifier": self.loss(step), "critic": step.players["critic"](step.images).mean()}


class Twice(Alternating):
    def turns(self, step):
        yield {"classifier": self.loss(step)}
        yield {"classifier": self.loss(step)}


def test_other_players_move_as_they_are(network, dataset):
    method = SAM(Alternating(), 0.3)
    assert method.attacks == (ATTACK,)
    assert method.rates() == {"critic": 0.5}
    step = make_step(network, dataset)
    players = method.players(network, step.images[:1])
    step.players = {name: player.double() for name, player in players.items()}
    turns = list(method.turns(step))
    assert [list(turn) for turn in turns] == [["classifier"], ["critic"]]
    for refused in (Together(), Twice()):
        message = f"moves once in a step, and alone .* not so in {type(refused).__name__}"
        with pytest.raises(ConfigError, match=message):
            list(SAM(refused).turns(step))


def test_a_specification_builds(dataset, network):
    attack = {"type": "pgd", "threat": "image_ball", "steps": 3}
    built = METHODS.build(
        {"type": "awp", "method": {"type": "adversarial", "attack": attack}, "radius": 0.01}
    )
    assert built == AWP(AdversarialTraining(om.PGD(om.ImageBall(), steps=3)), 0.01)
    assert METHODS.build(describe(built)) == built
    assert METHODS.build({"type": "sam", "method": "normal"}) == SAM(Normal())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(3), "method: expected the method.s name .*found 3"),
        (lambda: SAM(AWP(Normal())), "method: AWP perturbs the weights itself"),
        (lambda: SAM(Staged(AWP(Normal()), 1)), "method: AWP perturbs the weights itself"),
        (lambda: SAM(Normal(), -1), "radius: expected a finite number >= 0, found -1"),
        (lambda: AWP(Normal(), float("inf")), "radius: expected a finite number >= 0, found inf"),
        (lambda: AWP(Normal(), after_epoch=-1), "after_epoch: expected at least 0, found -1"),
    ],
)
def test_wrong_fields(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", [SAM, AWP])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_runs(network, dataset, kind, precision):
    config = replace(CONFIG, precision=precision, epochs=4, ema=0.9)
    result = train(kind(AdversarialTraining(ATTACK, "half"), 0.05), network, dataset, config)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0]
    assert all(isinstance(part, nn.Parameter) for part in result.classifier.parameters())


@pytest.mark.parametrize("kind", [SAM, AWP])
def test_training_with_auxiliary_norms_runs(network, dataset, kind):
    """In the loop each player has an optimizer of its own."""
    entries = train(kind(AdvProp(ATTACK), 0.05), network, dataset, CONFIG).history
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
    assert entries[-1]["train_loss_auxiliary"] == entries[-1]["train_loss_classifier"]
