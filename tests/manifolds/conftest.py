import pytest
import torch

from onmanifold.data.fonts import embedded_folder
from onmanifold.manifolds import fonts_manifold


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """One cache folder for these tests: the fonts are rendered once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONMANIFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def manifold():
    """FONTS on the embedded fonts."""
    return fonts_manifold(embedded_folder())


@pytest.fixture
def draw(manifold):
    """Makes random codes."""

    def make(count, seed=0, dtype=torch.float32, reach=1.0):
        generator = torch.Generator().manual_seed(seed)
        latents = (2 * torch.rand(count, 6, generator=generator) - 1) * reach
        font = torch.randint(manifold.num_fonts, (count, 1), generator=generator)
        letter = torch.randint(10, (count, 1), generator=generator)
        return torch.cat([latents, font, letter], dim=1).to(dtype)

    return make
