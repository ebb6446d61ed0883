"""Checks of the search: is what it finds allowed, and is it as bad as what simpler means find?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from onmanifold.attacks import PGD, RandomPerturbation
from onmanifold.attacks.gradient import GradientAttack
from onmanifold.evaluation.audits.checks import (
    Answer,
    check,
    percent,
    skipped,
    surely_above,
    surely_more,
    verdict_of,
)
from onmanifold.evaluation.audits.study import Bools, Study
from onmanifold.evaluation.audits.surrogate import student_of
from onmanifold.objectives import Margin
from onmanifold.threats import ImageBall, JointBall, Threat

# Rounding of an image to float32, and of the sum of its differences.
_TOLERANCE = 1e-5
# In the whole image space every image has a neighbour of another class; a sample may be left over by chance.
_UNLIMITED = 0.01
# Accuracy may not rise with more steps or a larger radius; what random starts do to it is below this.
_RISE = 0.01
# Five times the steps take a point at most from an honest network that PGD-20 or more was run on; in ATLD's own
# tables they take 5 points (79.5 to 74.2 %, PGD-20 to PGD-100).
_UNCONVERGED = 0.02
# Queries alone may not beat gradients: AutoAttack's bound of 0.2 points.
_BLACK_BOX = 0.002
# In as many passes a random draw does not come near what a gradient finds among many variables.
_RANDOM = 0.05
_MANY_VARIABLES = 100


@check("inside the threat model")
def inside(study: Study) -> Answer:
    """Recompute the size of the perturbations with numpy alone, from the images."""
    threat, images, sizes = study.threat, [], []
    originals = study.subject.images[study.subject.right]
    for attack in study.attacks.values():
        outcome = study.run(attack)
        images.append(_float32(outcome.images))
        if isinstance(threat, ImageBall):
            sizes.append(_norms(_float32(outcome.images) - _float32(originals), threat.norm))
        else:
            sizes += [
                _norms(_float32(tensor), getattr(_part(threat, name), "norm", "linf"))
                / np.maximum(_radius(_part(threat, name)), 1e-30)
                for name, tensor in outcome.variables.items()
            ]
    if not isinstance(threat, ImageBall) and not _known_radii(threat):
        return skipped("This threat model's variables have no radius that could be recomputed.")
    radius = _radius(threat) if isinstance(threat, ImageBall) else 1.0
    return _bounds(np.concatenate(images), np.concatenate(sizes or [np.zeros(1)]), radius)


def _bounds(
    images: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], radius: float
) -> Answer:
    """Are images in [0, 1] and sizes below the radius?"""
    low, high, largest = float(images.min()), float(images.max()), float(sizes.max())
    in_box = low >= -_TOLERANCE and high <= 1 + _TOLERANCE
    in_ball = largest <= radius * (1 + 1e-4) + _TOLERANCE
    sentence = (
        f"Recomputed from the images themselves, the largest perturbation is {largest:.5g} of "
        f"{radius:.5g} allowed and pixels lie in [{low:.4g}, {high:.4g}]; what leaves the threat "
        "model is no adversarial example."
    )
    alarm = not (in_box and in_ball and np.isfinite(largest))
    return (
        verdict_of(alarm),
        {"largest": largest, "radius": radius, "low": low, "high": high},
        sentence,
    )


def _float32(tensor: torch.Tensor) -> npt.NDArray[np.float64]:
    """As they would be saved: rounded to float32, then exact."""
    return tensor.detach().float().cpu().numpy().astype(np.float64).reshape(len(tensor), -1)


def _norms(rows: npt.NDArray[np.float64], norm: str) -> npt.NDArray[np.float64]:
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    found: npt.NDArray[np.float64] = np.linalg.norm(rows, ord=order, axis=1)
    return found


def _part(threat: Threat, variable: str) -> Threat:
    """Whose variable it is."""
    if isinstance(threat, JointBall):
        return threat.image if variable == "image" else threat.latent
    return threat


def _radius(threat: Threat) -> float:
    return float(torch.as_tensor(getattr(threat, "radius", 1.0)).max())


def _known_radii(threat: Threat) -> bool:
    """Whether radius and norm are those of the variables themselves: of fog and the like they are not."""
    return isinstance(threat, JointBall) or (hasattr(threat, "radius") and hasattr(threat, "norm"))


@check("unlimited radius")
def unlimited_radius(study: Study) -> Answer:
    """Does PGD from the image bring the accuracy to zero where every image is allowed?"""
    image = study.threat.image if isinstance(study.threat, JointBall) else study.threat
    if not isinstance(image, ImageBall):
        return skipped(
            "Only an image ball without limit reaches every class; a manifold or a distortion may "
            "not."
        )
    count = study.subject.images[0].numel()
    radius = {"linf": 1.0, "l2": count**0.5, "l1": float(count)}[image.norm]
    whole = ImageBall(image.norm, radius)
    broken = study.run(PGD(whole, steps=study.budget.steps, start="zero")).broken
    left = study.accuracy(broken)
    sentence = (
        f"With every image allowed, PGD from the image leaves {percent(left)}; anything but 0 "
        "means that the search, and not the model, is what holds it up."
    )
    return (
        verdict_of(surely_above(~broken, _UNLIMITED)),
        {"accuracy": left, "radius": radius},
        sentence,
    )


@check("more steps")
def more_steps(study: Study) -> Answer:
    """Does the accuracy rise with more steps?"""
    counts = (1, min(10, study.budget.steps - 1), study.budget.steps)
    outcomes = [study.ladder(count) for count in counts]
    broken = [outcome.broken for outcome in outcomes if outcome is not None]
    numbers = {
        f"accuracy_{count}_steps": study.accuracy(part)
        for count, part in zip(counts, broken, strict=True)
    }
    rises = _any_rise(broken)
    shown = ", ".join(percent(value) for value in numbers.values())
    sentence = (
        f"PGD with {', '.join(map(str, counts))} steps leaves {shown}; where fewer steps break "
        "more, the gradient is right only far from the image or not at all, as with masked "
        "gradients."
    )
    return verdict_of(rises), numbers, sentence


@check("larger radius")
def larger_radius(study: Study) -> Answer:
    """Does the accuracy rise with the radius?"""
    factors = (1, 2, 4)
    outcomes = [study.ladder(study.budget.steps, factor) for factor in factors]
    if any(outcome is None for outcome in outcomes):
        return skipped("This threat model has no radius.")
    broken = [outcome.broken for outcome in outcomes if outcome is not None]
    numbers = {
        f"accuracy_radius_x{factor}": study.accuracy(part)
        for factor, part in zip(factors, broken, strict=True)
    }
    shown = ", ".join(percent(value) for value in numbers.values())
    sentence = (
        f"PGD with 1, 2 and 4 times the radius leaves {shown}; a larger ball holds the smaller "
        "one, so that a rise shows a search that fails."
    )
    return verdict_of(_any_rise(broken)), numbers, sentence


def _any_rise(broken: list[Bools]) -> bool:
    """Whether a later search breaks surely less than an earlier one."""
    return any(
        surely_more(earlier, later, _RISE)
        for place, later in enumerate(broken)
        for earlier in broken[:place]
    )


@check("converged")
def converged(study: Study) -> Answer:
    """Do many more steps of the attacks under audit break more?"""
    factor = study.budget.factor
    longer = [
        replace(attack, steps=factor * attack.steps)  # type: ignore[call-arg]
        for attack in study.attacks.values()
        if isinstance(attack, GradientAttack) and hasattr(attack, "steps")
    ]
    if not longer:
        return skipped("None of the attacks under audit has a number of steps.")
    before = study.primary()
    after: Bools = before | np.logical_or.reduce([study.run(attack).broken for attack in longer])
    numbers = {"accuracy": study.accuracy(before), "accuracy_more_steps": study.accuracy(after)}
    sentence = (
        f"{factor} times as many steps take the accuracy from {percent(numbers['accuracy'])} to "
        f"{percent(numbers['accuracy_more_steps'])}; as long as it falls, the number reported is "
        "that of an attack stopped too early."
    )
    return verdict_of(surely_above(after & ~before, _UNCONVERGED)), numbers, sentence


@check("random perturbations")
def random_perturbations(study: Study) -> Answer:
    """Do random draws, in as many passes, get further than the attacks under audit?"""
    spent = max(study.run(attack).forwards for attack in study.attacks.values())
    draws = min(max(spent, study.budget.steps + 1), study.budget.draws)
    attack = RandomPerturbation(study.threat, start="surface", restarts=draws, objective=Margin())
    random, gradient = study.run(attack), study.primary()
    numbers = {
        "draws": float(draws),
        "accuracy_random": study.accuracy(random.broken),
        "accuracy_gradient": study.accuracy(gradient),
    }
    alarm = surely_more(random.broken, gradient, _RISE)
    further = ""
    variables = sum(tensor[0].numel() for tensor in random.variables.values())
    if variables >= _MANY_VARIABLES:
        reached = np.max(
            [study.margins(study.run(one).images) for one in study.attacks.values()], axis=0
        )
        ahead = ~gradient & (random.broken | (study.margins(random.images) > reached))
        numbers["share_random_gets_further"] = float(ahead.mean())
        alarm = alarm or surely_above(ahead, _RANDOM)
        further = (
            f" and get closer to the boundary on {percent(float(ahead.mean()))} of the samples"
        )
    sentence = (
        f"{draws} random draws leave {percent(numbers['accuracy_random'])}, the attacks under "
        f"audit {percent(numbers['accuracy_gradient'])}; the draws, which know nothing of the "
        f"model, break {percent(float((random.broken & ~gradient).mean()))} that the attacks "
        f"miss{further}, which an attack with a useful gradient does not allow."
    )
    return verdict_of(alarm), numbers, sentence


@check("black box")
def black_box(study: Study) -> Answer:
    """Do attacks that see no gradient break what attacks by gradient miss?"""
    from onmanifold.attacks.square import Square

    white = study.white_box()
    square = Square(study.threat, queries=study.budget.queries, rescale_schedule=True)
    breaks = {"square": study.run(square).broken, "transfer": _transferred(study)}
    decisions = _by_decisions(study)
    if decisions is not None:
        breaks["rays"] = decisions
    numbers = {"accuracy_white_box": study.accuracy(white)}
    for name, broken in breaks.items():
        numbers |= {
            f"accuracy_{name}": study.accuracy(broken),
            f"only_{name}_breaks": float((broken & ~white).mean()),
        }
    # At a comparable budget: gradients get a second and longer look at what only queries broke.
    gains = study.still_missed(np.logical_or.reduce(list(breaks.values())) & ~white)
    numbers["missed_by_white_box"] = float(gains.mean())
    alarm = surely_above(gains, _BLACK_BOX)
    sentence = (
        f"Attacks without gradients ({', '.join(breaks)}) break {percent(float(gains.mean()))} of "
        "the samples that all attacks by gradient miss (these leave "
        f"{percent(study.accuracy(white))}); who sees more cannot do worse, so that such samples "
        "show masked gradients."
    )
    return verdict_of(alarm), numbers, sentence


def _transferred(study: Study) -> Bools:
    """Which samples are broken by images made on a surrogate, (M,)."""
    surrogate = study.surrogate or student_of(study)
    attack = PGD(study.threat, steps=study.budget.steps, early_stop=False, objective=Margin())
    images = [
        attack(
            surrogate, part.images, part.labels, part.codes, study.seed, indices=part.indices
        ).images
        for part in study.parts()
    ]
    broken: Bools = study.margins(torch.cat(images)) > 0
    return broken


def _by_decisions(study: Study) -> Bools | None:
    """Which samples RayS breaks; None where it is too dear or does not apply."""
    threat = study.threat
    if (
        not study.budget.decision_queries
        or not isinstance(threat, ImageBall)
        or threat.norm != "linf"
    ):
        return None
    try:
        from onmanifold.attacks.rays import RayS
    except ImportError:
        return None
    return study.run(RayS(threat, queries=study.budget.decision_queries)).broken
