"""The engine of all attacks: a frozen view of the model, fast and without a trace left on it.

`frozen` gives the network that an attack calls: in eval mode, parameters without gradient, batch norm
folded and weights in channels_last on a private copy where that is exact, optionally in bfloat16 and
compiled. The model itself is found again exactly as it was, also after an interruption.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from onmanifold.attacks import folding
from onmanifold.attacks.threads import own_threads, suitable_threads, suitable_workers
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.memory import keep_freed_memory
from onmanifold.foundation.modules import frozen as frozen_module
from onmanifold.foundation.modules import full_float32 as full_float32
from onmanifold.foundation.registry import Component

Precision = Literal["32", "bf16"]

_PROBES = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine(Component):
    """How an attack runs the model; what it computes does not change beyond float rounding.

    Attributes:
        precision: "32": the model's own precision; "bf16": bfloat16, success checked again in float32.
        fold: Whether to fold batch norm on a private copy where that is exact.
        compile: Whether to compile the private copy with torch.compile.
        threads: CPU threads during an attack; None: 1 for small models, else as set outside.
    """

    precision: Precision = "32"
    fold: bool = True
    compile: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads: expected at least 1, found {self.threads}.")


class FrozenNetwork:
    """The model as an attack sees it: images to logits, no gradient to parameters.

    Attributes:
        folded: Whether this is a private folded copy.
        exact: The same network in full precision, for checking what bfloat16 found.
        original: The model itself, for checking what stands on the very boundary of a class.
        workers: How many threads may each search a part of the batch on its own.
        deterministic: Whether it is known to give the same logits each time.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], folded: bool, low_precision: bool = False
    ) -> None:
        self._forward = forward
        self.folded = folded
        self.low_precision = low_precision
        self.exact: FrozenNetwork = self
        self.original: Callable[[Tensor], Tensor] = forward
        self.workers = 1
        self.deterministic = False

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) in the precision of the images."""
        if not self.low_precision:
            return self._forward(images)
        if self.folded:
            return self._forward(images.to(torch.bfloat16)).to(images.dtype)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            return self._forward(images).to(images.dtype)


@contextmanager
def untouched(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Run with every submodule in eval mode and parameters frozen; then put all back as it was.

    Restored are the training flag of each submodule, each ``requires_grad``, each buffer that changed and
    the state of the random generators; also when the block is interrupted.

    Args:
        model: Any module, also a compiled one.
        seed: Seeds the global generators inside the block, so that a random model gives the same again.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    places = [(module, dict(module._buffers)) for module in model.modules()]
    devices = _cuda_devices(model)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if seed is not None:
            _seed_generators(seed, devices)
        try:
            with frozen_module(model):
                yield
        finally:
            for module, own in places:
                # A forward pass may have put new tensors in place of its buffers.
                module._buffers.update(own)
            with torch.no_grad():
                # Values are compared: batch norm updates its statistics without a trace in _version.
                changed = [(buffer != before).any() for buffer, before in buffers]
                if changed and bool(
                    torch.stack([flag.to(changed[0].device) for flag in changed]).any()
                ):
                    for buffer, before in buffers:
                        buffer.copy_(before)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    tensors = (*model.parameters(), *model.buffers())
    return sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=str)


def _seed_generators(seed: int, devices: list[torch.device]) -> None:
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def frozen(
    model: nn.Module, images: Tensor, engine: Engine, *, seed: int = 0, check: bool = True
) -> Iterator[FrozenNetwork]:
    """The network for an attack on ``images``; the model is left untouched.

    Args:
        model: Images to logits.
        images: (B, C, H, W), the batch that will be attacked.
        engine: How to run the model.
        seed: Seeds models that are random.
        check: Whether to compare the folded copy with the model on a few images; always done after tracing.

    Raises:
        InputError: The model does not take such images, or gives no (B, K) logits.
    """
    core = unwrapped(model)
    if not images.is_cuda:
        keep_freed_memory()
    threads = engine.threads or torch.get_num_threads()
    with untouched(model, seed), own_threads(engine.threads or suitable_threads(core, images)):
        template = _folded(core, images, check) if engine.fold else None
        if template is None:
            probe(model, images[:1])
            full = FrozenNetwork(model, folded=False)
        else:
            full = FrozenNetwork(template.network(compiled=engine.compile), folded=True)
        half = None
        if engine.precision == "bf16" and template is not None:
            half = template.half(images[:1], compiled=engine.compile)
        # Again: what was tried out above, at the first attack only, may have drawn random numbers.
        _seed_generators(seed, _cuda_devices(model))
        # The user's own module may hold state that two threads would fight over; a folded copy holds none.
        workers = 1 if template is None else suitable_workers(core, images, threads)
        full.workers = workers
        full.deterministic = template is not None and template.deterministic
        full.original = _one_at_a_time(model)
        if engine.precision == "32" or images.dtype == torch.float64:
            yield full
            return
        network = FrozenNetwork(
            model if half is None else half, folded=half is not None, low_precision=True
        )
        network.exact, network.workers, network.original = full, workers, full.original
        network.deterministic = full.deterministic
        yield network


def _one_at_a_time(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model, never called by two threads at once: it may hold state of its own."""
    lock = threading.Lock()

    def call(images: Tensor) -> Tensor:
        with lock:
            logits: Tensor = model(images)
            return logits

    return call


def probe(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits (B, K) of a few images, with an error that explains where the model refuses them.

    Raises:
        InputError: The model does not take such images, or gives no (B, K) logits.
    """
    try:
        with torch.no_grad():
            logits = model(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape, place = tuple(images.shape[1:]), f"{images.dtype} on {images.device}"
        raise InputError(
            f"images: the model does not take images of shape {shape}, {place}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model: expected logits (B, K), found {found}.")
    return logits


def unwrapped(model: nn.Module, *, compiled: bool = True) -> nn.Module:
    """The module inside the wrappers of Fabric and DistributedDataParallel.

    Args:
        model: Any module.
        compiled: Whether to look inside torch.compile's wrapper too.
    """
    names = ("_original_module", "_orig_mod") if compiled else ("_original_module",)
    inner = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = model.module
    return unwrapped(inner, compiled=compiled) if isinstance(inner, nn.Module) else model


def _folded(model: nn.Module, images: Tensor, check: bool) -> folding.Template | None:
    """The refreshed private copy, or None where there is none or it does not agree with the model."""
    template, fresh = folding.template_of(model)
    if template is None:
        return None
    graph = template.refresh(model)
    if not (check or fresh):
        return template
    if _agree(model, graph, images[:_PROBES], gradients=fresh):
        return template
    logger.info("%s is attacked unfolded: its copy does not agree with it", type(model).__name__)
    folding.forget(model)
    return None


def _agree(
    model: nn.Module, graph: Callable[[Tensor], Tensor], images: Tensor, gradients: bool
) -> bool:
    """Whether the copy gives the model's logits, and, if asked, the gradient to the images that the model gives.

    A trace sees what is computed, not how its gradient is: a function with a gradient of its own, or a part that
    has none, would be lost in the copy.
    """
    with torch.no_grad(), full_float32():
        expected = probe(model, images)
    if not bool(expected.isfinite().all()):
        return True
    try:
        with torch.no_grad(), full_float32():
            error = (graph(images) - expected).abs().amax()
            close = bool(error <= 1e-4 * expected.abs().amax().clamp(min=1.0))
        if not close or not gradients:
            return close
        found, wanted = _gradient(graph, images), _gradient(model, images)
        # Far above what rounding does, which now and then turns a ReLU, and far below another gradient.
        return bool((found - wanted).norm() <= 0.05 * wanted.norm())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False


def _gradient(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Of a sum of the logits, weighted so that no symmetry hides a difference."""
    with torch.enable_grad(), full_float32():
        leaf = images.detach().clone().requires_grad_()
        logits = network(leaf)
        weights = torch.arange(1, logits.numel() + 1, device=logits.device).sin().view_as(logits)
        if not logits.requires_grad:
            return torch.zeros_like(images)
        found = torch.autograd.grad((logits * weights).sum(), leaf, allow_unused=True)[0]
    return torch.zeros_like(images) if found is None else found
