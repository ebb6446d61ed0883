"""Attacks that a model was not trained against: their calibrated strengths, DMAT's, and the UAR score.

The strengths are those of Kang et al. 2019 (arXiv:1908.08016, "Testing robustness against unforeseen
adversaries") and of DMAT (Lin et al. 2020), kept here in the units they were published in and converted when
an attack is made; `_threat` is the only place that converts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from onmanifold.attacks import PGD, Attack
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import nearest
from onmanifold.threats import JPEG, Elastic, Fog, Gabor, ImageBall, Snow, Threat
from onmanifold.threats.geometry import Norm

ImageShape = tuple[int, int, int]


class Calibration(NamedTuple):
    """Strengths of one attack on one dataset, weakest first.

    Attributes:
        radii: In the published units.
        accuracies: ATA, in percent: the best accuracy that adversarial training against exactly this
            attack at this strength reached; () where it was not measured.
    """

    radii: tuple[float, ...]
    accuracies: tuple[float, ...] = ()


class Preset(NamedTuple):
    """Strengths of several attacks, for images of one shape.

    Attributes:
        reference: (C, H, W) that the strengths were published for.
        calibrations: By the attack's name.
    """

    reference: ImageShape
    calibrations: Mapping[str, Calibration]


# Kang et al. 2019, ImageNet-100 at 224 pixels.
IMAGENET100 = Preset(
    (3, 224, 224),
    {
        "Linf": Calibration((1, 2, 4, 8, 16, 32), (84.6, 82.1, 76.2, 66.9, 40.1, 12.9)),
        "L2": Calibration((150, 300, 600, 1200, 2400, 4800), (85.0, 83.5, 79.6, 72.6, 59.1, 19.9)),
        "L1": Calibration(
            (0.063526, 0.127053, 0.508211, 1.016422, 2.032844, 4.065689),
            (84.4, 82.7, 76.3, 68.9, 56.4, 36.1),
        ),
        "JPEG-Linf": Calibration(
            (0.0625, 0.125, 0.25, 0.5, 1, 2), (85.0, 83.2, 79.3, 72.8, 34.8, 1.1)
        ),
        "JPEG-L2": Calibration((8, 16, 32, 64, 128, 256), (84.8, 82.5, 78.9, 72.3, 47.5, 3.4)),
        "JPEG-L1": Calibration(
            (256, 1024, 4096, 16384, 65536, 131072), (84.8, 81.8, 76.2, 67.1, 46.4, 41.8)
        ),
        "Elastic": Calibration((0.25, 0.5, 2, 4, 8, 16), (85.9, 83.2, 78.1, 75.6, 57.0, 22.5)),
        "Fog": Calibration((128, 256, 512, 2048, 4096, 8192), (85.8, 83.8, 79.0, 68.4, 67.9, 64.7)),
        "Gabor": Calibration(
            (6.25, 12.5, 25, 400, 800, 1600), (84.0, 79.8, 79.8, 66.2, 44.7, 14.6)
        ),
        "Snow": Calibration((0.0625, 0.125, 0.25, 2, 4, 8), (84.0, 81.1, 77.7, 65.6, 59.5, 41.2)),
    },
)
# The same on CIFAR-10, where fog, snow and Gabor noise were not calibrated.
CIFAR10 = Preset(
    (3, 32, 32),
    {
        "Linf": Calibration((1, 2, 4, 8, 16, 32), (91.0, 87.8, 81.6, 71.3, 46.5, 23.1)),
        "L2": Calibration((40, 80, 160, 320, 640, 2560), (90.1, 86.4, 79.6, 67.3, 49.9, 17.3)),
        "L1": Calibration(
            (0.0634766, 0.1269531, 0.2539063, 0.5078125, 2.03125, 8.125),
            (92.2, 90.0, 83.2, 73.8, 47.4, 35.3),
        ),
        "JPEG-Linf": Calibration(
            (0.03125, 0.0625, 0.125, 0.25, 0.5, 1), (89.7, 87.0, 83.1, 78.6, 69.7, 35.4)
        ),
        "JPEG-L2": Calibration((0.25, 0.5, 1, 2, 4, 8), (92.2, 91.0, 88.4, 85.8, 81.3, 72.0)),
        "JPEG-L1": Calibration((2, 8, 64, 256, 512, 1024), (91.4, 88.1, 80.2, 68.9, 56.3, 37.7)),
        "Elastic": Calibration((0.125, 0.25, 0.5, 1, 2, 8), (87.4, 81.3, 72.1, 58.2, 45.4, 27.8)),
    },
)
_DMAT_ATTACKS = ("Fog", "Snow", "Gabor", "Elastic", "JPEG-L1", "L2", "L1")


def _single(reference: ImageShape, strengths: tuple[float, ...]) -> Preset:
    """DMAT's attacks at one strength each, in the order of their names above."""
    pairs = zip(_DMAT_ATTACKS, strengths, strict=True)
    return Preset(reference, {name: Calibration((strength,)) for name, strength in pairs})


# DMAT's evaluation, 256 pixels, as in its released code. Its images are in [-1, 1] and its L2 radius there is
# 1200/255: 600 in the units of [0, 255].
DMAT = _single((3, 256, 256), (128, 0.0625, 12.5, 0.5, 1024, 600, 0.508211))
# The same attacks for images of up to 64 pixels, chosen here so that a normally trained network falls below 15 %
# while people still recognise the images (docs/concepts/unseen.md). Where an attack is calibrated on CIFAR-10,
# its strength in colour is of the level that DMAT's has on ImageNet-100; for L1, which is too weak there, it is
# DMAT's own mean per value. Grey images have high contrast and need more.
DMAT_COLOUR = _single((3, 32, 32), (128, 0.25, 12.5, 0.25, 8, 160, 0.508211))
DMAT_GREY = _single((1, 28, 28), (128, 0.25, 40, 0.5, 32, 255, 2.03125))
_SMALL = 64

_PRESETS = {"cifar10": CIFAR10, "imagenet100": IMAGENET100}
_CHOICES = (*_PRESETS, "dmat")


def unseen_attacks(
    preset: str, image_shape: ImageShape, steps: int = 200, **options: Any
) -> dict[str, Attack]:
    """The unforeseen attacks at published strengths: PGD with step ε / √steps, from random starts.

    ε is the radius of the ball that the variable lives in: the strength itself, but 1 for fog, snow and Gabor
    noise. The original moves these three by fixed small steps, which found less here.

    Strengths that grow with the size of an image are carried over from the images they were published for:
    an L1 radius with the number of values (C·H·W) or coefficients, an L2 radius with its square root, a
    displacement with the side. The rest stay.

    Args:
        preset: "cifar10" or "imagenet100": six levels of each attack calibrated there, by names such as
            "Elastic level 3", for `uar`; "dmat": one strength of each of Fog, Snow, Gabor, Elastic, JPEG-L1,
            L2 and L1, as in DMAT for images of more than 64 pixels, chosen to fit for smaller ones.
        image_shape: (C, H, W) of the images that will be attacked.
        steps: Of each attack, N.
        options: Further fields of `PGD`, such as ``restarts``.

    Raises:
        InputError: Unknown preset, or an image shape of other than three positive numbers.

    >>> sorted(unseen_attacks("dmat", (3, 32, 32), steps=50))
    ['Elastic', 'Fog', 'Gabor', 'JPEG-L1', 'L1', 'L2', 'Snow']
    >>> unseen_attacks("cifar10", (3, 32, 32))["Linf level 4"].threat.radius * 255
    8.0
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(f"image_shape: expected (C, H, W), found {tuple(image_shape)}.")
    chosen = _dmat(image_shape) if preset == "dmat" else _preset(preset)
    attacks: dict[str, Attack] = {}
    for kind, calibration in chosen.calibrations.items():
        for level, strength in enumerate(calibration.radii, start=1):
            name = kind if len(calibration.radii) == 1 else f"{kind} level {level}"
            threat, limit = _threat(kind, strength, image_shape, chosen.reference)
            attacks[name] = PGD(threat, steps=steps, step_size=limit / math.sqrt(steps), **options)
    return attacks


def _preset(name: str) -> Preset:
    if name not in _PRESETS:
        raise InputError(f"preset: unknown {name!r}.{nearest(str(name), _CHOICES)}")
    return _PRESETS[name]


def _dmat(shape: ImageShape) -> Preset:
    if max(shape[1:]) > _SMALL:
        return DMAT
    return DMAT_GREY if shape[0] == 1 else DMAT_COLOUR


def _threat(
    kind: str, strength: float, shape: ImageShape, reference: ImageShape
) -> tuple[Threat, float]:
    """The threat model of a published strength on [0, 1] images of ``shape``; the radius of its variable."""
    values = math.prod(shape) / math.prod(reference)
    area = shape[1] * shape[2] / (reference[1] * reference[2])
    # Both planes of chroma have half as many coefficients as luma.
    planes = {1: 1.0, 3: 1.5}
    coefficients = area * planes.get(shape[0], 1.0) / planes[reference[0]]
    radius = {
        "Linf": strength / 255,
        "L2": strength / 255 * math.sqrt(values),
        # Published as the mean over all values, in [0, 255].
        "L1": strength / 255 * math.prod(shape),
        "JPEG-Linf": strength,
        "JPEG-L2": strength * math.sqrt(coefficients),
        "JPEG-L1": strength * coefficients,
        "Elastic": strength * math.sqrt(area),
        "Fog": strength / 255,
        "Gabor": strength / 255,
        "Snow": strength,
    }[kind]
    if kind in ("Fog", "Gabor", "Snow"):
        drawn: dict[str, type[Fog | Gabor | Snow]] = {"Fog": Fog, "Gabor": Gabor, "Snow": Snow}
        return drawn[kind](radius), 1.0
    if kind == "Elastic":
        return Elastic(radius), radius
    family, _, name = kind.rpartition("-")
    norm = cast(Norm, name.lower())
    return (JPEG(norm, radius) if family else ImageBall(norm, radius)), radius


def uar(accuracies: Sequence[float], attack: str, preset: str) -> float:
    """Unforeseen adversarial robustness: 100 · Σ accuracy / Σ ATA over the six calibrated strengths.

    100 means: as robust as networks that were trained against this attack at each strength.

    Args:
        accuracies: Six accuracies in [0, 1] under the attack, weakest level first, as
            `Evaluation.accuracy` gives them.
        attack: "Linf", "L2", "L1", "JPEG-Linf", "JPEG-L2", "JPEG-L1" or "Elastic"; with "imagenet100"
            also "Fog", "Gabor" or "Snow".
        preset: "cifar10" or "imagenet100".

    Raises:
        InputError: Unknown attack or preset, another number of accuracies, or one outside [0, 1].

    >>> round(uar([0.5] * 6, "Linf", "cifar10"), 2)
    74.76
    """
    calibrations = _preset(preset).calibrations if preset != "dmat" else {}
    if not calibrations:
        raise InputError("preset: 'dmat' has no calibration; expected 'cifar10' or 'imagenet100'.")
    if attack not in calibrations:
        raise InputError(f"attack: unknown {attack!r}.{nearest(str(attack), calibrations)}")
    reference = calibrations[attack].accuracies
    if len(accuracies) != len(reference):
        raise InputError(
            f"accuracies: expected {len(reference)}, one per level, found {len(accuracies)}."
        )
    if not all(0 <= accuracy <= 1 for accuracy in accuracies):
        raise InputError(f"accuracies: expected numbers in [0, 1], found {list(accuracies)}.")
    return 100 * sum(100 * accuracy for accuracy in accuracies) / sum(reference)
