"""A digest of what a module's weights and its repr do not show: numbers, switches, and functions."""

from __future__ import annotations

import functools
import hashlib
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from onmanifold.evaluation.shards import array_digest


def settings_digest(module: nn.Module) -> str:
    """A digest of the settings of a module and all inside: numbers, switches, functions with what they close over.

    Two models of the same weights may differ in these alone, as by the strength of a purification.
    """
    parts = [
        f"{name} {type(inner).__qualname__} {key}={_token(value)}"
        for name, inner in module.named_modules()
        for key, value in sorted(vars(inner).items())
        if not key.startswith("_") and key != "training"
    ]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=6).hexdigest()


def _token(value: Any, depth: int = 4) -> str:
    """A text that stands for a value in every process: no addresses in it."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, Tensor):
        return array_digest(value)
    if hasattr(value, "fingerprint"):
        return str(value.fingerprint)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if depth == 0 or isinstance(value, nn.Module | type):
        return str(name)
    inner: list[Any] = []
    if isinstance(value, list | tuple):
        inner = list(value)
    elif isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, functools.partial):
        inner = [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        inner = [value.__func__, value.__self__]
    elif isinstance(value, FunctionType):
        code, cells = value.__code__, value.__closure__ or ()
        inner = [code.co_code, code.co_consts, code.co_names, value.__defaults__]
        inner += [cell.cell_contents for cell in cells]
    elif hasattr(value, "__dict__"):
        inner = sorted(vars(value).items())
    return f"{name}({', '.join(_token(item, depth - 1) for item in inner)})"
