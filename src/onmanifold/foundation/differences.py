"""Where two pieces of plain data differ: for messages about what belongs to another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_difference(found: Any, wanted: Any, place: str = "") -> tuple[str, Any, Any]:
    """The path of the first difference, in the order of what is wanted, and the two values there.

    >>> first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ('b.c', 2, 3)
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in {**wanted, **found}:
            before, after = found.get(key, "absent"), wanted.get(key, "absent")
            if before != after:
                return first_difference(before, after, f"{place}.{key}" if place else key)
    return place, found, wanted
