"""Whether a font shows the letters: each font is judged by what the other fonts agree on.

No list of good or bad fonts is kept. A linear classifier of the ten letters is fitted to all fonts and asked
about each font as if it had not seen it (leave one font out, in closed form); who passes is trusted, a finer
classifier is fitted to the trusted fonts alone, and asked again. Runes, dingbats, Greek or shifted alphabets
fail, as nothing that is trusted looks like them in the same place; small capitals, scripts and display faces
pass. Fonts that few people could read fail too, which is what "clearly readable letters" (Disentangling B.1)
asks for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

SIDE = 14
"""Letters are compared after their bounding box is stretched to SIDE x SIDE pixels."""

TRUSTED = 7
"""Letters of ten that the linear classifier must recognise before a font has a voice in the finer one."""

PASS = 6
"""Letters of ten that the finer one must recognise; Greek capitals reach 5."""

_SLANTS = (0.25, 0.5)
_RANDOM_FEATURES = 400


def recognised(
    pictures: npt.NDArray[np.uint8], aspects: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """How many of the letters the consensus of all fonts recognises in each font.

    A font that is not trusted at first sight may also be set upright by one of a few shears.

    Args:
        pictures: (F, K, S, S), every letter stretched to its bounding box, S at least SIDE.
        aspects: (F, K) width by height of the bounding boxes.

    Returns:
        (F,) counts in 0 to K.
    """
    images = functional.avg_pool2d(torch.from_numpy(pictures).float() / 255, 3, stride=1, padding=1)
    ratios = torch.from_numpy(aspects).float()
    features = _features(images, ratios)
    fit = _Ridge(features)
    counts = _correct(fit.left_out())
    trusted = counts >= TRUSTED
    if not trusted.any():
        return counts.numpy()
    expand = _Expansion(features.shape[-1])
    fit = _Ridge(expand(features[trusted]))
    counts[trusted] = _correct(fit.left_out())
    doubtful = ~trusted
    if not doubtful.any():
        return counts.numpy()
    views = [features[doubtful]]
    views += [_features(images[doubtful], ratios[doubtful], slant) for slant in _SLANTS]
    best = torch.stack([_correct(fit.scores(expand(view))) for view in views]).max(dim=0).values
    counts[doubtful] = best
    return counts.numpy()


def _features(images: Tensor, ratios: Tensor, slant: float = 0.0) -> Tensor:
    """Centred, normalised pixels and the aspect, (F, K, D), of the letters sheared upright by ``slant``."""
    if slant:
        # The bounding box of a slanted letter is wider than the letter: shear about the middle, and stretch
        # what is left back to the full width.
        lean = slant / ratios.clamp(min=0.2)
        stretch = (1 - lean / 2).clamp(min=0.4)
        matrix = torch.zeros(ratios.numel(), 2, 3)
        matrix[:, 0, 0] = stretch.flatten()
        matrix[:, 0, 1] = -lean.clamp(max=1.2).flatten() / 2
        matrix[:, 1, 1] = 1
        flat = images.flatten(0, 1).unsqueeze(1)
        grid = functional.affine_grid(matrix, list(flat.shape), align_corners=False)
        images = functional.grid_sample(flat, grid, align_corners=False).view_as(images)
        ratios = ratios * stretch
    pixels = functional.adaptive_avg_pool2d(images, SIDE).flatten(2)
    pixels = functional.normalize(pixels - pixels.mean(2, keepdim=True), dim=2)
    return torch.cat([pixels, 0.3 * ratios.clamp(0.05, 20).log().unsqueeze(2)], dim=2)


class _Expansion:
    """Random rectified features beside the given ones: a network of one hidden layer that is never trained."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(size, _RANDOM_FEATURES, generator=generator)
        self.bias = 0.6 * torch.rand(_RANDOM_FEATURES, generator=generator) - 0.3

    def __call__(self, features: Tensor) -> Tensor:
        hidden = (features @ self.weight + self.bias).relu() * (3 / _RANDOM_FEATURES**0.5)
        return torch.cat([features, hidden], dim=-1)


class _Ridge:
    """Ridge regression of the letter on features (F, K, D)."""

    def __init__(self, features: Tensor, ridge: float = 1.0) -> None:
        self.design = self._design(features)
        used = self.design.flatten(0, 1)
        self.targets = torch.eye(features.shape[1], dtype=torch.float64)
        gram = used.T @ used + ridge * torch.eye(used.shape[1], dtype=torch.float64)
        self.factor = torch.linalg.cholesky(gram)
        self.solution = torch.cholesky_solve(
            used.T @ self.targets.repeat(len(features), 1), self.factor
        )

    @staticmethod
    def _design(features: Tensor) -> Tensor:
        return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1).double()

    def scores(self, features: Tensor) -> Tensor:
        """(F, K, K): for each letter of each font, a score per class."""
        scores: Tensor = self._design(features) @ self.solution
        return scores

    def left_out(self) -> Tensor:
        """Scores of each font that the fit has seen, as those of a fit without this font.

        Block leave-one-out: the residuals of a font are divided by one minus its block of the hat matrix.
        """
        used = self.design.flatten(0, 1)
        half = torch.linalg.solve_triangular(self.factor, used.T, upper=False).T.reshape(
            self.design.shape
        )
        residuals = self.targets - self.design @ self.solution
        share: Tensor = torch.linalg.solve(self.targets - half @ half.transpose(1, 2), residuals)
        return self.targets - share


def _correct(scores: Tensor) -> Tensor:
    """(F,) how many letters have their own class as the highest score."""
    return scores.argmax(dim=2).eq(torch.arange(scores.shape[1])).sum(dim=1)
