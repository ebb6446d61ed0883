"""Tangent and normal parts, against explicit Jacobians and known geometry."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onmanifold.analysis import tangent_parts, tangent_share
from onmanifold.analysis.least_squares import least_squares
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal
from onmanifold.manifolds import FontsManifold, build_manifold

SMALL = {
    "ppca": ({"type": "ppca", "latent_size": 4, "conditional": False}, (1, 6, 6)),
    "cvae": ({"type": "cvae", "network": "mlp", "latent_size": 3, "hidden_size": 16}, (1, 12, 12)),
    "vae_gan": ({"type": "vae_gan", "latent_size": 3, "channels": [4, 8]}, (1, 12, 12)),
    "glow": ({"type": "glow", "levels": 2, "steps": 2, "width": 6}, (1, 8, 8)),
}


def letters() -> FontsManifold:
    generator = torch.Generator().manual_seed(2)
    return FontsManifold(torch.randint(0, 256, (2, 3, 10, 10), generator=generator).to(torch.uint8))


def stirred(name):
    """A small manifold in float64, weights and codes random."""
    if name == "fonts":
        manifold = letters()
    else:
        options, shape = SMALL[name]
        manifold = build_manifold(options, 3, shape, seed=3).double()
        generator = torch.Generator().manual_seed(5)
        for parameter in manifold.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (0.05 if name == "glow" else 0.2) * noise
    codes = manifold.sample_codes(torch.arange(5) % 3, seed=1).double()
    return manifold, 0.3 * codes if name == "glow" else codes


def jacobian(manifold, codes, columns=slice(None)):
    """(B, pixels, latents), one sample after the other by backward passes."""
    found = []
    for row in range(len(codes)):
        chart = manifold.chart(codes[row : row + 1])
        leaf = chart.latents.clone()

        def flat(latents, chart=chart):
            return chart.decode(latents).flatten()

        found.append(torch.autograd.functional.jacobian(flat, leaf)[:, 0, columns])
    return torch.stack(found)


def gaussian(count, shape, seed=0):
    return normal(seed, torch.arange(count), shape, dtype=torch.float64)


@pytest.mark.parametrize("name", ["fonts", *SMALL])
@pytest.mark.parametrize("written_down", [True, False])
def test_parts_are_those_of_the_explicit_jacobian(name, written_down):
    manifold, codes = stirred(name)
    levels = [2] if name == "glow" else None
    columns = manifold.levels[2] if levels else slice(None)
    matrix = jacobian(manifold, codes, columns)
    vectors = gaussian(5, manifold.image_shape)
    found = tangent_parts(
        manifold,
        codes,
        vectors,
        levels=levels,
        written_down=written_down,
        iterations=400,
        tolerance=1e-12,
        batch_size=2,
    )
    projector = matrix @ torch.linalg.pinv(matrix, rtol=1e-12)
    expected = (projector @ vectors.flatten(1).unsqueeze(2)).view_as(vectors)
    torch.testing.assert_close(found.tangent, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.tangent + found.normal, vectors)
    share = expected.flatten(1).square().sum(1) / vectors.flatten(1).square().sum(1)
    torch.testing.assert_close(found.share, share, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.angle.cos().square(), share, rtol=0, atol=1e-9)
    if written_down:
        assert found.rank.tolist() == torch.linalg.matrix_rank(matrix).tolist()
    else:
        assert bool((found.residual < 1e-10).all())
        assert found.iterations.max() <= 4 * matrix.shape[2]


@pytest.mark.parametrize("name", ["fonts", *SMALL])
@pytest.mark.parametrize("written_down", [True, False])
def test_share_is_one_along_and_zero_across(name, written_down):
    manifold, codes = stirred(name)
    levels = [2] if name == "glow" else None
    columns = manifold.levels[2] if levels else slice(None)
    matrix = jacobian(manifold, codes, columns)
    options = {
        "levels": levels,
        "written_down": written_down,
        "iterations": 400,
        "tolerance": 1e-12,
    }
    along = matrix @ gaussian(5, (matrix.shape[2], 1))
    any_length = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).double().view(-1, 1, 1)
    along = (along * any_length).view(5, *manifold.image_shape)
    parts = tangent_parts(manifold, codes, along, **options)
    torch.testing.assert_close(parts.share, torch.ones(5).double(), rtol=0, atol=1e-10)
    assert bool((parts.angle < 1e-5).all())
    basis = torch.linalg.qr(matrix).Q
    across = gaussian(5, (math.prod(manifold.image_shape), 1))
    across = across - basis @ (basis.mT @ across)
    across = across - basis @ (basis.mT @ across)
    parts = tangent_parts(manifold, codes, across.view(5, *manifold.image_shape), **options)
    torch.testing.assert_close(parts.share, torch.zeros(5).double(), rtol=0, atol=1e-10)
    assert bool((parts.angle > math.pi / 2 - 1e-5).all())


def test_plane_is_exact(plane):
    """The tangent space of a plane is the plane: 6 of 64 dimensions, or those of its levels."""
    codes = gaussian(4000, (6,)) * 0.2
    vectors = gaussian(4000, (1, 8, 8), seed=1)
    weight = plane.weight / plane.weight.norm(dim=1, keepdim=True)
    for levels, columns in ((None, slice(0, 6)), ([0, 2], [0, 1, 5])):
        inside = vectors.flatten(1) @ weight[columns].T
        share = inside.square().sum(1) / vectors.flatten(1).square().sum(1)
        found = tangent_share(plane, codes, vectors, levels=levels)
        torch.testing.assert_close(found, share, rtol=0, atol=1e-12)
        # Random directions have rank / pixels on average; the error of 4,000 is below a thousandth.
        assert found.mean().item() == pytest.approx(inside.shape[1] / 64, abs=3e-3)


def test_dependent_latents_count_once():
    """Without shear and at a right angle, a letter that is a disc does not change when it turns."""
    axis = torch.linspace(-1, 1, 33)
    radii = torch.hypot(axis[:, None], axis[None, :])
    disc = (255 * torch.sigmoid(12 * (0.5 - radii))).to(torch.uint8)
    manifold = FontsManifold(torch.zeros(1, 1, 33, 33, dtype=torch.uint8))
    codes = torch.zeros(1, 8)
    vectors = torch.rand(1, 1, 33, 33)
    empty = tangent_parts(manifold, codes, vectors)
    assert (empty.rank.item(), empty.share.item()) == (0, 0.0)
    manifold = FontsManifold(disc[None, None])
    matrix = jacobian(manifold, codes.double())
    found = tangent_parts(manifold, codes, vectors)
    assert found.rank.item() == torch.linalg.matrix_rank(matrix, rtol=1e-4).item()
    torch.testing.assert_close(
        found.share.double(),
        tangent_share(manifold, codes.double(), vectors.double()),
        rtol=0,
        atol=1e-4,
    )


def test_zero_has_no_share(plane):
    found = tangent_parts(plane, torch.zeros(2, 6), torch.zeros(2, 1, 8, 8))
    assert bool(found.share.isnan().all() & found.angle.isnan().all())
    assert tangent_share(plane, torch.zeros(0, 6), torch.zeros(0, 1, 8, 8)).shape == (0,)


class Largest(TorchDispatchMode):
    """Looks at every tensor that is made, and keeps the size of the largest."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_flows_never_meet_a_whole_matrix(monkeypatch):
    """On Glow of 32 x 32 colours no tensor holds a row for every latent, and products are as few as iterations."""
    from onmanifold.manifolds.glow.model import GlowChart

    manifold = build_manifold({"type": "glow", "levels": 3, "steps": 1, "width": 8}, 10, seed=0)
    codes = 0.7 * manifold.sample_codes(torch.zeros(2, dtype=torch.int64), seed=1)
    vectors = gaussian(2, (3, 32, 32)).float()
    pushed = []
    push = GlowChart.push

    def counted(self, latents, directions):
        pushed.append(len(directions))
        return push(self, latents, directions)

    monkeypatch.setattr(GlowChart, "push", counted)
    with Largest() as largest:
        found = tangent_parts(manifold, codes, vectors, levels=[2, 3], iterations=15)
    moving = sum(
        part.stop - part.start for level, part in manifold.levels.items() if level in (2, 3)
    )
    assert moving == 1536
    assert len(pushed) <= found.iterations.max() + 1 <= 16
    assert set(pushed) == {2}
    # The largest is an activation, or the vectors themselves: far from 1,536 columns of 3,072 pixels.
    assert largest.numbers <= 2 * 16 * 3072 < 1536 * 3072
    assert bool(((found.share > 0.2) & (found.share < 0.8)).all())
    everything = tangent_parts(manifold, codes, vectors)
    assert everything.share.tolist() == [1.0, 1.0]
    assert everything.rank.tolist() == [3072, 3072]
    assert len(pushed) <= 16


def test_a_search_cut_short_never_says_too_much():
    manifold, codes = stirred("glow")
    vectors = gaussian(5, manifold.image_shape)
    shares = [
        tangent_parts(
            manifold,
            codes,
            vectors,
            levels=[1],
            written_down=False,
            iterations=limit,
            tolerance=0.0,
        )
        for limit in (1, 2, 4, 8, 16, 300)
    ]
    for less, more in itertools.pairwise(shares):
        assert bool((more.share >= less.share - 1e-9).all())
    assert bool((shares[0].residual > 1e-3).all())
    whole = tangent_share(manifold, codes, vectors, levels=[1], written_down=True)
    torch.testing.assert_close(shares[-1].share, whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6, 6)])
def test_least_squares_of_any_shape(shape):
    """Also where columns depend on each other: then the shortest solution is found."""
    matrix = gaussian(3, shape)
    matrix[1, :, 1] = 2 * matrix[1, :, 0]
    targets = gaussian(3, shape[:1], seed=2)
    targets[2] = 0
    found = least_squares(
        lambda x: torch.einsum("bmn,bn->bm", matrix, x),
        lambda y: torch.einsum("bmn,bm->bn", matrix, y),
        targets,
        iterations=100,
        tolerance=1e-14,
    )
    expected = (torch.linalg.pinv(matrix) @ targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found.solution, expected, rtol=0, atol=1e-7)
    assert found.iterations[2] == 0
    assert bool((found.iterations <= 12).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": torch.zeros(2, 1, 8, 7)}, "vectors: expected floats"),
        ({"codes": torch.zeros(2, 5)}, "codes: expected a float tensor"),
        ({"levels": [9]}, "levels: found"),
        ({"levels": []}, "levels: found"),
        ({"iterations": 0}, "iterations: expected at least 1"),
    ],
)
def test_wrong_input(plane, change, message):
    arguments = {"codes": torch.zeros(2, 6), "vectors": torch.zeros(2, 1, 8, 8)} | change
    with pytest.raises(InputError, match=message):
        tangent_parts(plane, **arguments)
