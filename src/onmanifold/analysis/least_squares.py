"""Least squares from products alone: LSQR (Paige and Saunders 1982, ACM TOMS 8:43), a problem for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of the size of so many roundings, a number is nothing but rounding.
_ROUNDINGS = 100

Product = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """What was found for each sample.

    Attributes:
        solution: (B, n).
        residual: (B,) ``|A^T r| / (|A| |r|)`` of what is left, r; at most about 1, and 0 at the optimum. Where
            nothing is left of the right-hand side it is 0 too.
        iterations: (B,) int64 after which the sample was done.
    """

    solution: Tensor
    residual: Tensor
    iterations: Tensor


def least_squares(
    forward: Product, adjoint: Product, targets: Tensor, iterations: int, tolerance: float
) -> Solution:
    """Minimise ``|A x - b|`` for each sample's A and b; of all minimisers the shortest.

    After k iterations the solution is the best of a space of k dimensions, and ``A x`` the orthogonal projection
    of b onto its image, up to rounding. The method needs A in no other form than by products with a vector.

    Args:
        forward: (B, n) to (B, m): each row times its sample's A.
        adjoint: (B, m) to (B, n): each row times its transpose.
        targets: (B, m), the right-hand sides b.
        iterations: Limit; each takes one product of either kind, of all samples.
        tolerance: Residual at which a sample is done. It is done at the latest where all that is left, of b or of
            the residual, is rounding: going on would blow that up.
    """
    rounding = _ROUNDINGS * torch.finfo(targets.dtype).eps
    beta, left = _unit(targets)
    alpha, right = _unit(adjoint(left))
    direction, solution = right.clone(), torch.zeros_like(right)
    size, rest, turned = beta.clone(), beta.clone(), alpha.clone()
    squares = alpha.square()
    residual = torch.where((alpha > 0) & (beta > 0), 1.0, torch.zeros_like(beta))
    done, counts = residual == 0, torch.zeros(len(beta), dtype=torch.int64, device=beta.device)
    for _ in range(iterations):
        if bool(done.all()):
            break
        beta, left = _unit(forward(right) - alpha.unsqueeze(1) * left)
        alpha, following = _unit(adjoint(left) - beta.unsqueeze(1) * right)
        # A rotation takes the new row of the bidiagonal matrix out.
        diagonal = torch.hypot(turned, beta)
        cosine, sine = _over(turned, diagonal), _over(beta, diagonal)
        step, above = cosine * rest, sine * alpha
        moving = (~done).unsqueeze(1)
        move = _over(step, diagonal).unsqueeze(1) * direction
        solution = torch.where(moving, solution + move, solution)
        direction = following - _over(above, diagonal).unsqueeze(1) * direction
        rest, turned, right = sine * rest, -cosine * alpha, following
        squares = squares + beta.square() + alpha.square()
        # |A^T r| is rest · alpha · |cosine|; the squares' root stands for |A|, which it is no less than.
        found = torch.where(
            rest > rounding * size,
            _over(alpha * cosine.abs(), squares.sqrt()),
            torch.zeros_like(rest),
        )
        residual = torch.where(done, residual, found)
        counts = counts + ~done
        done = done | (found <= max(tolerance, rounding))
    return Solution(solution, residual, counts)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (B,), and the rows divided by them; zero rows stay."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return lengths, torch.where(lengths.unsqueeze(1) > 0, rows / lengths.unsqueeze(1), 0)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator != 0, numerator / denominator, 0)
