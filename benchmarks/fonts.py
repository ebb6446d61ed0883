"""FONTS: rendering, the decoder and the projection. Run ``python -m benchmarks.fonts`` from the project's root.

The fonts are those of ``$ONMANIFOLD_DATA/fonts``, else the few inside matplotlib.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from onmanifold.data import load_dataset
from onmanifold.data.fonts import fonts_folder, render_fonts
from onmanifold.manifolds import FontsManifold, project
from onmanifold.manifolds.fonts import fonts_manifold

THREADS = 2
BATCH = 2000
ROUNDS = 15


def rates(call: Callable[[], object], items: int) -> tuple[float, float]:
    """Items per second: the median and the best of the rounds."""
    call()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    seconds.sort()
    return items / seconds[len(seconds) // 2], items / seconds[0]


def rendering() -> None:
    folder = fonts_folder()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".ttf", ".otf"))
    begin = time.perf_counter()
    fonts = render_fonts(files)
    seconds = time.perf_counter() - begin
    print(f"rendering {len(files)} fonts: {seconds:.2f} s (at most 5 for 999), {fonts.summary()}")


def decoding(manifold: FontsManifold, codes: torch.Tensor) -> None:
    chart = manifold.chart(codes)
    direction = torch.rand(len(codes), *manifold.image_shape)

    def forward() -> None:
        with torch.no_grad():
            chart.decode(chart.latents)

    def gradient() -> None:
        latents = chart.latents.detach().requires_grad_()
        torch.autograd.grad(chart.decode(latents), latents, direction)

    for name, call, floor in (("forward", forward, 100_000), ("with gradient", gradient, 60_000)):
        median, best = rates(call, len(codes))
        print(f"decoder, {name}: {median:,.0f} images/s, best {best:,.0f} (at least {floor:,})")


def projecting(manifold: FontsManifold) -> None:
    data = load_dataset("fonts", "test", size=1000)
    assert data.codes is not None
    elsewhere = 2 * torch.rand(1000, 6, generator=torch.Generator().manual_seed(0)) - 1
    start = torch.cat([elsewhere, data.codes[:, 6:]], dim=1)
    pairs = (data.images[:500] - data.images[500:]).flatten(1).norm(dim=1).mean()
    begin = time.perf_counter()
    found = project(manifold, data.images, start)
    seconds = time.perf_counter() - begin
    share = (found.distance <= 0.5).float().mean()
    print(
        f"projection of 1,000 test images in {seconds:.1f} s: mean L2 distance "
        f"{found.distance.mean():.3f} (at most 0.5; random pairs {pairs:.2f}), "
        f"within 0.5: {share:.1%} (at least 95 %)"
    )


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    print(f"FONTS, {THREADS} threads, fonts in {fonts_folder()}")
    rendering()
    manifold = fonts_manifold()
    codes = load_dataset("fonts", "train", size=BATCH).codes
    assert codes is not None
    decoding(manifold, codes)
    projecting(manifold)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
