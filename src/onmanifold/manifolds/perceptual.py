"""Perceptual distances: how alike two images look, by deep features or at several scales."""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onmanifold.foundation.errors import ConfigError, DataError, InputError
from onmanifold.foundation.weights import weights_digest

ImageShape = tuple[int, int, int]
Kind = Literal["auto", "lpips", "features", "pyramid"]
Network = Literal["alex", "vgg", "squeeze"]

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish)
# Below this length a channel vector is no direction but rounding; it keeps the gradient finite at zero.
_SHORTEST = 1e-4
# Hooks see the passes of all threads.
_ONE_PASS = threading.Lock()
# Below 31 pixels AlexNet's poolings leave nothing.
_LPIPS_SIDE = 64


class PerceptualDistance(ABC):
    """A distance between images, differentiable: what is compared is computed once for each.

    Attributes:
        name: Short name for tables.
        fingerprint: A digest of all that determines it, after its name; results record it.
    """

    name: str
    fingerprint: str

    @abstractmethod
    def describe(self, images: Tensor) -> Tensor:
        """What is compared, (B, D), of images (B, C, H, W) in [0, 1]."""

    @abstractmethod
    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (B,) of two descriptions (B, D)."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (B,) of images (B, C, H, W) in [0, 1], pair by pair."""
        return self.compare(self.describe(first), self.describe(second))


class PyramidDistance(PerceptualDistance):
    """Mean absolute difference of the images and of their halved copies, the mean over the scales.

    It needs no network. Each scale halves the one before by averaging, down to 4 pixels.

    >>> import torch
    >>> PyramidDistance()(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.25)).item()
    0.25
    """

    name = "pyramid"
    fingerprint = "pyramid-l1"

    def describe(self, images: Tensor) -> Tensor:
        scales = [images]
        while min(scales[-1].shape[2:]) >= 8:
            scales.append(F.avg_pool2d(scales[-1], 2))
        shares = [scale.flatten(1) / (scale.shape[1:].numel() * len(scales)) for scale in scales]
        return torch.cat(shares, dim=1)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().sum(1)


class FeatureDistance(PerceptualDistance):
    """L2 distance of a classifier's normalised activations (Laidlaw et al. 2021).

    In each layer the vector of channels is scaled to unit length at each place and divided by √(H W), so that
    every layer counts the same; the layers are concatenated. No weights are learned: it is the square root of
    LPIPS without them. The classifier is copied, in eval mode, and left as it is.

    Args:
        classifier: Any module of images (B, C, H, W) in [0, 1].
        image_shape: (C, H, W); None: the classifier's own.
        layers: Names of the submodules whose outputs are compared, as in ``classifier.named_modules()``; None:
            at each size (H, W) the last activation such as ReLU, without sizes below 2 pixels; of networks
            without such, all activations.

    Raises:
        InputError: The classifier takes no such images, has no such layers, or no activations.
    """

    name = "features"

    def __init__(
        self,
        classifier: nn.Module,
        image_shape: ImageShape | None = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        own = getattr(classifier, "image_shape", None)
        shape = own if image_shape is None else image_shape
        if shape is None:
            raise InputError(
                "image_shape: expected (C, H, W), since the classifier does not say it."
            )
        if own is not None and tuple(own) != tuple(shape):
            raise InputError(
                f"classifier: takes images {tuple(own)}, expected one for images {tuple(shape)}."
            )
        network = copy.deepcopy(classifier).eval().requires_grad_(False)
        first = next(network.parameters(), torch.zeros(()))
        probe = torch.full((1, *shape), 0.5, dtype=first.dtype, device=first.device)
        if layers is None:
            layers = _last_activations(network, probe)
        self.layers = tuple(layers)
        _check_layers(network, self.layers)
        self._networks = {(first.dtype, first.device): network}

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        # When it is asked for: training makes a distance of its own network in each step.
        network = next(iter(self._networks.values()))
        text = f"{weights_digest(network)} {self.layers} {network}"
        return f"features-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"

    def describe(self, images: Tensor) -> Tensor:
        with _ONE_PASS:
            network = self._network_for(images)
            with _recorded(network, self.layers) as outputs:
                network(images)
        missing = [name for name in self.layers if name not in outputs]
        if missing:
            raise InputError(f"layers: {missing[0]!r} gave no output tensor.")
        return torch.cat([outputs[name] for name in self.layers], dim=1)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        distances: Tensor = torch.linalg.vector_norm(first - second, dim=1)
        return distances

    def _network_for(self, images: Tensor) -> nn.Module:
        """The copy in the images' precision; the first one stays as it was."""
        place = (images.dtype, images.device)
        if place not in self._networks:
            original = next(iter(self._networks.values()))
            self._networks[place] = copy.deepcopy(original).to(images.device, images.dtype)
        return self._networks[place]


class LPIPS(PerceptualDistance):
    """Learned Perceptual Image Patch Similarity (Zhang et al. 2018), from the package ``lpips``.

    Grey images serve as three equal channels; images below 64 pixels are enlarged, bilinearly.

    Args:
        network: "alex", "vgg" or "squeeze".
        pretrained: Whether the network has its trained weights; without, it is of use for tests alone.

    Raises:
        ConfigError: The package is not installed.
        DataError: Its weights cannot be had.
    """

    name = "lpips"

    def __init__(self, network: Network = "alex", *, pretrained: bool = True) -> None:
        try:
            package: Any = importlib.import_module("lpips")
        except (ImportError, RuntimeError) as error:
            # RuntimeError: a torchvision that was built for another torch.
            raise ConfigError(
                f"LPIPS needs the package lpips, pip install 'onmanifold[lpips]': {error}."
            ) from error
        try:
            model = package.LPIPS(net=network, pnet_rand=not pretrained, verbose=False)
        except (OSError, RuntimeError) as error:
            raise DataError(f"The weights of LPIPS ({network}) cannot be had: {error}") from error
        self._model: Any = model.eval().requires_grad_(False)
        self.fingerprint = f"lpips-{network}-{weights_digest(model)}"

    def describe(self, images: Tensor) -> Tensor:
        # The learned weights are not negative: their roots make LPIPS a squared distance.
        model = self._model.to(images.device, images.dtype)
        images = images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)
        height, width = images.shape[2:]
        if min(height, width) < _LPIPS_SIDE:
            factor = _LPIPS_SIDE / min(height, width)
            size = [round(factor * height), round(factor * width)]
            images = F.interpolate(images, size=size, mode="bilinear")
        parts = []
        features = model.net(model.scaling_layer(2 * images - 1))
        for layer, weight in zip(features, model.lins, strict=True):
            roots = weight.model[-1].weight.clamp(min=0).sqrt()
            parts.append((_unit_channels(layer) * roots).flatten(1))
        return torch.cat(parts, dim=1)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).square().sum(1)


def perceptual_distance(
    kind: Kind = "auto",
    *,
    classifier: nn.Module | None = None,
    image_shape: ImageShape | None = None,
) -> PerceptualDistance:
    """The perceptual distance of a name, or the best that can be had.

    Args:
        kind: "lpips"; "features" of a classifier; "pyramid": multi-scale L1; "auto": LPIPS where the package
            and its weights can be had, else features where there is a classifier, else the pyramid.
        classifier: Whose features serve; "features" needs it.
        image_shape: (C, H, W) of the images; None: the classifier's.

    Raises:
        ConfigError: Unknown kind, no classifier, or the package lpips is missing.
        DataError: The weights of LPIPS cannot be had.
    """
    if kind not in ("auto", "lpips", "features", "pyramid"):
        raise ConfigError(
            f"kind: expected 'auto', 'lpips', 'features' or 'pyramid', found {kind!r}."
        )
    if kind in ("auto", "lpips"):
        try:
            return LPIPS()
        except (ConfigError, DataError):
            if kind == "lpips":
                raise
    if classifier is not None and kind != "pyramid":
        return FeatureDistance(classifier, image_shape)
    if kind == "features":
        raise ConfigError("classifier: expected one whose features are compared, found None.")
    return PyramidDistance()


def _unit_channels(layer: Tensor) -> Tensor:
    """Activations (B, C, ...) with unit channel vectors, divided by the root of the number of places."""
    lengths = (layer.square().sum(1, keepdim=True) + _SHORTEST**2).rsqrt()
    unit: Tensor = layer * (lengths / math.sqrt(layer.shape[2:].numel()))
    return unit


@contextmanager
def _recorded(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Normalised outputs (B, D) of submodules by name, of the passes made inside the block."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            # Computed at once: a later layer may work in place.
            if isinstance(output, Tensor) and output.ndim >= 2:
                outputs[name] = _unit_channels(output).flatten(1)

        return keep

    modules = dict(network.named_modules())
    handles = [modules[name].register_forward_hook(record(name)) for name in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _last_activations(network: nn.Module, probe: Tensor) -> list[str]:
    """Names of the last activation at each size, by a pass of the network; of flat ones, all of them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            shapes.pop(name, None)
            shapes[name] = tuple(output.shape[2:])

        return keep

    handles = [
        module.register_forward_hook(record(name))
        for name, module in network.named_modules()
        if isinstance(module, _ACTIVATIONS)
    ]
    try:
        with torch.no_grad():
            network(probe)
    except RuntimeError as error:
        raise InputError(
            f"classifier: does not take images {tuple(probe.shape[1:])}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    last = {shape: name for name, shape in shapes.items() if shape and min(shape) >= 2}
    names = list(last.values()) or list(shapes)
    if not names:
        raise InputError("classifier: found no activation such as ReLU; name its layers.")
    return names


def _check_layers(network: nn.Module, layers: Sequence[str]) -> None:
    known = [name for name, _ in network.named_modules() if name]
    unknown = [name for name in layers if name not in known]
    if unknown or not layers:
        raise InputError(f"layers: found {list(layers)}, expected some of {', '.join(known)}.")
