"""The public side of every attack: check the input, search on a frozen model, verify what was found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks.engine import (
    Engine,
    FrozenNetwork,
    frozen,
    full_float32,
    probe,
    untouched,
    unwrapped,
)
from onmanifold.attacks.threads import own_threads
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError, OnManifoldError
from onmanifold.foundation.registry import ATTACKS, Component
from onmanifold.objectives import BoundObjective
from onmanifold.threats.base import Region, Threat, Variables

# Passes of a random model over what an attack returns, and over what then looks like success.
_PASSES, _MORE_PASSES = 11, 101
# Images on which two passes are compared: a model may be random on some images only, and only sometimes.
_COMPARED = 64


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, a row per sample.

    Attributes:
        images: (B, C, H, W) in [0, 1], of the input's dtype.
        success: (B,) bool: misclassified (or, for a targeted objective, predicted as the target), computed
            again on ``images`` by the model itself, in its own precision.
        predictions: (B,) int64, the model's predictions on ``images``.
        objective: (B,) the largest value of the objective that the search met.
        size: Norm of each perturbation variable, (B,) each.
        forwards: (B,) int32 forward passes of the model spent on the sample; verification not counted.
        backwards: (B,) int32 backward passes.
        variables: The perturbation variables, (B, ...) each.
        found_by: Of attacks made of several: the name of the one that fooled the model on each sample,
            "clean" where it needed none, None where none did; else None.
    """

    images: Tensor
    success: Tensor
    predictions: Tensor
    objective: Tensor
    size: dict[str, Tensor]
    forwards: Tensor
    backwards: Tensor
    variables: Variables
    found_by: tuple[str | None, ...] | None = None


@dataclass
class Found:
    """What a search hands back: one point per sample, and what it cost.

    Attributes:
        variables: (B, ...) each.
        objective: (B,) the largest value met.
        forwards: (B,) int32.
        backwards: (B,) int32.
        by: (B,) int64 which member of the attack found the point; None for attacks without members.
    """

    variables: Variables
    objective: Tensor
    forwards: Tensor
    backwards: Tensor
    by: Tensor | None = None


@dataclass(frozen=True)
class Search:
    """All that a search works on.

    Attributes:
        region: Where the variables may be.
        objective: What is maximised, on the frozen network.
        network: The frozen network.
        images: (B, C, H, W) the clean images.
        seed: Of the random starts.
        indices: (B,) sample indices; with the seed they determine the starts.
        success_first: Whether a success is worth more than a larger objective: in evaluation, not in training.
        random: Whether the model gives other logits each time.
    """

    region: Region
    objective: BoundObjective
    network: FrozenNetwork
    images: Tensor
    seed: int
    indices: Tensor
    success_first: bool = True
    random: bool = False

    @property
    def labels(self) -> Tensor:
        """(B,) int64."""
        return self.objective.labels

    def keep(self, mask: Tensor) -> Search:
        """The search of the selected samples."""
        return replace(
            self,
            region=self.region.keep(mask),
            objective=self.objective.keep(mask),
            images=self.images[mask],
            indices=self.indices[mask],
        )


@dataclass(frozen=True)
class Attack(Component, ABC):
    """How the worst case in a threat model is searched.

    Attributes:
        threat: What may change.
        engine: How the model is run meanwhile.
    """

    registry = ATTACKS

    threat: Threat
    engine: Engine = field(default=Engine(), kw_only=True)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the attacks that this one is made of; none where it is one by itself."""
        return ()

    @abstractmethod
    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """The attack's objective on a batch."""

    @abstractmethod
    def search(self, search: Search) -> Found:
        """The worst point found for each sample."""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        codes: Tensor | None = None,
        seed: int = 0,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> AttackResult:
        """Attack a batch; the model is found again exactly as it was.

        Args:
            model: Images (B, C, H, W) in [0, 1] to logits (B, K); normalisation lives inside it.
            images: (B, C, H, W) in [0, 1], float32 or float64, on the model's device.
            labels: (B,) int64.
            codes: (B, code_size) codes of the images; None: on-manifold threat models encode the images.
            seed: Together with ``indices`` determines all that is random.
            indices: (B,) int64 indices of the samples in their data set; None: 0 to B − 1.
            targets: (B,) int64 for targeted objectives; None: chosen by the objective.

        Raises:
            InputError: Something is of the wrong type, shape, dtype, device or range.
        """
        if torch.is_inference_mode_enabled():
            # Tensors made in that mode cannot take part in a gradient; copies made outside of it can.
            with torch.inference_mode(False):
                return self(
                    model,
                    _copy(images),
                    _copy(labels),
                    _copy(codes),
                    seed,
                    _copy(indices),
                    _copy(targets),
                )
        images = check_images(images)
        check_labels(labels, len(images))
        _check_places(model, images, labels=labels, codes=codes, indices=indices, targets=targets)
        indices = self._indices(images, indices)
        if len(images) == 0:
            raise InputError("images: the batch is empty.")
        with untouched(model, seed):
            classes = probe(model, images[:1]).shape[1]
        check_labels(labels, len(images), classes)
        if targets is not None:
            check_labels(targets, len(images), classes, name="targets")
        with frozen(model, images, self.engine, seed=seed) as network:
            with torch.no_grad():
                threat = self.threat.facing(unwrapped(model), images)
                region = threat.around(_fast_layout(images), labels, codes)
            objective = self.bind(network, images, labels, targets)
            random = is_random(network, images)
            found = self._searched(
                Search(region, objective, network, images, seed, indices, random=random)
            )
            with torch.no_grad():
                rendered = region.render(found.variables)
            _check_bounds(region, found.variables, rendered)
            adversarial = rendered.clamp(0, 1).to(images.dtype).contiguous()
        # Another seed: a random model is not judged on the noise that the search has seen.
        with untouched(model, seed + 1):
            success, predictions = judged(model, adversarial, objective, random)
        return AttackResult(
            images=adversarial,
            success=success,
            predictions=predictions,
            objective=found.objective,
            size=region.size(found.variables),
            forwards=found.forwards,
            backwards=found.backwards,
            variables=found.variables,
            found_by=_names_of(found.by, success, self.members),
        )

    def examples(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        codes: Tensor | None = None,
        seed: int = 0,
        indices: Tensor | None = None,
        engine: Engine | None = None,
        soft_labels: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images for training: the same search without checks, verification and statistics.

        Args:
            model: As for a call; it may be in train mode.
            images: (B, C, H, W) in [0, 1].
            labels: (B,) int64.
            codes: (B, code_size) or None.
            seed: Of the random starts.
            indices: (B,) int64 or None.
            engine: In place of the attack's own.
            soft_labels: (B, K) distributions over classes, which the objective takes in place of the labels.

        Returns:
            (B, C, H, W), detached.

        Raises:
            InputError: Soft labels for an objective that takes none.
        """
        indices = self._indices(images, indices)
        with frozen(model, images, engine or self.engine, seed=seed, check=False) as network:
            with torch.no_grad():
                threat = self.threat.facing(unwrapped(model), images)
                region = threat.around(_fast_layout(images), labels, codes)
            objective = self.bind(network, images, labels, None)
            if soft_labels is not None:
                objective = objective.softened(soft_labels)
            found = self._searched(
                Search(region, objective, network, images, seed, indices, success_first=False)
            )
            with torch.no_grad():
                return region.render(found.variables).clamp(0, 1)

    def _searched(self, search: Search) -> Found:
        """The search, in as many parts of the batch at once as there are workers."""
        workers = search.network.workers
        if workers == 1:
            return self.search(search)
        positions = torch.arange(len(search.indices))
        masks = [torch.isin(positions, part) for part in positions.tensor_split(workers)]
        with own_threads(1), ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(lambda mask: self.search(search.keep(mask)), masks))
        return Found(
            {
                name: torch.cat([part.variables[name] for part in parts])
                for name in parts[0].variables
            },
            torch.cat([part.objective for part in parts]),
            torch.cat([part.forwards for part in parts]),
            torch.cat([part.backwards for part in parts]),
            None if parts[0].by is None else torch.cat([p.by for p in parts if p.by is not None]),
        )

    @staticmethod
    def _indices(images: Tensor, indices: Tensor | None) -> Tensor:
        if indices is None:
            return torch.arange(len(images), device=images.device)
        if indices.shape != (len(images),) or indices.dtype != torch.int64:
            raise InputError(
                f"indices: expected int64 ({len(images)},), found {indices.dtype} {tuple(indices.shape)}."
            )
        return indices


def is_random(network: FrozenNetwork, images: Tensor) -> bool:
    """Whether the model gives other logits each time; asked where its trace does not rule it out."""
    if network.deterministic:
        return False
    few = images[:_COMPARED]
    with torch.no_grad():
        return not torch.equal(network.original(few), network.original(few))


def judged(
    model: Callable[[Tensor], Tensor], images: Tensor, objective: BoundObjective, random: bool
) -> tuple[Tensor, Tensor]:
    """Success (B,) bool and predictions (B,) of images, in full precision.

    A random model is asked several times, and success is what it shows in more than half of the passes, with the
    prediction that is most frequent among those. What looks like success at first is asked about many times more:
    a failure of the model may be luck, and an attack that tries often is lucky often.
    """
    with torch.no_grad(), full_float32():
        if not random:
            logits = model(images)
            return objective.fooled(logits), logits.argmax(1)
        success, predictions = _majority(model, images, objective, _PASSES)
        if bool(success.any()):
            sure, likeliest = _majority(
                model, images[success], objective.keep(success), _MORE_PASSES
            )
            predictions = predictions.masked_scatter(success, likeliest)
            success = success.masked_scatter(success, sure)
        return success, predictions


def _majority(
    model: Callable[[Tensor], Tensor], images: Tensor, objective: BoundObjective, count: int
) -> tuple[Tensor, Tensor]:
    """What more than half of so many passes show: success (B,) bool and predictions (B,)."""
    passes = torch.stack([model(images) for _ in range(count)])
    fooled = torch.stack([objective.fooled(logits) for logits in passes])
    success = 2 * fooled.sum(0) > count
    # Of the passes that agree with the verdict, so that prediction and success never contradict each other.
    votes = functional.one_hot(passes.argmax(2), passes.shape[2]) * (fooled == success).unsqueeze(2)
    return success, votes.sum(0).argmax(1)


def _names_of(
    by: Tensor | None, success: Tensor, members: tuple[str, ...]
) -> tuple[str | None, ...] | None:
    if by is None:
        return None
    pairs = zip(by.tolist(), success.tolist(), strict=True)
    return tuple(members[place] if fooled else None for place, fooled in pairs)


def _copy(given: Any) -> Any:
    return given.clone() if isinstance(given, Tensor) else given


def _fast_layout(images: Tensor) -> Tensor:
    """channels_last, in which convolutions are fastest; the values are the same."""
    return images.contiguous(memory_format=torch.channels_last)


def _check_places(model: nn.Module, images: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: expected a torch.Tensor, found {type(tensor).__name__}.")
        if tensor.device != images.device:
            raise InputError(
                f"{name}: found on {tensor.device}, the images are on {images.device}."
            )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return
    if parameter.device != images.device:
        raise InputError(f"images: found on {images.device}, the model is on {parameter.device}.")
    if parameter.dtype != images.dtype:
        raise InputError(
            f"images: found {images.dtype}, the model's parameters are {parameter.dtype}."
        )


def _check_bounds(region: Region, variables: Variables, rendered: Tensor) -> None:
    """The threat model, verified on what is returned."""
    for name, size in region.size(variables).items():
        radius = region.balls[name].radius
        if bool((size > radius * (1 + 1e-5) + 1e-6).any()):
            raise OnManifoldError(
                f"The attack left the threat model: {name} of size {size.max().item():.6g}, radius "
                f"{radius.max().item():.6g}. Please report this."
            )
    for name, ball in region.balls.items():
        if ball.low is not None and ball.high is not None:
            point = variables[name].view_as(ball.low)
            if bool(((point < ball.low - 1e-5) | (point > ball.high + 1e-5)).any()):
                raise OnManifoldError(f"The attack left the box of {name}. Please report this.")
    low, high = (value.item() for value in torch.aminmax(rendered))
    if not (low >= -1e-5 and high <= 1 + 1e-5):
        raise OnManifoldError(
            f"The attack left [0, 1]: found [{low:.6g}, {high:.6g}]. Please report this."
        )
