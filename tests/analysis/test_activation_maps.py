"""Grad-CAM against plain autograd, the layer that is found, and a model that is left as it was."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

from onmanifold.analysis import activation_maps, agreement, last_convolution, share_inside
from onmanifold.classifiers import build_classifier
from onmanifold.foundation.errors import InputError

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "conv_net": {"type": "conv_net", "channels": [4, 6]},
    "resnet13": {"type": "resnet13", "width": 4},
    "vgg_small": {"type": "vgg_small", "channels": [4, 6], "hidden": 8},
    "wrn": {"type": "wide_resnet", "depth": 10, "width": 1},
}


def network(name):
    spec = NETWORKS[name]
    return build_classifier(spec, num_classes=4, image_shape=(3, 16, 16), seed=0)


def slow_maps(model, images, classes, layer):
    """One image at a time, by a hook and autograd, as the paper writes it."""
    maps = []
    for image, label in zip(images, classes, strict=True):
        held = {}

        def hold(module, inputs, output, held=held):
            held["features"] = output
            return output

        handle = layer.register_forward_hook(hold)
        logits = model(image[None].clone().requires_grad_())
        handle.remove()
        gradient = torch.autograd.grad(logits[0, label], held["features"])[0][0]
        weights = gradient.mean((1, 2))
        maps.append(torch.relu(torch.einsum("c,chw->hw", weights, held["features"][0])).detach())
    return torch.stack(maps)


class Foreign(nn.Module):
    """Not one of ours: in-place activations, one of them called twice, a sum, a functional pooling."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 4)

    def forward(self, images):
        features = self.relu(self.first(images))
        features = self.relu(self.norm(self.second(features)) + features)
        return self.head(functional.adaptive_avg_pool2d(features, 1).flatten(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_those_of_plain_autograd(name):
    model = network(name).eval().double()
    images, classes = IMAGES.double(), torch.tensor([0, 3, 1, 1, 2])
    layer = last_convolution(model, images)
    expected = slow_maps(model, images, classes, layer.module)
    found = activation_maps(model, images, classes, upsample=False, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (found > 0).any()
    wide = activation_maps(model, images, classes, layer.name)
    again = functional.interpolate(expected[:, None], (16, 16), mode="bilinear")[:, 0]
    torch.testing.assert_close(wide, again, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", ["first", "second", "norm"])
def test_maps_of_a_model_with_in_place_activations(layer):
    model = Foreign().eval()
    classes = torch.tensor([0, 1, 2, 3, 0])
    found = activation_maps(model, IMAGES, classes, layer, upsample=False)
    # The same network without anything in place; a hook that keeps an output would see it changed.
    model.relu = nn.ReLU()
    expected = slow_maps(model, IMAGES, classes, getattr(model, layer))
    torch.testing.assert_close(found, expected)


def test_without_classes_the_predicted_one_is_explained():
    model = network("conv_net")
    predicted = model.eval()(IMAGES).argmax(1)
    assert torch.equal(activation_maps(model, IMAGES), activation_maps(model, IMAGES, predicted))
    assert not torch.equal(
        activation_maps(model, IMAGES), activation_maps(model, IMAGES, (predicted + 1) % 4)
    )


def test_the_layer_that_is_found():
    residual, plain = network("resnet13"), network("conv_net")
    # Of the last block the sum after its activation, not the convolution of its shortcut, which runs last.
    found = last_convolution(residual, IMAGES)
    assert isinstance(found.module, nn.ReLU)
    assert residual.get_submodule(found.name) is found.module
    convolutions = [name for name, part in residual.named_modules() if isinstance(part, nn.Conv2d)]
    assert found.name.rsplit(".", 1)[0] == max(convolutions).rsplit(".", 2)[0]
    found = last_convolution(plain, IMAGES)
    assert isinstance(found.module, nn.ReLU)
    # An activation that is called twice has no one output.
    assert last_convolution(Foreign(), IMAGES).name == "norm"


def test_the_model_is_left_untouched():
    model = network("resnet13").train()
    model.body.eval()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    activation_maps(model, IMAGES)
    last_convolution(model, IMAGES)
    with pytest.raises(InputError):
        activation_maps(model, IMAGES, layer="head")
    assert modes == [part.training for part in model.modules()]
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        for part in model.modules()
    )
    assert torch.equal(torch.get_rng_state(), random)


def test_interrupted_the_model_is_left_untouched_too():
    model, seen = network("conv_net").train(), []

    class Stop(nn.Module):
        def forward(self, features):
            seen.append(None)
            if len(seen) == 3:  # after the predictions and the search for the layer
                raise KeyboardInterrupt
            return features

    model.head = nn.Sequential(Stop(), model.head)
    with pytest.raises(KeyboardInterrupt):
        activation_maps(model, IMAGES)
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_frozen_parameters_and_switched_off_gradients_do_not_matter():
    model = network("conv_net").eval()
    expected = activation_maps(model, IMAGES)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(activation_maps(model, IMAGES), expected)
    with torch.inference_mode():
        assert torch.equal(activation_maps(model, IMAGES.clone()), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": IMAGES * 255}, "images: expected values in"),
        ({"images": IMAGES[:0]}, "images: the batch is empty"),
        ({"classes": torch.tensor([0, 1, 2, 3, 4])}, "classes: found label 4"),
        ({"layer": "bodi"}, "Did you mean 'body'"),
        ({"layer": "head"}, "layer: expected an output"),
        ({"layer": nn.ReLU()}, "layer: expected a part of the model"),
    ],
)
def test_wrong_arguments(arguments, message):
    given = {"model": network("conv_net"), "images": IMAGES, **arguments}
    with pytest.raises(InputError, match=message):
        activation_maps(**given)


def test_a_model_without_convolutions():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(InputError, match="has no convolution"):
        activation_maps(model, IMAGES)


def test_agreement_of_maps():
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(6, 4, 4, generator=generator).relu()
    second = (torch.rand(6, 4, 4, generator=generator) - 0.4).relu()
    found = agreement(first, second)
    for row in range(6):
        one, two = first[row].flatten().double(), second[row].flatten().double()
        assert found.cosine[row] == pytest.approx(torch.cosine_similarity(one, two, dim=0).item())
        assert found.rank[row] == pytest.approx(spearmanr(one, two).statistic)
    same = agreement(first, 3 * first)
    np.testing.assert_allclose(same.cosine, 1)
    np.testing.assert_allclose(same.rank, 1)
    np.testing.assert_allclose(agreement(first, first.square()).rank, 1)


def test_agreement_of_empty_maps():
    maps = torch.eye(3).repeat(2, 1, 1)
    empty = torch.zeros_like(maps)
    assert agreement(maps, empty).cosine.tolist() == [0, 0]
    assert agreement(maps, empty).rank.tolist() == [0, 0]
    assert np.isnan(agreement(empty, empty).cosine).all()
    assert np.isnan(agreement(empty, empty + 1).rank).all()
    tiny = 1e-200 * maps.double()
    np.testing.assert_allclose(agreement(tiny, tiny).cosine, 1)
    with pytest.raises(InputError, match="first, second"):
        agreement(maps, maps[:1])


def test_share_inside_a_mask():
    maps = torch.tensor([[[1.0, 3.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[True, True], [False, False]]).expand(2, 2, 2)
    share = share_inside(maps, masks)
    assert share[0] == 0.5
    assert np.isnan(share[1])
    with pytest.raises(InputError, match="maps, masks"):
        share_inside(maps, masks[0])
