"""Where in an image a classifier sees a class: Grad-CAM, and how far its maps move (IJSAT, figures 5 and 9)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks.engine import full_float32, probe, untouched, unwrapped
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import nearest

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class Layer(NamedTuple):
    """A layer of a model.

    Attributes:
        name: As ``model.get_submodule`` knows it.
        module: The layer.
    """

    name: str
    module: nn.Module


class Agreement(NamedTuple):
    """How much maps have in common with others, a row per image, float64.

    Attributes:
        cosine: (B,) cosine of the angle between the two maps, in [0, 1]: 1 for maps that are the same up to a
            factor, 0 for maps that share no place, or of which one alone is empty.
        rank: (B,) Spearman's correlation of the two maps' values over places, in [-1, 1]; 0 where one alone
            is constant.

    Both are NaN where neither map says anything: both are empty, or both constant.
    """

    cosine: NDArray[np.float64]
    rank: NDArray[np.float64]


def activation_maps(
    model: nn.Module,
    images: Tensor,
    classes: Tensor | None = None,
    layer: str | nn.Module | None = None,
    *,
    upsample: bool = True,
    batch_size: int = 256,
) -> Tensor:
    """Grad-CAM: where the features of a layer speak for a class (Selvaraju et al. 2017, equations 1 and 2).

    A map is ReLU(Σ_k a_k A_k): A_k the layer's channels, a_k the mean over places of the gradient of the class's
    logit with respect to A_k. It is computed by Captum's ``LayerGradCam``. The model is left as it was found.

    Args:
        model: Images to logits (B, K).
        images: (B, C, H, W) in [0, 1].
        classes: (B,) int64, whose logits are explained; None: the classes that the model predicts.
        layer: Name of a layer of the model, or the layer, whose output is (B, channels, h, w); None: the one that
            `last_convolution` finds.
        upsample: Whether to interpolate the maps, bilinearly, to the size of the images, for looking at.
        batch_size: Images at once.

    Returns:
        (B, H, W), or (B, h, w) where not upsampled; at least 0, in units of the logits times features.

    Raises:
        InputError: Images or classes do not fit the model, or the layer has no map to give.
    """
    images = check_images(images)
    model = unwrapped(model)
    with torch.inference_mode(False), untouched(model, seed=0), full_float32():
        if torch.is_inference(images):
            images = images.clone()
        logits = (
            [probe(model, part) for part in torch.split(images, batch_size)] if len(images) else []
        )
        if not logits:
            raise InputError("images: the batch is empty.")
        predicted = torch.cat(logits)
        if classes is None:
            classes = predicted.argmax(1)
        classes = check_labels(classes, len(images), predicted.shape[1], "classes")
        module = _layer_of(model, images, layer)
        parts = zip(torch.split(images, batch_size), torch.split(classes, batch_size), strict=True)
        maps = torch.cat([_maps(model, module, *part) for part in parts])
    if not upsample:
        return maps.squeeze(1)
    size = (images.shape[2], images.shape[3])
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False).squeeze(1)


def _maps(model: nn.Module, layer: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """(B, 1, h, w)."""
    from captum.attr import LayerGradCam

    with torch.enable_grad():
        # Captum asks for the gradient of the images it is given, so that parameters may be frozen.
        found = LayerGradCam(model, layer).attribute(
            images.detach().clone(), target=classes, relu_attributions=True
        )
    if not isinstance(found, Tensor) or found.ndim != 4:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"layer: expected an output (B, channels, h, w), found a map {shape}.")
    return found.detach()


def _layer_of(model: nn.Module, images: Tensor, layer: str | nn.Module | None) -> nn.Module:
    names: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if name}
    if layer is None:
        return _last_convolution(model, images[:1]).module
    if isinstance(layer, str):
        if layer not in names:
            raise InputError(f"layer: the model has none called {layer!r}.{nearest(layer, names)}")
        return names[layer]
    if layer not in names.values():
        raise InputError(f"layer: expected a part of the model, found {type(layer).__name__}.")
    return layer


def last_convolution(model: nn.Module, images: Tensor) -> Layer:
    """The layer after which the features of the last convolution are complete, found by running the model.

    It is the last layer whose output still has the height and width of the last convolution's output: after batch
    norm and activation, and, in a residual network, after the sum with the shortcut, before anything pools. A
    layer that is called more than once has no one output, and is passed over. The model is left as it was found.

    Args:
        model: Images to logits.
        images: (B, C, H, W) in [0, 1]; one is enough.

    Raises:
        InputError: The model has no convolution that is called once, or does not take the images.
    """
    images = check_images(images)
    model = unwrapped(model)
    with untouched(model, seed=0), full_float32():
        return _last_convolution(model, images[:1])


class _Output(NamedTuple):
    layer: Layer
    tensor: Tensor


def _last_convolution(model: nn.Module, images: Tensor) -> Layer:
    with _recorded(model) as outputs:
        probe(model, images)
    calls: dict[nn.Module, int] = {}
    for output in outputs:
        calls[output.layer.module] = calls.get(output.layer.module, 0) + 1
    maps = [
        output for output in outputs if calls[output.layer.module] == 1 and output.tensor.ndim == 4
    ]
    places = [
        number for number, found in enumerate(maps) if isinstance(found.layer.module, _CONVOLUTIONS)
    ]
    if not places:
        raise InputError(
            "layer: the model has no convolution; name the layer whose maps are meant."
        )
    size = maps[places[-1]].tensor.shape[2:]
    last = [found for found in maps[places[-1] :] if found.tensor.shape[2:] == size][-1]
    # Of a layer and what it is the last part of, both with the same output, the inner one is named.
    return next(found.layer for found in maps if found.tensor is last.tensor)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Output]]:
    """What each layer of the model gives inside the block, in the order in which they finish."""
    outputs: list[_Output] = []

    def recorder(layer: Layer) -> Any:
        def record(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append(_Output(layer, output))

        return record

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(recorder(Layer(name, module)))
                stack.callback(handle.remove)
        yield outputs


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """How much the maps of images have in common with other maps, such as those under attack.

    Args:
        first: (B, h, w), at least 0.
        second: (B, h, w), at least 0.

    Raises:
        InputError: Shapes that differ.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise InputError(
            f"first, second: expected two (B, h, w), found {tuple(first.shape)} and {tuple(second.shape)}."
        )
    from scipy.stats import rankdata

    one, two = (maps.flatten(1).double().numpy(force=True) for maps in (first, second))
    ranks = [rankdata(maps, axis=1) for maps in (one, two)]
    centred = [values - values.mean(axis=1, keepdims=True) for values in ranks]
    return Agreement(_cosine(one, two), _cosine(*centred))


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    units, empty = zip(*map(_unit, (first, second)), strict=True)
    inner = (units[0] * units[1]).sum(axis=1)
    return np.where(empty[0] & empty[1], np.nan, inner.clip(-1, 1))


def _unit(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Rows brought to length 1, and which of them are 0; no square underflows."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    empty = largest == 0
    rows = rows / np.where(empty, 1.0, largest)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(empty, 1.0, length), empty.squeeze(1)


def share_inside(maps: Tensor, masks: Tensor) -> NDArray[np.float64]:
    """The share of each map that lies inside a mask, such as the object: (B,) in [0, 1]; NaN for an empty map.

    Args:
        maps: (B, H, W), at least 0.
        masks: (B, H, W) bool.

    Raises:
        InputError: Shapes that differ.
    """
    if maps.shape != masks.shape or maps.ndim != 3:
        raise InputError(
            f"maps, masks: expected two (B, H, W), found {tuple(maps.shape)} and {tuple(masks.shape)}."
        )
    wide = maps.double()
    total = wide.sum((1, 2))
    share = (wide * masks).sum((1, 2)) / total
    return np.asarray(share.numpy(force=True), dtype=np.float64)
