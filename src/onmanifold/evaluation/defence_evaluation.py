"""What a test-time defence is worth: attacked through, beside its static model, in every way that applies.

Croce, Gowal, Brunner et al. (ICML 2022, arXiv:2202.13711) attacked nine such defences through the whole of
them, and found none significantly better than its static model.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from onmanifold.attacks.apgd import APGD
from onmanifold.attacks.base import Attack, Found, Search, is_random
from onmanifold.attacks.engine import FrozenNetwork, frozen, probe, untouched
from onmanifold.attacks.gradient import GradientAttack
from onmanifold.attacks.stepped import RandomPerturbation
from onmanifold.data.dataset import Dataset
from onmanifold.evaluation.defence_result import BLACK_BOX, Cost, DefenceEvaluation
from onmanifold.evaluation.defences import BPDA, Defence, Differentiable, Transform, Unrolled
from onmanifold.evaluation.ledger import Evaluation, ledger_of
from onmanifold.evaluation.progress import Report
from onmanifold.evaluation.runner import evaluate
from onmanifold.evaluation.shards import LEDGER, model_digest
from onmanifold.foundation.errors import InputError
from onmanifold.objectives import BoundObjective
from onmanifold.threats import ImageBall, Threat

_RANDOM_PASSES = 20
_UNCHANGED = "unchanged"
_PROBED = 4


class Source:
    """A model that images are made for; ``fingerprint`` keys what is kept on disk."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def fingerprint(self) -> str:
        """A digest of structure, weights and settings."""
        return model_digest(self.model)


@dataclass(frozen=True)
class TransferAttack(Attack):
    """An attack on one model, its images then shown to another: to whichever this is called for.

    Attributes:
        attack: The search; gradient attacks do all their steps, since images that only just fool their own model
            carry over badly.
        source: The model that the images are made for.
    """

    attack: Attack
    source: Source

    @staticmethod
    def of(attack: Attack, model: nn.Module) -> TransferAttack:
        """The transfer of an attack from a model."""
        if isinstance(attack, GradientAttack):
            attack = replace(attack, early_stop=False)
        return TransferAttack(attack.threat, attack, Source(model))

    @property
    def members(self) -> tuple[str, ...]:
        """Those of the attack."""
        return self.attack.members

    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """The attack's objective, on the model that the images are shown to: it decides on success."""
        return self.attack.bind(network, images, labels, targets)

    def search(self, search: Search) -> Found:
        """What the attack finds on the source."""
        images, labels = search.images, search.labels
        with frozen(self.source.model, images, self.attack.engine, seed=search.seed) as network:
            objective = self.attack.bind(network, images, labels, None)
            random = is_random(network, images)
            return self.attack.search(
                replace(search, network=network, objective=objective, random=random)
            )

    def _searched(self, search: Search) -> Found:
        # As one: threads of their own would each freeze the source, and put it back under the others.
        return self.search(search)


def ways_through(
    defence: Defence, images: Tensor, surrogates: Mapping[str, Transform] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The ways to attack through a defence, tried out on a few images.

    Args:
        defence: What is to be attacked; left as it was.
        images: (B, C, H, W) in [0, 1].
        surrogates: Stand-ins for `BPDA` by name, besides the identity.

    Returns:
        The defence in each way that has a usable gradient, and why the others have none: "differentiable",
        "BPDA", "BPDA with <name>", "unrolled".
    """
    makers: dict[str, Callable[[], nn.Module]] = {
        "differentiable": lambda: Differentiable(defence),
        "BPDA": lambda: BPDA(defence),
        "unrolled": lambda: Unrolled(defence),
    }
    for name, surrogate in (surrogates or {}).items():
        makers[f"BPDA with {name}"] = functools.partial(BPDA, defence, surrogate)
    ways: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for way, make in makers.items():
        try:
            wrapped = make()
            with untouched(wrapped, 0):
                problem = _gradient_problem(wrapped, images)
        except torch.OutOfMemoryError:
            raise
        except (InputError, RuntimeError) as error:
            problem = str(error).partition("\n")[0]
        if problem:
            left_out[way] = problem
        else:
            ways[way] = wrapped
    return ways, left_out


def evaluate_defence(
    defence: Defence,
    dataset: Dataset,
    threat: Threat,
    *,
    attacks: Mapping[str, Attack] | None = None,
    black_box: Mapping[str, Attack] | None = None,
    sources: Mapping[str, nn.Module] | None = None,
    surrogates: Mapping[str, Transform] | None = None,
    passes: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    directory: str | Path | None = None,
    progress: bool | Report = False,
) -> DefenceEvaluation:
    """Attack a test-time defence in every way that applies, and its static model beside it.

    The static model is attacked directly. The defence meets the images made for the static model (the protocol of
    many papers), attacks through it (`Differentiable`, `BPDA`, `Unrolled`: see `ways_through`) and attacks by
    queries. Every image found is judged by the defence itself; of a random one, by the majority of repeated
    passes.

    Args:
        defence: The defence; left as it was.
        dataset: What to attack.
        threat: What the default attacks may change.
        attacks: White-box attacks by name, for the static model and through the defence; None: APGD on
            cross-entropy and towards the nine likeliest other classes, 100 steps.
        black_box: Attacks by queries, by name, on both; None: Square of 5,000 queries, and RayS of 10,000 in an l∞
            image ball.
        sources: Further models by name whose images the defence is shown.
        surrogates: Differentiable stand-ins for the transformation, by name, for `BPDA` with each of them; the
            identity is tried in any case.
        passes: Over how many passes of a random defence gradient attacks through it average; None: 20.
        batch_size: Samples per batch.
        seed: Of all that is random.
        directory: Where finished batches and ledgers are kept, to resume; see `evaluate`. Functions in a
            defence are told apart by their code and what they refer to; see `model_digest`.
        progress: As for `evaluate`.

    Raises:
        InputError: Something is of the wrong type, shape or range.
    """
    white, black = _attacks(threat, attacks, black_box)
    images = _first_images(defence, dataset, batch_size)
    random = _is_random(defence, images, seed)
    ways, left_out = ways_through(defence, images[:_PROBED], surrogates)
    adaptive = _averaging(white, passes or _RANDOM_PASSES) if random or passes else white

    def run(folder: str, model: nn.Module, todo: Mapping[str, Attack]) -> Evaluation:
        place = None if directory is None else Path(directory) / folder
        return evaluate(model, dataset, todo, batch_size, seed, directory=place, progress=progress)

    static = run("static", defence.classifier, {**white, **black})
    if "static" in (sources or {}):
        raise InputError("sources: the name 'static' is that of the defence's own classifier.")
    models = {"static": defence.classifier, **(sources or {})}
    direct: dict[str, Mapping[str, Attack]] = {
        f"transfer from {name}": {
            key: TransferAttack.of(attack, model) for key, attack in white.items()
        }
        for name, model in models.items()
    }
    groups = {**direct, **dict.fromkeys(ways, adaptive), BLACK_BOX: black}
    names = {protocol: _named(group, protocol) for protocol, group in groups.items() if group}
    shown = _named(black, BLACK_BOX)
    for protocol, group in direct.items():
        shown |= _named(group, protocol)
    unchanged = RandomPerturbation(ImageBall("linf", 0.0), start="zero")
    runs = {"defence": run("defence", defence, {_UNCHANGED: unchanged, **shown})}
    runs |= {
        way: run(re.sub(r"\W+", "-", way.lower()), model, _named(adaptive, way))
        for way, model in ways.items()
    }
    merged = _merged(runs, names)
    if directory is not None:
        merged.save(Path(directory) / LEDGER)
    return DefenceEvaluation(
        static,
        merged,
        {protocol: tuple(group) for protocol, group in names.items()},
        left_out,
        _cost(defence, images, seed),
        random,
    )


def _named(attacks: Mapping[str, Attack], protocol: str) -> dict[str, Attack]:
    """Attacks by their names in the ledger of the defence."""
    return {f"{name}, {protocol}": attack for name, attack in attacks.items()}


def _attacks(
    threat: Threat,
    attacks: Mapping[str, Attack] | None,
    black_box: Mapping[str, Attack] | None,
) -> tuple[dict[str, Attack], dict[str, Attack]]:
    """White-box and black-box attacks by name."""
    if attacks is None:
        attacks = {"APGD-CE": APGD(threat), "APGD-T": APGD(threat, objective="targeted_dlr")}  # type: ignore[arg-type]
    if black_box is None:
        from onmanifold.attacks.square import Square

        black_box = {"Square": Square(threat)}
        if isinstance(threat, ImageBall) and threat.norm == "linf":
            from onmanifold.attacks.rays import RayS

            black_box["RayS"] = RayS(threat, early_stop=True)
    if not attacks:
        raise InputError("attacks: expected at least one, found none.")
    if twice := set(attacks) & set(black_box):
        raise InputError(f"black_box: the name {min(twice)!r} is among the attacks too.")
    return dict(attacks), dict(black_box)


def _averaging(attacks: Mapping[str, Attack], passes: int) -> dict[str, Attack]:
    """Gradient attacks that average over passes, where they do not say themselves over how many."""
    return {
        name: replace(attack, passes=passes)
        if isinstance(attack, GradientAttack) and attack.passes == 1
        else attack
        for name, attack in attacks.items()
    }


def _first_images(defence: Defence, dataset: Dataset, batch_size: int) -> Tensor:
    if not isinstance(defence, Defence):
        raise InputError(f"defence: expected a Defence, found {type(defence).__name__}.")
    if len(dataset) == 0:
        raise InputError("dataset: it is empty.")
    tensors = [*defence.parameters(), *defence.buffers()]
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(1))
    batch = dataset.batch(torch.arange(min(batch_size, len(dataset))), device=like.device)
    return batch.images.to(like.dtype)


def _is_random(model: nn.Module, images: Tensor, seed: int) -> bool:
    with untouched(model, seed):
        first, second = (probe(model, images[:_PROBED]) for _ in range(2))
    return not torch.equal(first, second)


def _gradient_problem(model: nn.Module, images: Tensor) -> str | None:
    """Why there is no usable gradient of the logits to the images; None where there is one."""
    inputs = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(inputs)
        # Weights, as equal ones would cancel where the outputs are probabilities.
        weights = torch.linspace(1, 2, logits.shape[1]).to(logits)
        (slope,) = torch.autograd.grad((logits * weights).sum(), inputs)
    if not bool(slope.isfinite().all()):
        return "the gradient is NaN or infinite"
    return None if bool(slope.any()) else "the gradient is zero everywhere"


def _cost(defence: Defence, images: Tensor, seed: int) -> Cost:
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal counted
        counted += len(inputs[0])

    with untouched(defence, seed), torch.no_grad():
        hook = defence.classifier.register_forward_pre_hook(count)
        try:
            defence(images)
        finally:
            hook.remove()
        own, alone = (_seconds(model, images) for model in (defence, defence.classifier))
    return Cost(counted / len(images), own / alone)


def _seconds(model: nn.Module, images: Tensor, repeats: int = 3) -> float:
    """The shortest of some runs, the first one apart."""
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def _merged(
    runs: Mapping[str, Evaluation], protocols: Mapping[str, Mapping[str, Attack]]
) -> Evaluation:
    """All runs of the defence as one ledger, in the order of the protocols."""
    outcomes = {
        name: _outcome(runs.get(protocol, runs["defence"]), name)
        for protocol, names in protocols.items()
        for name in names
    }
    facts = {name: evaluation.provenance for name, evaluation in runs.items()}
    return Evaluation(ledger_of(_outcome(runs["defence"], _UNCHANGED), outcomes, facts))


def _outcome(evaluation: Evaluation, name: str) -> pa.Table:
    rows = evaluation.ledger.filter(pc.equal(evaluation.ledger["attack"], name))
    return rows.drop_columns(["attack", "clean_prediction"]).replace_schema_metadata(None)
