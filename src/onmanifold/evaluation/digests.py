"""Digests of models and of any other Python value that are the same in every process: no addresses in them."""

from __future__ import annotations

import argparse
import dataclasses
import dis
import enum
import functools
import hashlib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Their repr is all that they are.
_PLAIN = (bool, int, float, complex, str, bytes, range, slice, torch.dtype)
# Of the objects of torch and the standard library, those that are plain values; the others are locks, handles,
# files, random generators, compilers: their state is that of a process.
_OPEN = (types.SimpleNamespace, argparse.Namespace, torch.distributions.Distribution)
# Weight norm, spectral norm and pruning keep the weight itself as an attribute, made anew at each forward pass.
_SOURCES = ("_orig", "_g")


class Digests:
    """Digests of values, each computed once.

    Models by their structure, their weights and buffers and the settings of all their modules; numbers, texts,
    tensors, arrays; functions by their code and what they refer to; containers, dicts and sets whatever their
    order; objects by their public attributes. Of anything else, such as a lock, only the type counts.
    """

    def __init__(self) -> None:
        # With the objects themselves, so that none is freed and its id given to another one.
        self._known: dict[int, tuple[object, str]] = {}

    def of(self, value: Any) -> str:
        """A short text that stands for the value."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            return repr(value)
        if id(value) not in self._known:
            # Met again inside itself, it stands for a way back.
            self._known[id(value)] = value, "..."
            self._known[id(value)] = value, self._made(value)
        return self._known[id(value)][1]

    def _of_model(self, model: nn.Module) -> str:
        digest = hashlib.blake2b(digest_size=16)
        # Functions print with their address, which differs from process to process.
        digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)).encode())
        for name, module in model.named_modules():
            for key, value in _settings(module):
                text = f"{name} {type(module).__qualname__} {key}={self.of(value)}\n"
                digest.update(text.encode())
        values = {**dict(model.named_buffers()), **model.state_dict()}
        for name, value in sorted(values.items(), key=lambda item: item[0]):
            digest.update(f"{name} {self.of(value)}\n".encode())
        return digest.hexdigest()

    def _made(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return _tensor_digest(value)
        if isinstance(value, nn.Module):
            return self._of_model(value)
        if isinstance(value, type):
            return value.__qualname__
        fingerprint = getattr(value, "fingerprint", None)
        if isinstance(fingerprint, str):
            return fingerprint
        name = getattr(value, "__qualname__", None)
        name = name if isinstance(name, str) else type(value).__qualname__
        text = ", ".join(self._parts(value))
        return f"{name} {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"

    def _parts(self, value: Any) -> list[str]:
        """What a value consists of."""
        inner: list[Any]
        match value:
            case np.ndarray() | np.generic():
                content = value.tolist() if value.dtype.hasobject else value.tobytes()
                inner = [str(value.dtype), value.shape, content]
            case list() | tuple():
                inner = list(value)
            case set() | frozenset():
                return sorted(self.of(item) for item in value)
            case dict() | types.MappingProxyType():
                return self._pairs(value)
            case functools.partial():
                inner = [value.func, value.args, value.keywords]
            case types.MethodType():
                inner = [value.__func__, value.__self__]
            case types.FunctionType():
                return self._of_function(value)
            case types.CodeType():
                inner = [value.co_code, value.co_names, value.co_consts]
            case _:
                return self._of_object(value)
        return [self.of(item) for item in inner]

    def _pairs(self, values: Mapping[Any, Any]) -> list[str]:
        return sorted(f"{self.of(key)}={self.of(value)}" for key, value in values.items())

    def _of_function(self, function: types.FunctionType) -> list[str]:
        """Its code, its defaults, and the values of the names from outside that it uses."""
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            return [self.of(compiled)]
        if _of_library(function.__module__):
            return [function.__module__]
        names = set(_global_names(function.__code__)) & set(function.__globals__)
        used = {name: function.__globals__[name] for name in names}
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        used |= {name: cell.cell_contents for name, cell in cells if not _empty(cell)}
        inner = [function.__code__, function.__defaults__, function.__kwdefaults__]
        return [*(self.of(item) for item in inner), *self._pairs(used)]

    def _of_object(self, value: object) -> list[str]:
        own = getattr(value, "__dict__", {})
        if "__wrapped__" in own:
            # A function with a cache around it.
            return [self.of(own["__wrapped__"])]
        if _of_library(type(value).__module__) and not isinstance(value, _OPEN):
            return []
        if dataclasses.is_dataclass(value):
            # Those with slots have no dictionary.
            own = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return self._pairs(_public(own))


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """The public attributes of a module itself, sorted; its weights and submodules are private ones."""
    return sorted(
        (key, value)
        for key, value in _public(vars(module)).items()
        if key != "training"
        and not (
            isinstance(value, Tensor)
            and any(key + source in module._parameters for source in _SOURCES)
        )
    )


def _public(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if not key.startswith("_")}


def _of_library(module: str | None) -> bool:
    root = (module or "").partition(".")[0]
    return root == "torch" or root in sys.stdlib_module_names


def _global_names(code: types.CodeType) -> Iterator[str]:
    """The global names that a function uses, and those of the functions written inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _empty(cell: types.CellType) -> bool:
    """Whether a variable of the enclosing function has no value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _tensor_digest(tensor: Tensor) -> str:
    """Of dtype, shape and values, whatever the device and the memory format."""
    plain = tensor.detach().cpu().contiguous()
    values = plain.flatten().view(torch.uint8).numpy().data
    digest = hashlib.blake2b(values, digest_size=16).hexdigest()
    return f"{plain.dtype} {tuple(plain.shape)} {digest}"
