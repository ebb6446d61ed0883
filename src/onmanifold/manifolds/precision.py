"""A network in the precision of what it is given."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def in_precision(module: M, dtype: torch.dtype) -> M:
    """The module, whose parameters all have one dtype: itself where that is ``dtype``, else a copy in it."""
    if next(module.parameters()).dtype == dtype:
        return module
    return copy.deepcopy(module).to(dtype)
