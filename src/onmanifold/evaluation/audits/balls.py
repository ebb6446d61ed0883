"""Other sizes of a threat model, its name, and random points in it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from onmanifold.evaluation.audits.subject import Subject
from onmanifold.threats import JointBall, Threat, Variables
from onmanifold.threats.base import Region


def draw(region: Region, part: Subject, restart: int, share: float = 1.0) -> Variables:
    """Random points at a share of the radius."""
    points = region.random("surface", part.seed, part.indices, restart)
    return region.project({name: share * tensor for name, tensor in points.items()})


def scaled(threat: Threat, factor: float) -> Threat | None:
    """The threat model with all its radii multiplied; None where it has none."""
    if factor == 1:
        return threat
    if isinstance(threat, JointBall):
        larger: dict[str, Any] = {
            "image": scaled(threat.image, factor),
            "latent": scaled(threat.latent, factor),
        }
        return replace(threat, **larger)
    if not is_dataclass(threat) or "radius" not in {part.name for part in fields(threat)}:
        return None
    changes: dict[str, Any] = {"radius": threat.radius * factor}
    return replace(threat, **changes)


def label_of(threat: Threat) -> str:
    """A short name: the kind, the norm and the radius.

    >>> from onmanifold.threats import ImageBall
    >>> label_of(ImageBall("linf", 0.1))
    'image ball linf 0.1'
    """
    if isinstance(threat, JointBall):
        return f"{label_of(threat.image)} + {label_of(threat.latent)}"
    name = (type(threat).registered_name or type(threat).__name__).replace("_", " ")
    radius = getattr(threat, "radius", None)
    number = f"{radius:.4g}" if isinstance(radius, int | float) else ""
    return " ".join(part for part in (name, getattr(threat, "norm", ""), number) if part)
