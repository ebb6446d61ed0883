"""The layers inside a classifier, whose outputs a method may change in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onmanifold.foundation.errors import ConfigError


def parts(classifier: nn.Module) -> dict[str, nn.Module]:
    """The direct parts of a classifier before its last, by name, in order: of its body, or its own children."""
    body = getattr(classifier, "body", None)
    if isinstance(body, nn.Module):
        return {f"body.{name}": part for name, part in body.named_children()}
    return dict(list(classifier.named_children())[:-1])


@contextmanager
def changed_outputs(
    classifier: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Inside the block, the outputs of some submodules are replaced by what a function makes of them.

    A compiled classifier runs uncompiled inside the block: what torch.compile has made of it before, in a pass
    without changes, would be run as if there were none.

    Args:
        classifier: Whose submodules they are.
        changes: Of each output (B, ...) another of the same shape, by the name of the submodule.

    Raises:
        ConfigError: There is no such submodule, or its output is no tensor.
    """
    modules = dict(classifier.named_modules())
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, change in changes.items():
            if name not in modules:
                raise ConfigError(f"layers: {type(classifier).__name__} has no submodule {name!r}.")
            handle = modules[name].register_forward_hook(_hook(name, change))
            stack.callback(handle.remove)
        yield


def _hook(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, given: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ConfigError(f"layers: {name!r} gives no tensor, which could be changed.")
        return change(output)

    return hook
