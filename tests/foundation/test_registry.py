from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Literal

import pytest
import torch

import onmanifold as om
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import (
    ATTACKS,
    METHODS,
    THREATS,
    Component,
    Context,
    Registry,
    describe,
)

SHAPES: Registry[object] = Registry("shape")


class Shape(Component):
    registry = SHAPES


@SHAPES.register("disc")
@dataclass(frozen=True)
class Disc(Shape):
    radius: float = 1.0
    colour: Literal["red", "blue"] = "red"

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise InputError(f"radius: expected a number >= 0, found {self.radius}.")


@SHAPES.register("frame")
@dataclass(frozen=True)
class Frame(Shape):
    inner: Shape
    corners: tuple[int, ...] = ()
    width: float = 2.0


@SHAPES.register("made")
def make(size: int, colour: str = "red") -> Disc:
    return Disc(radius=size, colour=colour)


def test_names_are_sorted_and_get_gives_the_class():
    assert SHAPES.names() == ["disc", "frame", "made"]
    assert SHAPES.get("disc") is Disc


def test_build_from_a_name_a_mapping_and_an_object():
    assert SHAPES.build("disc") == Disc()
    assert SHAPES.build({"type": "disc", "radius": 3}) == Disc(radius=3.0)
    ready = Disc(radius=2)
    assert SHAPES.build(ready) is ready


def test_build_nested():
    spec = {"type": "frame", "inner": {"type": "disc", "radius": 3}, "corners": [1, 2]}
    assert SHAPES.build(spec) == Frame(inner=Disc(radius=3.0), corners=(1, 2))
    assert SHAPES.build({"type": "frame", "inner": "disc"}) == Frame(inner=Disc())


def test_a_function_is_built_with_checked_arguments():
    assert SHAPES.build({"type": "made", "size": 4, "colour": "blue"}) == Disc(4, "blue")
    with pytest.raises(ConfigError, match=r"made.*'size' is missing"):
        SHAPES.build("made")
    with pytest.raises(ConfigError, match=r"made.*size.*'big'"):
        SHAPES.build({"type": "made", "size": "big"})


def test_context_names_are_found_also_inside():
    small = Disc(radius=0.1)
    context = Context(named={"shape": {"small": small}})
    assert SHAPES.build("small", context) is small
    assert SHAPES.build({"type": "frame", "inner": "small"}, context) == Frame(inner=small)
    with pytest.raises(ConfigError, match=r"Unknown shape 'smal'\. Did you mean 'small'\?"):
        SHAPES.build("smal", context)


def test_context_defaults_fill_only_fields_that_exist_and_are_left_out():
    context = Context(defaults={"radius": 7.0, "width": 9.0})
    assert SHAPES.build("disc", context) == Disc(radius=7.0)
    assert SHAPES.build({"type": "disc", "radius": 1}, context) == Disc(radius=1.0)


def test_context_defaults_reach_nested_components():
    context = Context(defaults={"radius": 7.0})
    spec = {"type": "frame", "inner": {"type": "disc", "colour": "blue"}}
    assert SHAPES.build(spec, context) == Frame(inner=Disc(7.0, "blue"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dics", r"Unknown shape 'dics'\. Did you mean 'disc'\? Valid: disc, frame, made\."),
        ({"type": "dics"}, r"Unknown shape 'dics'\. Did you mean 'disc'\?"),
        ("xyz", r"Unknown shape 'xyz'\. Valid: disc, frame, made\."),
        ({"radius": 1}, r"needs the key 'type', found only radius"),
        ({}, r"needs the key 'type'"),
        (None, r"expected the shape's name or a mapping with the key 'type', found None"),
        (7, r"name or a mapping with the key 'type', found 7"),
        (["disc"], r"name or a mapping with the key 'type', found \['disc'\]"),
        (
            {"type": "disc", "radus": 1},
            r"shape 'disc': unknown key 'radus'\. Did you mean 'radius'\? Valid: colour, radius\.",
        ),
        ({"type": "disc", "radius": "wide"}, r"shape 'disc': radius: .*found 'wide' \(str\)"),
        ({"type": "disc", "colour": "green"}, r"shape 'disc': colour: .*'red' or 'blue'.*'green'"),
        (
            {"type": "disc", "radius": -1},
            r"shape 'disc': radius: expected a number >= 0, found -1",
        ),
        ({"type": "frame"}, r"shape 'frame': the key 'inner' is missing"),
        ({"type": "frame", "inner": "dics"}, r"shape 'frame': inner: Unknown shape 'dics'.*'disc'"),
        (
            {"type": "frame", "inner": 3},
            r"shape 'frame': inner: expected the shape's name or a mapping.*found 3",
        ),
        (
            {"type": "frame", "inner": {"type": "disc", "radus": 1}},
            r"inner: shape 'disc': unknown key 'radus'\. Did you mean 'radius'\?",
        ),
    ],
)
def test_wrong_specifications_are_explained(spec, message):
    with pytest.raises(ConfigError, match=message):
        SHAPES.build(spec)


def test_a_name_is_registered_once():
    with pytest.raises(ConfigError, match="shape 'disc' is registered twice"):
        SHAPES.register("disc")(Frame)
    SHAPES.register("disc")(Disc)  # a module that is imported again is no second component
    assert SHAPES.get("disc") is Disc
    assert Frame.registered_name == "frame"


def test_components_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Disc().radius = 2


def test_describe_builds_the_same_again():
    frame = Frame(inner=Disc(radius=0.25, colour="blue"), corners=(1, 2))
    plain = describe(frame)
    assert plain == {
        "type": "frame",
        "inner": {"type": "disc", "radius": 0.25, "colour": "blue"},
        "corners": [1, 2],
        "width": 2.0,
    }
    assert SHAPES.build(plain) == frame


def test_describe_tensors_mappings_and_fingerprints():
    class Marked:
        fingerprint = "abc"

    assert describe({"a": torch.tensor([1.0, 2.0]), "b": (None, True, "x", Marked())}) == {
        "a": [1.0, 2.0],
        "b": [None, True, "x", {"fingerprint": "abc"}],
    }
    with pytest.raises(ConfigError, match="object cannot be described"):
        describe(object())


def test_the_attacks_and_threats_of_the_field_are_registered():
    import onmanifold.attacks
    import onmanifold.threats
    import onmanifold.training.methods  # noqa: F401

    assert {"image_ball", "latent_ball", "joint_ball", "transformation_ball"} <= set(
        THREATS.names()
    )
    assert {"fgsm", "pgd", "mia", "adam", "random"} <= set(ATTACKS.names())
    assert {"normal", "adversarial", "random_perturbation"} <= set(METHODS.names())


def test_an_attack_from_an_experiment_file():
    from onmanifold import PGD, ImageBall, Margin

    spec = {
        "type": "pgd",
        "threat": {"type": "image_ball", "norm": "l2", "radius": 0.5},
        "steps": 5,
        "objective": "margin",
    }
    attack = ATTACKS.build(spec)
    assert attack == PGD(ImageBall("l2", 0.5), steps=5, objective=Margin())
    assert ATTACKS.build(describe(attack)) == attack
    context = Context(named={"threat": {"image": ImageBall("linf", 0.1)}})
    named = ATTACKS.build({"type": "pgd", "threat": "image"}, context)
    assert math.isclose(named.threat.radius, 0.1)
    with pytest.raises(ConfigError, match=r"attack 'pgd': unknown key 'step'.*'steps'"):
        ATTACKS.build({"type": "pgd", "threat": "image", "step": 5}, context)


def test_a_subclass_is_described_as_another_component():
    # Results are kept under the description: what shares it shares its results.
    class Weak(om.PGD):
        """PGD that goes nowhere."""

    ball = om.ImageBall()
    assert describe(Weak(ball)) != describe(om.PGD(ball))
    assert describe(om.PGD(ball))["type"] == "pgd"
    assert "type" not in describe(om.Engine())
