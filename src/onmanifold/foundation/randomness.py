"""Randomness per sample: a number depends on (seed, stream, sample index, position) and nothing else.

Not on the batch size, the order of the samples, the number of processes, the device or the dtype. The
generator is counter-based: the position is mixed with the sample's key by the finaliser of SplitMix64
(Steele, Lea and Flood 2014), the upper 24 bits make the number, so that float32 and float64 receive the
same one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` read as a signed integer, as torch stores it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_SECOND)
    return bits ^ _shift_right(bits, 31)


def _stream_key(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{int(seed)}/{stream}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def _bits(seed: int, indices: Tensor, shape: Sequence[int], stream: str) -> Tensor:
    indices = indices.to(torch.int64)
    keys = _mix((indices + 1) * _signed(_GOLDEN) ^ _stream_key(seed, stream))
    count = math.prod(shape)
    positions = torch.arange(1, count + 1, device=indices.device) * _signed(_GOLDEN)
    return _mix(keys.unsqueeze(1) + positions).view(len(indices), *shape)


def uniform(
    seed: int,
    indices: Tensor,
    shape: Sequence[int] = (),
    *,
    stream: str = "",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1), a row per sample.

    Args:
        seed: Any integer.
        indices: (B,) int64 sample indices; the result is on their device.
        shape: Shape of one sample's numbers.
        stream: Names the purpose, so that two purposes never share numbers.
        dtype: float32 or float64; the values are the same.

    Returns:
        (B, *shape) numbers, multiples of 2**-24.

    >>> import torch
    >>> one = uniform(0, torch.tensor([5]), (3,))
    >>> torch.equal(uniform(0, torch.tensor([7, 5]), (3,))[1:], one)
    True
    """
    return _shift_right(_bits(seed, indices, shape, stream), 40).to(dtype) * 2.0**-24


def normal(
    seed: int,
    indices: Tensor,
    shape: Sequence[int] = (),
    *,
    stream: str = "",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers, a row per sample; arguments as for `uniform`."""
    centred = (_shift_right(_bits(seed, indices, shape, stream), 40).double() + 0.5) * 2.0**-24
    return (math.sqrt(2.0) * torch.erfinv(2.0 * centred - 1.0)).to(dtype)


def integers(
    seed: int, indices: Tensor, high: int, shape: Sequence[int] = (), *, stream: str = ""
) -> Tensor:
    """Integers in [0, high), a row per sample, int64. ``high`` is far below 2**24."""
    return (uniform(seed, indices, shape, stream=stream, dtype=torch.float64) * high).long()


def permutation(seed: int, count: int, *, stream: str = "") -> Tensor:
    """A random order of ``count`` items, int64 (count,), on the CPU."""
    keys = _bits(seed, torch.arange(count), (), stream)
    return torch.argsort(keys, stable=True)
