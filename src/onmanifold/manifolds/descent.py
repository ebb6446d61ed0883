"""How the nearest point of a manifold is searched: Adam on a distance, restarts from random latents."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal, uniform
from onmanifold.foundation.registry import Component
from onmanifold.manifolds.base import Chart, Manifold
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.manifolds.perceptual import PerceptualDistance

_BETAS = (0.9, 0.999)
# A loss that falls by less than this share has not fallen.
_IMPROVED = 1e-3
_SPREAD_DRAWS = 1000
# Share of the steps after which there is no noise (DMAT's encoding of images into W+).
_NOISE_END = 0.75


@dataclass(frozen=True)
class ProjectionConfig(Component):
    """How the nearest point is searched: Adam from the best start, restarts from random latents.

    The defaults are those of Disentangling, appendix C, for FONTS; `PROJECTIONS` has others by name.

    Attributes:
        steps: Of Adam, in each descent.
        learning_rate: Of Adam, in latent units.
        schedule: "step": times ``decay`` every ``decay_every`` steps; "cosine": linear warm-up over the share
            ``warmup`` of the steps, half a cosine to zero over the last share ``cooldown``.
        decay: See ``schedule``.
        decay_every: See ``schedule``.
        warmup: See ``schedule``.
        cooldown: See ``schedule``.
        l1_weight: Of the mean absolute pixel difference that is added to a perceptual measure.
        noise: Of the latents tried: its deviation at the start, as a share of each level's spread, which is the
            root of its summed variances over the manifold's own codes. It falls to zero with the square of the
            time left of three quarters of the steps.
        restarts: Additional descents, of the images whose loss is above ``tolerance``.
        candidates: Random latents of which the best starts a restart.
        tolerance: Loss that is near enough.
        patience: A sample is done after so many steps in which its loss fell by less than a thousandth; 0: never.
    """

    steps: int = 100
    learning_rate: float = 0.09
    schedule: Literal["step", "cosine"] = "step"
    decay: float = 0.95
    decay_every: int = 10
    warmup: float = 0.05
    cooldown: float = 0.25
    l1_weight: float = 0.0
    noise: float = 0.0
    restarts: int = 4
    candidates: int = 128
    tolerance: float = 0.1
    patience: int = 0

    def __post_init__(self) -> None:
        counts = {"steps": 0, "restarts": 0, "patience": 0, "candidates": 1, "decay_every": 1}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, found {getattr(self, name)}.")
        for name in ("l1_weight", "noise", "tolerance", "warmup", "cooldown"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: expected a number >= 0, found {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate: expected a number > 0, found {self.learning_rate}.")
        if not 0 < self.decay <= 1:
            raise InputError(f"decay: expected a number in (0, 1], found {self.decay}.")
        if self.warmup + self.cooldown > 1:
            raise InputError(
                "warmup and cooldown: expected shares of at most 1 in all, "
                f"found {self.warmup} and {self.cooldown}."
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0.

        >>> [round(ProjectionConfig(schedule="cosine", steps=100).rate(step) / 0.09, 2) for step in (0, 2, 50, 87)]
        [0.1, 0.5, 1.0, 0.5]
        """
        if self.schedule == "step":
            return self.learning_rate * self.decay ** (step // self.decay_every)
        done = (step + 0.5) / self.steps
        up = min(1.0, done / self.warmup) if self.warmup else 1.0
        left = min(1.0, (1 - done) / self.cooldown) if self.cooldown else 1.0
        return self.learning_rate * up * (0.5 - 0.5 * math.cos(math.pi * left))


class Goal:
    """What is minimised, for a batch of images; what does not change is computed once."""

    def __init__(
        self,
        images: Tensor,
        measure: PerceptualDistance | None,
        l1_weight: float,
        described: Tensor | None = None,
    ) -> None:
        self.images, self.measure, self.l1_weight = images, measure, l1_weight
        if measure is not None and described is None:
            described = measure.describe(images)
        self.described = described

    def keep(self, mask: Tensor) -> Goal:
        described = None if self.described is None else self.described[mask]
        return Goal(self.images[mask], self.measure, self.l1_weight, described)

    def loss(self, found: Tensor) -> Tensor:
        """(B,) of images found."""
        residual = found - self.images
        if self.measure is None or self.described is None:
            return lengths(residual)
        loss = self.measure.compare(self.measure.describe(found), self.described)
        return loss + self.l1_weight * residual.abs().flatten(1).mean(1) if self.l1_weight else loss

    def slope(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (B,), and the gradient to the images found that is followed."""
        if self.measure is None:
            # That of half the squared distance, which is smooth where the distance is zero.
            return self.loss(found), found - self.images
        with torch.enable_grad():
            found = found.detach().requires_grad_()
            loss = self.loss(found)
            (gradient,) = torch.autograd.grad(loss.sum(), found)
        return loss.detach(), gradient


def search(
    manifold: Manifold,
    goal: Goal,
    codes: Tensor,
    config: ProjectionConfig,
    seed: int,
    indices: Tensor,
) -> Tensor:
    """The best latents (B, latent_size) of all descents."""
    chart = manifold.chart(codes)
    latents = chart.latents.clone()
    lowest = goal.loss(chart.decode(latents))
    spread = _spread(manifold, codes) * config.noise if config.noise else None
    for attempt in range(config.restarts + 1):
        far = (lowest > config.tolerance).nonzero().squeeze(1)
        if not len(far):
            break
        start, stream = latents[far], f"project/{attempt}"
        around, target = chart.keep(far), goal.keep(far)
        if attempt:
            draws = _candidates(manifold, codes[far], config.candidates, seed, indices[far], stream)
            start = _best_candidate(around, target, draws)
        noise = None if spread is None else _Noise(spread, config.steps, seed, indices[far], stream)
        found, reached = _descend(around, target, start, config, noise)
        better = reached < lowest[far]
        latents[far[better]], lowest[far[better]] = found[better], reached[better]
    return latents


class _State(NamedTuple):
    """Where the samples are that are still on their way down.

    Attributes:
        latents: (b, latent_size).
        first: Adam's mean of the gradients.
        second: Adam's mean of their squares.
        mark: (b,) the loss when it last fell.
        stale: (b,) steps since.
        rows: (b,) which samples these are.
    """

    latents: Tensor
    first: Tensor
    second: Tensor
    mark: Tensor
    stale: Tensor
    rows: Tensor


def _descend(
    chart: Chart, goal: Goal, latents: Tensor, config: ProjectionConfig, noise: _Noise | None
) -> tuple[Tensor, Tensor]:
    """Adam on the loss: the best latents met, and their losses."""
    best, lowest = latents.clone(), torch.full_like(latents[:, 0], torch.inf)
    zeros, rows = torch.zeros_like(latents), torch.arange(len(latents), device=latents.device)
    state = _State(latents, zeros, zeros, lowest.clone(), torch.zeros_like(rows), rows)
    for step in range(config.steps + 1):
        tried = state.latents
        if noise is not None:
            tried = into_box(tried + noise.at(step, state.rows), chart.manifold.box)
        gradient = None
        if step < config.steps:
            loss, gradient = _slope(chart, goal, tried)
        else:
            loss = goal.loss(chart.decode(tried))
        lowest_here = lowest[state.rows]
        closer = loss < lowest_here
        lowest[state.rows] = torch.where(closer, loss, lowest_here)
        best[state.rows] = torch.where(closer.unsqueeze(1), tried, best[state.rows])
        if gradient is None:
            break
        state = _moved(state, gradient, step, config, chart.manifold.box)
        if config.patience:
            fell = loss < state.mark * (1 - _IMPROVED)
            mark, stale = torch.where(fell, loss, state.mark), torch.where(fell, 0, state.stale + 1)
            state = state._replace(mark=mark, stale=stale)
            going = stale < config.patience
            if not bool(going.all()):
                state = _State(*(part[going] for part in state))
                chart, goal = chart.keep(going), goal.keep(going)
                if not len(state.rows):
                    break
    return best, lowest


def _slope(chart: Chart, goal: Goal, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (b,) and the gradient to the latents that is followed."""
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        found = chart.decode(latents)
    loss, toward = goal.slope(found.detach())
    (gradient,) = torch.autograd.grad(found, latents, toward)
    return loss, gradient


def _moved(
    state: _State, gradient: Tensor, step: int, config: ProjectionConfig, box: float | None
) -> _State:
    """One step of Adam."""
    first = torch.lerp(gradient, state.first, _BETAS[0])
    second = torch.lerp(gradient * gradient, state.second, _BETAS[1])
    mean = first / (1 - _BETAS[0] ** (step + 1))
    spread = (second / (1 - _BETAS[1] ** (step + 1))).sqrt() + 1e-8
    latents = into_box(state.latents - config.rate(step) * mean / spread, box)
    return state._replace(latents=latents, first=first, second=second)


@dataclass(frozen=True)
class _Noise:
    """What is added to the latents tried: numbers of the seed, the sample and the step."""

    deviation: Tensor
    steps: int
    seed: int
    indices: Tensor
    stream: str

    def at(self, step: int, rows: Tensor) -> Tensor:
        strength = max(0.0, 1 - step / max(self.steps, 1) / _NOISE_END) ** 2
        shape, dtype = tuple(self.deviation.shape), self.deviation.dtype
        if strength == 0:
            return torch.zeros_like(self.deviation)
        stream = f"{self.stream}/noise/{step}"
        draws = normal(self.seed, self.indices[rows], shape, stream=stream, dtype=dtype)
        return strength * self.deviation * draws


def _spread(manifold: Manifold, codes: Tensor) -> Tensor:
    """The root of the summed variances of each level, in all its columns: (latent_size,)."""
    classes = int(getattr(manifold, "num_classes", 1))
    labels = torch.arange(_SPREAD_DRAWS, device=codes.device) % classes
    draws = manifold.sample_codes(labels, seed=_seed("spread")).to(codes)
    variances = draws[:, : manifold.latent_size].var(0)
    spread = torch.zeros_like(variances)
    for columns in manifold.levels.values():
        spread[columns] = variances[columns].sum().sqrt()
    return spread


def _candidates(
    manifold: Manifold, codes: Tensor, count: int, seed: int, indices: Tensor, stream: str
) -> Iterator[Tensor]:
    """Random latents (B, latent_size): the manifold's own where it is learned, else uniform in the box."""
    size = manifold.latent_size
    if isinstance(manifold, LearnedManifold):
        labels = torch.zeros_like(indices)
        if manifold.conditional:
            labels = manifold.labels_of(codes)
        for number in range(count):
            # Not the seed itself: images may be made of its very draws.
            drawn = manifold.sample_codes(labels, _seed(f"{seed}/{stream}/{number}"), indices)
            yield drawn[:, :size].to(codes)
        return
    if manifold.box is None:
        yield from normal(seed, indices, (count, size), stream=stream, dtype=codes.dtype).unbind(1)
        return
    shares = uniform(seed, indices, (count, size), stream=stream, dtype=codes.dtype)
    yield from ((2 * shares - 1) * manifold.box).unbind(1)


def _best_candidate(chart: Chart, goal: Goal, draws: Iterator[Tensor]) -> Tensor:
    """The random latents of least loss, for each image."""
    best = torch.empty_like(chart.latents)
    lowest = torch.full_like(best[:, 0], torch.inf)
    for latents in draws:
        loss = goal.loss(chart.decode(latents))
        closer = loss < lowest
        lowest = torch.where(closer, loss, lowest)
        best = torch.where(closer.unsqueeze(1), latents, best)
    return best


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def lengths(differences: Tensor) -> Tensor:
    """L2 norms (B,) of differences (B, C, H, W) of images."""
    norms: Tensor = torch.linalg.vector_norm(differences.flatten(1), dim=1)
    return norms


def into_box(latents: Tensor, box: float | None) -> Tensor:
    """The latents, moved into [-box, box] where there is a box."""
    return latents if box is None else latents.clamp(-box, box)
