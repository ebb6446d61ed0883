"""Bad input gives one clear error that names the argument, what was found and what was expected."""

import dataclasses

import pytest
import torch
from torch import nn

from onmanifold.attacks import FGSM, MIA, PGD, ProjectedAdam, RandomPerturbation
from onmanifold.foundation.errors import ConfigError, InputError, OnManifoldError
from onmanifold.foundation.registry import ATTACKS, FITS, METHODS, OBJECTIVES, THREATS, Context
from onmanifold.objectives import DLR, KullbackLeibler
from onmanifold.threats import (
    ImageBall,
    JointBall,
    LatentBall,
    PerceptualBall,
    TransformationBall,
)
from onmanifold.training import Normal

ATTACK = PGD(ImageBall("linf", 0.1), steps=2)


@pytest.fixture
def good(images):
    found = images(4)
    return {"images": found.images.float(), "labels": found.labels}


def raised(model, arguments, attack=ATTACK, error=InputError):
    flags = [module.training for module in model.modules()]
    with pytest.raises(error) as caught:
        attack(model, **arguments)
    assert isinstance(caught.value, OnManifoldError)
    assert [module.training for module in model.modules()] == flags
    message = str(caught.value)
    assert len(message) < 600
    return message


def nan_images(images):
    images = images.clone()
    images[2, 0, 3, 3] = torch.nan
    return images


BAD_IMAGES = {
    "0_to_255": (lambda x: 255 * x, ["images", "[0, 1]", "found [0, 255]", "divide by 255"]),
    "uint8": (lambda x: (255 * x).byte(), ["images", "floating-point", "torch.uint8", "255"]),
    "int64": (lambda x: x.long(), ["images", "floating-point", "torch.int64"]),
    "normalised": (lambda x: (x - 0.5) / 0.25, ["images", "[0, 1]", "found [-2, 2]", "inside"]),
    "nan": (nan_images, ["images", "1 values are NaN", "[0, 1]"]),
    "infinite": (lambda x: x / 0, ["images", "NaN"]),
    "channels": (lambda x: x.repeat(1, 3, 1, 1), ["images", "(3, 8, 8)", "does not take"]),
    "size": (lambda x: x[..., :5], ["images", "(1, 8, 5)", "does not take"]),
    "one_image": (lambda x: x[0], ["images", "(B, C, H, W)", "found (1, 8, 8)"]),
    "flat": (lambda x: x.flatten(1), ["images", "(B, C, H, W)", "found (4, 64)"]),
    "numpy": (lambda x: x.numpy(), ["images", "torch.Tensor", "ndarray"]),
    "precision": (lambda x: x.double(), ["images", "torch.float64", "torch.float32"]),
    "half": (lambda x: x.half(), ["images", "torch.float16", "torch.float32"]),
    "batch_of_none": (lambda x: x[:0], ["images", "empty"]),
}


@pytest.mark.parametrize("name", list(BAD_IMAGES))
def test_bad_images(good, small_net_32, name):
    change, parts = BAD_IMAGES[name]
    good["images"] = change(good["images"])
    good["labels"] = good["labels"][:0] if name == "batch_of_none" else good["labels"]
    message = raised(small_net_32, good)
    for part in parts:
        assert part in message


BAD_LABELS = {
    "float64": (lambda y: y.double(), ["labels", "torch.int64", "torch.float64"]),
    "int32": (lambda y: y.int(), ["labels", "torch.int64", "torch.int32"]),
    "too_large": (lambda y: torch.tensor([0, 1, 4, 2]), ["labels", "label 4", "0 to 3"]),
    "negative": (lambda y: torch.tensor([0, 1, -1, 2]), ["labels", "label -1", "0 to 3"]),
    "too_few": (lambda y: y[:3], ["labels", "(4,)", "(3,)"]),
    "one_hot": (lambda y: nn.functional.one_hot(y, 4), ["labels", "(4,)", "(4, 4)"]),
    "list": (lambda y: y.tolist(), ["labels", "torch.Tensor", "list"]),
    "elsewhere": (lambda y: y.to("meta"), ["labels", "meta", "images are on cpu"]),
}


@pytest.mark.parametrize("name", list(BAD_LABELS))
def test_bad_labels(good, small_net_32, name):
    change, parts = BAD_LABELS[name]
    good["labels"] = change(good["labels"])
    message = raised(small_net_32, good)
    for part in parts:
        assert part in message


def codes_with_nan(codes):
    codes = codes.clone()
    codes[1, 2] = torch.nan
    return codes


BAD_CODES = {
    "columns": (lambda z: z[:, :5], ["codes", "(4, 6)", "(4, 5)", "plane"]),
    "rows": (lambda z: z[:3], ["codes", "(4, 6)", "(3, 6)"]),
    "integers": (lambda z: z.long(), ["codes", "float", "plane", "int64"]),
    "nan": (codes_with_nan, ["codes", "NaN"]),
    "elsewhere": (lambda z: z.to("meta"), ["codes", "meta", "images are on cpu"]),
    "list": (lambda z: z.tolist(), ["codes", "torch.Tensor", "list"]),
}


@pytest.mark.parametrize("name", list(BAD_CODES))
@pytest.mark.parametrize("joint", [False, True])
def test_bad_codes(images, small_net, plane, name, joint):
    change, parts = BAD_CODES[name]
    good = images(4, on_manifold=True)
    latent = LatentBall(plane, "linf", 0.1)
    threat = JointBall(ImageBall(), latent) if joint else latent
    arguments = {"images": good.images, "labels": good.labels, "codes": change(good.codes)}
    message = raised(small_net, arguments, PGD(threat, steps=2))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"indices": torch.arange(3)}, ["indices", "(4,)", "(3,)"]),
        ({"indices": torch.arange(4.0)}, ["indices", "int64", "float32"]),
        ({"indices": torch.arange(4).to("meta")}, ["indices", "meta", "cpu"]),
        ({"indices": [0, 1, 2, 3]}, ["indices", "torch.Tensor", "list"]),
        ({"targets": torch.ones(4, dtype=torch.int64)}, ["targets", "CrossEntropy", "untargeted"]),
    ],
)
def test_bad_indices_and_targets(good, small_net_32, fields, parts):
    message = raised(small_net_32, good | fields)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("target", [4, -1])
def test_a_target_that_is_no_class(good, small_net_32, target):
    attack = PGD(ImageBall(), steps=2, objective="targeted_ce")
    message = raised(small_net_32, good | {"targets": torch.full((4,), target)}, attack)
    for part in ("targets", str(target), "0 to 3"):
        assert part in message


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: nn.Flatten(0), ["model", "(B, K)", "(64,)"]),
        (lambda: nn.Identity(), ["model", "(B, K)", "(1, 1, 8, 8)"]),
        (lambda: Pair(), ["model", "(B, K)", "tuple"]),
    ],
)
def test_models_without_logits(good, make, parts):
    message = raised(make(), good)
    for part in parts:
        assert part in message


class Pair(nn.Module):
    def forward(self, images):
        return images, images


def test_a_model_on_another_device(good, own_net):
    message = raised(own_net().to("meta"), good)
    for part in ("images", "cpu", "the model is on meta"):
        assert part in message


def test_a_joint_ball_needs_a_step_size_for_each_variable(images, small_net, plane):
    good = images(4, on_manifold=True)
    threat = JointBall(ImageBall(), LatentBall(plane))
    arguments = {"images": good.images, "labels": good.labels, "codes": good.codes}
    for attack in (PGD(threat, step_size=0.1), MIA(threat, step_size=0.1), FGSM(threat, 0.1)):
        message = raised(small_net, arguments, attack)
        for part in ("step_size", "'image', 'latent'", "mapping", "0.1"):
            assert part in message
    message = raised(small_net, arguments, PGD(threat, step_size={"image": 0.1, "latents": 0.1}))
    for part in ("step_size", "'image', 'latent'", "'latents'"):
        assert part in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageBall("linf", -0.1), r"radius: expected a number >= 0.*-0.1"),
        (lambda: ImageBall("linf", float("nan")), r"radius: expected a number >= 0.*nan"),
        (lambda: ImageBall("linf", float("inf")), r"radius: expected a number >= 0.*inf"),
        (lambda: ImageBall("l2", torch.tensor([0.1, -1])), r"radius: expected"),
        (lambda: ImageBall("l2", torch.ones(2, 2)), r"radius: .*one per sample \(B,\)"),
        (lambda: TransformationBall(shear=-1), r"shear: expected a half-range >= 0, found -1"),
        (lambda: TransformationBall(scale=1.0), r"scale: expected a half-range below 1"),
        (lambda: PGD(ImageBall(), steps=0), r"steps: expected at least 1, found 0"),
        (lambda: PGD(ImageBall(), step_size=-1.0), r"step_size: expected finite numbers >= 0"),
        (lambda: PGD(ImageBall(), restarts=0), r"restarts: expected at least 1, found 0"),
        (lambda: RandomPerturbation(ImageBall(), restarts=0), r"restarts: expected at least 1"),
        (
            lambda: ProjectedAdam(ImageBall(), step_size=float("inf")),
            r"step_size: expected finite numbers",
        ),
    ],
)
def test_specifications_are_checked_when_they_are_made(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageBall("Linf"), r"ImageBall: norm: .*'linf', 'l2' or 'l1', found 'Linf'"),
        (lambda: LatentBall(nn.Identity()), r"LatentBall: manifold: expected .*, found Identity"),
        (lambda: TransformationBall(norm="l3"), r"TransformationBall: norm: .*found 'l3'"),
        (lambda: PGD(0.1), r"PGD: threat: .*found 0\.1"),
        (lambda: PGD(nn.Identity()), r"PGD: threat: expected Threat, found Identity"),
        (lambda: PGD(ImageBall(), start="gauss"), r"PGD: start: .*'zero', .*found 'gauss'"),
        (lambda: PGD(ImageBall(), objective=3), r"PGD: objective: .*found 3"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_levels_that_the_manifold_has_not(plane):
    for levels in ((0, 7), ()):
        with pytest.raises(InputError, match=r"levels: found .*, expected some of \[0, 1, 2\]"):
            LatentBall(plane, levels=levels)


@pytest.mark.parametrize(
    ("registry", "spec", "message"),
    [
        (THREATS, {"type": "image_ball", "raduis": 0.1}, r"image_ball.*'raduis'.*'radius'\?"),
        (THREATS, {"type": "image_ball", "radius": "big"}, r"image_ball.*radius.*'big' \(str\)"),
        (THREATS, {"type": "image_ball", "norm": "linfty"}, r"image_ball.*norm.*'linf'.*'linfty'"),
        (THREATS, {"type": "image_ball", "radius": -1}, r"image_ball.*radius: expected.*-1"),
        (THREATS, {"type": "imageball"}, r"Unknown threat 'imageball'.*'image_ball'\?"),
        (THREATS, {"type": "joint_ball"}, r"joint_ball.*'image' is missing"),
        (ATTACKS, {"type": "pgd", "steps": 5}, r"pgd.*'threat' is missing"),
        (ATTACKS, {"type": "pgd", "threat": "image", "stepsize": 1}, r"'stepsize'.*'step_size'\?"),
        (ATTACKS, {"type": "pgd", "threat": "imag"}, r"Unknown threat 'imag'.*'image'\?"),
        (ATTACKS, {"type": "pgd", "threat": "image", "steps": "five"}, r"steps.*'five' \(str\)"),
        (ATTACKS, {"type": "pgd", "threat": "image", "steps": 2.5}, r"steps.*2\.5 \(float\)"),
        (ATTACKS, {"type": "pgd", "threat": "image", "steps": 0}, r"steps: expected at least 1"),
        (
            ATTACKS,
            {"type": "pgd", "threat": "image", "engine": {"precison": "bf16"}},
            r"engine.*precison",
        ),
        (
            ATTACKS,
            {"type": "pgd", "threat": "image", "objective": {"type": "margin", "confidense": 1}},
            r"margin.*'confidense'.*'confidence'\?",
        ),
        (ATTACKS, "pdg", r"Unknown attack 'pdg'\. Did you mean 'pgd'\?"),
        (OBJECTIVES, {"kind": "ce"}, r"objective needs the key 'type', found only kind"),
    ],
)
def test_experiment_files_name_the_nearest_valid_key(registry, spec, message):
    context = Context(named={"threat": {"image": ImageBall()}})
    with pytest.raises(ConfigError, match=message):
        registry.build(spec, context)


COMPONENTS = [
    pytest.param(kind, id=name)
    for registry in (THREATS, OBJECTIVES, ATTACKS, METHODS, FITS)
    for name, kind in registry.entries.items()
    if dataclasses.is_dataclass(kind)
]


NEEDED = {
    **dict.fromkeys(("threat", "image"), ImageBall()),
    **dict.fromkeys(("attack", "image_attack", "latent_attack"), ATTACK),
    **dict.fromkeys(("method", "then"), Normal()),
    "against": (ATTACK, ATTACK),
    "epochs": 1,
}


@pytest.mark.parametrize("kind", COMPONENTS)
def test_a_component_refuses_what_no_field_of_it_can_be(kind, plane):
    fields = dataclasses.fields(kind)
    given = {**NEEDED, "manifold": plane, "latent": LatentBall(plane)}
    needed = {
        field.name: given[field.name]
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
    }
    for field in fields:
        with pytest.raises(ConfigError, match=rf"^{kind.__name__}: {field.name}\b.*found"):
            kind(**{**needed, field.name: object()})


def test_a_subclass_is_checked_too():
    @dataclasses.dataclass(frozen=True)
    class Ours(PGD):
        extra: int = 0

    assert Ours(ImageBall(), objective="dlr", extra=2).objective == DLR()
    with pytest.raises(ConfigError, match=r"^Ours: extra: .*found 'x'"):
        Ours(ImageBall(), extra="x")
    with pytest.raises(ConfigError, match=r"^Ours: start: .*found 'Uniform'"):
        Ours(ImageBall(), start="Uniform")
    assert dataclasses.replace(Ours(ImageBall()), extra=3).extra == 3


def test_a_constructor_of_ones_own_is_left_alone():
    @dataclasses.dataclass(frozen=True, init=False)
    class Ours(ImageBall):
        def __init__(self, radius, **named):
            super().__init__("l2", radius)
            object.__setattr__(self, "named", named)

    assert (Ours(0.5, colour="red").radius, Ours(0.5, colour="red").named["colour"]) == (0.5, "red")


def test_a_message_shows_no_network():
    with pytest.raises(
        ConfigError, match=r"distance: .*PerceptualDistance.*, or .*found Sequential"
    ) as caught:
        PerceptualBall(nn.Sequential(*(nn.Linear(3, 3) for _ in range(40))))
    assert len(str(caught.value)) < 300
    with pytest.raises(TypeError, match=r"^PGD: missing a required argument: 'threat'"):
        PGD()


def test_a_constructor_takes_what_a_file_may_say():
    attack = PGD({"type": "image_ball", "radius": 0.1}, steps=torch.tensor(3))
    assert attack == PGD(ImageBall(radius=0.1), steps=3)
    with pytest.raises(ConfigError, match=r"^PGD: steps: .*2\.5 \(float\)"):
        PGD(ImageBall(), steps=2.5)
    with pytest.raises(TypeError, match="stepsize"):
        PGD(ImageBall(), stepsize=0.1)


def test_divergence_to_the_clean_prediction_needs_another_start():
    # There its gradient is zero: the sign of rounding errors would make the step.
    with pytest.raises(InputError, match=r"start: .* expected 'nearby', 'uniform' or 'distance'"):
        FGSM(ImageBall(), objective=KullbackLeibler())
    assert FGSM(ImageBall(), objective=KullbackLeibler(), start="uniform").start == "uniform"
