import pytest

from onmanifold.data import fonts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test has a cache folder of its own, and remembers nothing of the others."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ONMANIFOLD_CACHE", str(folder))
    fonts._load.cache_clear()
    yield folder
    fonts._load.cache_clear()
