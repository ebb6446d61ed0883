"""RLAT against a plain, slow reference, and against the optimum of a linear network."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS, describe
from onmanifold.training import AWP, RLAT, SAM, Normal, Step, TrainingConfig, train
from onmanifold.training.methods.layers import changed_outputs

CONFIG = TrainingConfig(epochs=2, batch_size=30, learning_rate=0.02, threads=1)


def make_step(network, dataset, count=12, seed=5):
    images, labels, _, indices = dataset.batch(torch.arange(count))
    network = network.double().train()
    return Step(network, network, images.double(), labels, None, indices, 0, seed)


def computed(network, image, changes):
    """Logits of one image or of a batch, part by part, with perturbations added behind some parts."""
    values = (image + changes[""]).clamp(0, 1) if "" in changes else image
    for name, part in network.named_children():
        values = part(values)
        values = values + changes[name] if name in changes else values
    return values


def plain_changes(network, images, labels, names, radius, scaling="size", descending=True):
    """The perturbation of each layer, sample by sample, from the gradient at zero."""
    network = copy.deepcopy(network).eval()
    found = {name: [] for name in names}
    for image, label in zip(images, labels, strict=True):
        sizes, values = {"": image.unsqueeze(0)}, image.unsqueeze(0)
        for name, part in network.named_children():
            sizes[name] = values = part(values)
        zeros = {name: torch.zeros_like(sizes[name], requires_grad=True) for name in names}
        logits = computed(network, image.unsqueeze(0), zeros)
        loss = torch.logsumexp(logits[0], 0) - logits[0, label]
        slopes = torch.autograd.grad(loss, list(zeros.values()))
        for place, (name, slope) in enumerate(zip(names, slopes, strict=True)):
            length = radius
            if scaling == "size":
                length = length / image.numel() * slope.numel()
            if descending:
                length = length / (place + 1)
            found[name].append(length * slope / (slope**2).sum().sqrt())
    return {name: torch.cat(rows) for name, rows in found.items()}


def assert_same_gradients(network, loss, reference, expected):
    found = torch.autograd.grad(loss, list(network.parameters()))
    wanted = torch.autograd.grad(expected, list(reference.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def hooks(network):
    return sum(len(part._forward_hooks) for part in network.modules())


@pytest.mark.parametrize("scaling", ["size", "constant"])
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("layers", [None, ("1", "3", "5"), ("",), ("", "2", "6")])
def test_rlat_equals_the_reference(network, dataset, layers, scaling, descending):
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    # By default the image and the two convolutions; the linear layer is the last.
    names = layers or ("", "0", "3")
    changes = plain_changes(reference, step.images, step.labels, names, 0.5, scaling, descending)
    expected = functional.cross_entropy(computed(reference, step.images, changes), step.labels)

    loss = RLAT(0.5, layers, scaling, descending).loss(step)

    assert len(step.made) == len(names)
    for made, name in zip(step.made, names, strict=True):
        wanted = changes[name] if name else (step.images + changes[name]).clamp(0, 1)
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(network, loss, reference, expected)
    # Batch norm has seen the perturbed pass alone, and once.
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name))
    assert network[1].num_batches_tracked == 1
    assert step.counted == 12
    assert hooks(network) == 0
    assert all(part.training for part in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_radii_are_those_of_the_released_code(network, dataset):
    """Images of 64 numbers, convolutions of 4 x 4 x 4: the same size, so the places alone tell them apart."""
    step = make_step(network, dataset)
    # Far from the borders, so that nothing is clipped.
    step.images = 0.4 + 0.2 * step.images
    RLAT(0.6).loss(step)
    for place, made in enumerate(step.made, start=1):
        lengths = (made - step.images if place == 1 else made).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((12,), 0.6 / place).double())
    step = make_step(network, dataset)
    RLAT(0.6, ("", "6")).loss(step)
    lengths = step.made[1].norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((12,), 0.6 * 3 / 64 / 2).double())


def test_on_a_linear_network_no_perturbation_is_worse(dataset):
    """Two classes: each layer lowers the margin by its radius times the length of the margin's slope there."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Linear(7, 2))
    step = make_step(network, dataset)
    # Far from the borders, so that nothing is clipped.
    step.images, step.labels = 0.3 + 0.4 * step.images, step.labels % 2
    loss = RLAT(0.2, ("", "1")).loss(step)
    first, last = network[1].weight, network[2].weight
    slopes = [(last[0] - last[1]) @ first, last[0] - last[1]]
    lowered = 0.2 * slopes[0].norm() + 0.2 * 7 / 64 / 2 * slopes[1].norm()
    logits = network(step.images)
    sign = 1.0 - 2 * step.labels
    margins = sign * (logits[:, 0] - logits[:, 1]) - lowered
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-margins)).mean())


def test_the_perturbed_image_stays_in_its_range(network, dataset):
    step, seen = make_step(network, dataset), []
    handle = network[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    RLAT(5.0).loss(step)
    handle.remove()
    assert seen[-1].min() == 0
    assert torch.equal(seen[-1], step.made[0])
    assert seen[-1].max() <= 1


@pytest.mark.parametrize("layers", [None, ("0", "2")])
def test_radius_0_is_normal_training(network, dataset, layers):
    expected = Normal().loss(make_step(copy.deepcopy(network), dataset))
    loss = RLAT(0.0, layers).loss(make_step(network, dataset))
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_it_is_harder_than_the_image_alone(network, dataset):
    losses = [
        method.loss(make_step(copy.deepcopy(network), dataset)).item()
        for method in (Normal(), RLAT(0.5, ("",)), RLAT(0.5))
    ]
    assert losses == sorted(losses)
    assert losses[2] > 1.05 * losses[0]


def test_a_perturbation_does_not_depend_on_the_rest_of_the_batch(network, dataset):
    whole, few = make_step(network, dataset), make_step(copy.deepcopy(network), dataset, 5)
    RLAT(0.5).loss(whole)
    RLAT(0.5).loss(few)
    for one, other in zip(whole.made, few.made, strict=True):
        torch.testing.assert_close(one[:5], other, rtol=1e-9, atol=1e-12)


def test_layers_that_write_over_their_input(network, dataset):
    """The gradient to a convolution's output is not that to what a ReLU makes of it in its place."""
    steps = [make_step(copy.deepcopy(network), dataset) for _ in "12"]
    for place in (2, 4):
        steps[1].classifier[place] = nn.ReLU(inplace=True)
    losses = [RLAT(0.5, ("", "1", "3")).loss(step) for step in steps]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for one, other in zip(steps[0].made, steps[1].made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("conv_net", {"channels": [4, 8]}, ["", "body.0", "body.3", "body.7"]),
        ("resnet13", {"width": 4}, ["", "body.0", "body.1", "body.2", "body.3"]),
        ("mlp", {"hidden": [8, 8]}, ["", "body.1", "body.4"]),
    ],
)
def test_layers_of_the_library_s_classifiers(dataset, name, options, layers):
    classifier = om.build_classifier(name, 3, (1, 8, 8), **options)
    losses = []
    for chosen in (None, tuple(layers)):
        step = make_step(copy.deepcopy(classifier), dataset)
        losses.append(RLAT(0.5, chosen).loss(step))
        assert len(step.made) == len(layers)
    assert torch.equal(*losses)


# Seen again by methods that perturb the weights.


def test_a_step_looked_at_again_has_the_same_perturbations(network, dataset):
    step, method = make_step(network, dataset), RLAT(0.5)
    method.loss(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    reference = copy.deepcopy(network)
    loss = method.loss(step.again())
    changes = dict(zip(("", "0", "3"), step.made, strict=True))
    changes[""] = changes[""] - step.images
    expected = functional.cross_entropy(computed(reference, step.images, changes), step.labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    fresh = method.loss(make_step(network, dataset))
    assert not torch.allclose(loss, fresh, rtol=1e-6)


def test_sharpness_is_that_of_the_perturbed_loss(network, dataset):
    reference = copy.deepcopy(network).double().train()
    step = make_step(network, dataset)
    parameters = list(reference.parameters())
    changes = plain_changes(reference, step.images, step.labels, ("", "0", "3"), 0.5)
    loss = functional.cross_entropy(computed(reference, step.images, changes), step.labels)
    slopes = torch.autograd.grad(loss, parameters)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    with torch.no_grad():
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter += 0.3 * slope / length
    expected = functional.cross_entropy(computed(reference, step.images, changes), step.labels)
    (turn,) = SAM(RLAT(0.5), 0.3).turns(step)
    torch.testing.assert_close(turn["classifier"], expected, rtol=1e-9, atol=0)
    assert_same_gradients(network, turn["classifier"], reference, expected)
    assert hooks(network) == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", [RLAT(0.3), AWP(RLAT(0.3), 0.01)])
def test_training_runs(network, dataset, method, precision):
    config = replace(CONFIG, epochs=4, ema=0.9, precision=precision)
    result = train(method, network, dataset, config)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0]
    assert all(entry["validation_robust_accuracy"] is not None for entry in result.history)


def test_perturbations_keep_half_precision(network, dataset):
    """A float32 perturbation would bring all that follows back to float32."""
    images, labels, _, indices = dataset.batch(torch.arange(12))
    kinds = []
    network[4].register_forward_hook(lambda _, given, output: kinds.append(output.dtype))

    def model(images):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(images).float()

    step = Step(model, network.train(), images, labels, None, indices, 0, 5)
    assert RLAT(0.5).loss(step).isfinite()
    assert kinds == [torch.float32, torch.bfloat16]
    assert all(made.dtype == torch.float32 for made in step.made)


def test_a_compiled_classifier_is_perturbed_in_each_step(network, dataset):
    compiled = torch.compile(network, backend="eager")
    # As in the first epochs of a staged training: made without perturbations, it would know of none later.
    compiled(make_step(network, dataset).images)
    for count in (12, 9, 12):
        expected = RLAT(0.5).loss(make_step(copy.deepcopy(network), dataset, count))
        loss = RLAT(0.5).loss(replace(make_step(network, dataset, count), model=compiled))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


# What goes wrong leaves nothing behind.


class Failing(nn.Module):
    def forward(self, values):
        raise RuntimeError("no")


class Several(nn.Module):
    def forward(self, values):
        return values, values


class First(nn.Module):
    def forward(self, values):
        return values[0]


def test_hooks_are_gone_after_errors(network, dataset):
    broken = nn.Sequential(*network[:3], Failing(), *network[3:])
    with pytest.raises(RuntimeError, match="no"):
        RLAT(0.5).loss(make_step(broken, dataset))
    several = nn.Sequential(*network[:3], Several(), First(), *network[3:])
    with pytest.raises(ConfigError, match="layers: '3' gives no tensor"):
        RLAT(0.5, ("0", "3")).loss(make_step(several, dataset))
    with pytest.raises(ConfigError, match="layers: Sequential has no submodule '9'"):
        RLAT(0.5, ("", "0", "9")).loss(make_step(network, dataset))
    for module in (broken, several, network):
        assert hooks(module) == 0
        assert all(part.training for part in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())


class Idle(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self, used):
        super().__init__()
        self.unused, self.used = nn.Linear(2, 2), used

    def forward(self, images):
        return self.used(images)


def test_layers_without_a_part(network, dataset):
    with pytest.raises(ConfigError, match="layers: 'unused' has no part in what Idle computes"):
        RLAT(0.5, ("unused",)).loss(make_step(Idle(network), dataset))


def test_outputs_are_changed_inside_the_block_alone(network, dataset):
    step = make_step(network, dataset)
    before = network.eval()(step.images)
    with changed_outputs(network, {"6": lambda logits: 2 * logits, "0": lambda maps: maps}):
        torch.testing.assert_close(network(step.images), 2 * before)
    assert torch.equal(network(step.images), before)


# A component.


def test_specifications():
    built = METHODS.build({"type": "rlat", "radius": 0.5, "layers": ["", "body.0"]})
    assert built == RLAT(0.5, ("", "body.0"))
    assert METHODS.build(describe(built)) == built
    assert METHODS.build("rlat") == RLAT(0.08, None, "size", True)
    assert built.attacks == (om.PGD(om.ImageBall("l2", 0.5), steps=10),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radius": -1.0}, "radius: expected a finite number >= 0, found -1"),
        ({"radius": math.inf}, "radius: expected a finite number"),
        ({"layers": ()}, "layers: expected at least one name, each once, or None"),
        ({"layers": ("0", "0")}, r"layers: .* found \('0', '0'\)"),
        ({"scaling": "area"}, r"scaling: .*'size' or 'constant', found 'area'"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        RLAT(**fields)
