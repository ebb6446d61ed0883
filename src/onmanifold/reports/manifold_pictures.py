"""What a manifold looks like: samples, reconstructions, interpolations, traversals, nearest training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from onmanifold.analysis.nearest import nearest_images
from onmanifold.analysis.quality_images import BATCH, chosen_images, knows_classes
from onmanifold.attacks.engine import full_float32, untouched
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.modules import device_of, dtype_of
from onmanifold.foundation.randomness import permutation

if TYPE_CHECKING:
    from onmanifold.data.dataset import Dataset
    from onmanifold.manifolds.base import Manifold

_COLUMNS = 10
_SAMPLE_ROWS = 8
# Test images of each class that are encoded.
_EACH = 4
_STEPS = 9
_TRAVERSED = 8
_DRAWS = 200


@dataclass(frozen=True)
class Mosaic:
    """Images in rows and columns.

    Attributes:
        name: Of its files.
        title: Heading.
        caption: What is seen, in a sentence or two.
        images: (R, S, C, H, W) in [0, 1], on the CPU.
        rows: R names; empty: none are shown.
        columns: S names; empty: none are shown.
        group: Rows that belong together.
    """

    name: str
    title: str
    caption: str
    images: Tensor
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    group: int = 1

    def __post_init__(self) -> None:
        if self.images.ndim != 5 or not self.images.numel():
            raise InputError(f"images: expected (R, S, C, H, W), found {tuple(self.images.shape)}.")
        for name, labels, count in zip(
            ("rows", "columns"), (self.rows, self.columns), self.images.shape, strict=False
        ):
            if labels and len(labels) != count:
                raise InputError(f"{name}: expected {count} names, found {len(labels)}.")


class _Known(NamedTuple):
    """Test images with their codes, some of each class.

    Attributes:
        images: (E, S, C, H, W), a column for each class.
        codes: (E, S, code_size).
        names: S classes.
    """

    images: Tensor
    codes: Tensor
    names: tuple[str, ...]


def picture_manifold(
    manifold: Manifold,
    train: Dataset,
    test: Dataset,
    *,
    stored_codes: bool = False,
    seed: int = 0,
) -> tuple[Mosaic, ...]:
    """The pictures of a manifold, of at most ten classes; it is left as it was.

    Args:
        manifold: Any; few images are encoded, at most 40.
        train: What it was fitted to.
        test: Images that it has not seen.
        stored_codes: Whether ``test.codes`` are codes of this manifold, to take in place of encoding.
        seed: Of samples and of the choice of images.

    Raises:
        InputError: The test images have no codes, or there are no test images of any class.
    """
    if stored_codes and test.codes is None:
        raise InputError("stored_codes: the test images have no codes.")
    with untouched(manifold, seed), full_float32(), torch.no_grad():
        known = _known(manifold, test, stored_codes, seed)
        return (
            _samples(manifold, test, seed),
            _reconstructions(manifold, known),
            *_interpolations(manifold, known),
            _traversals(manifold, known, seed),
            _nearest(manifold, train, test, seed),
        )


def _known(manifold: Manifold, test: Dataset, stored_codes: bool, seed: int) -> _Known:
    order = permutation(seed, len(test), stream="pictures").to(test.labels.device)
    labels = test.labels[order]
    found = [(name, order[labels == number]) for number, name in enumerate(test.classes)]
    found = [(name, places) for name, places in found if len(places)][:_COLUMNS]
    if not found:
        raise InputError("test: expected some images, found none.")
    each = min(_EACH, *(len(places) for _, places in found))
    places = torch.stack([places[:each] for _, places in found], dim=1)
    batch = test.batch(places.flatten(), device_of(manifold))
    images = batch.images.to(dtype_of(manifold))
    codes = batch.codes if stored_codes else manifold.encode(images, batch.labels)
    assert codes is not None
    return _Known(
        images.view(*places.shape, *images.shape[1:]),
        codes.to(images.dtype).view(*places.shape, -1),
        tuple(name for name, _ in found),
    )


def _samples(manifold: Manifold, test: Dataset, seed: int) -> Mosaic:
    classes = test.classes[:_COLUMNS] if knows_classes(manifold, test.num_classes) else ()
    shape = (_SAMPLE_ROWS, len(classes) or _COLUMNS)
    labels = torch.arange(shape[1], device=device_of(manifold)).expand(shape).flatten()
    codes = manifold.sample_codes(labels if classes else torch.zeros_like(labels), seed)
    caption = "Codes drawn from the manifold's own distribution"
    caption += ", for each class." if classes else "; it does not know classes."
    images = _decoded(manifold, codes.view(*shape, -1))
    return Mosaic("samples", "Samples", caption, images, columns=classes)


def _reconstructions(manifold: Manifold, known: _Known) -> Mosaic:
    pairs = torch.stack([known.images.cpu(), _decoded(manifold, known.codes)], dim=1)
    rows = ("test image", "reconstruction") * len(pairs)
    caption = "Test images, and below each the image of its code."
    return Mosaic(
        *("reconstructions", "Reconstructions", caption, pairs.flatten(0, 1), rows, known.names),
        group=2,
    )


def _interpolations(manifold: Manifold, known: _Known) -> list[Mosaic]:
    if len(known.codes) < 2:
        return []
    size = manifold.latent_size
    first, second = known.codes[:2]
    shares = torch.linspace(0, 1, _STEPS - 2).tolist()
    moved = [_between(first[:, :size], second[:, :size], t, manifold.box) for t in shares]
    codes = torch.stack([torch.cat([part, first[:, size:]], dim=1) for part in moved], dim=1)
    decoded = _decoded(manifold, codes)
    ends = known.images[:2].cpu().unsqueeze(2)
    caption = "From the code of one test image to that of another of its class, "
    caption += "straight" if manifold.box is not None else "along the arc between them"
    caption += "; at the rims the images themselves."
    last = "its code"
    if not torch.equal(first[:, size:], second[:, size:]):
        last = "its latents"
        caption += " The fixed part of the code, such as a font, stays that of the left image."
    return [
        Mosaic(
            *("interpolations", "Interpolations", caption),
            torch.cat([ends[0], decoded, ends[1]], dim=1),
            rows=known.names,
            columns=("image", "its code", *[""] * (_STEPS - 4), last, "image"),
        )
    ]


def _traversals(manifold: Manifold, known: _Known, seed: int) -> Mosaic:
    start = known.codes[0, 0]
    drawn = manifold.sample_codes(
        torch.zeros(_DRAWS, dtype=torch.int64, device=start.device), seed
    ).to(start)
    if len(manifold.levels) > 1:
        return _level_traversals(manifold, start, drawn[0])
    count = min(_TRAVERSED, manifold.latent_size)
    low, high = drawn[:, :count].double().quantile(drawn.new_tensor([0.01, 0.99]).double(), dim=0)
    marks = ("1 %", *[""] * (_STEPS - 2), "99 %")
    caption = "Each latent from the first to the last hundredth of its draws, "
    if manifold.box is not None:
        low, high = torch.full_like(low, -manifold.box), torch.full_like(high, manifold.box)
        values = (manifold.box * torch.linspace(-1, 1, _STEPS)).tolist()
        marks = tuple(f"{value:.2g}".replace("-", "−") for value in values)
        caption = "Each latent across the box, "
    codes = start.repeat(count, _STEPS, 1)
    for number in range(count):
        shares = torch.linspace(0, 1, _STEPS, device=start.device).double()
        codes[number, :, number] = (low[number] + shares * (high - low)[number]).to(codes)
    return Mosaic(
        *("traversals", "Latent traversals", caption + "the others at the code of a test image."),
        _decoded(manifold, codes),
        rows=tuple(f"latent {number}" for number in range(count)),
        columns=marks,
    )


def _level_traversals(manifold: Manifold, start: Tensor, drawn: Tensor) -> Mosaic:
    """Each level from the code of a test image to a draw, the other levels as they are."""
    codes = start.repeat(len(manifold.levels), _STEPS, 1)
    for row, part in zip(codes, manifold.levels.values(), strict=True):
        for step, share in enumerate(torch.linspace(0, 1, _STEPS).tolist()):
            row[step, part] = _between(start[None, part], drawn[None, part], share, manifold.box)[0]
    caption = (
        "Each level's latents from those of a test image to a draw, the other levels as they are."
    )
    return Mosaic(
        *("traversals", "Level traversals", caption, _decoded(manifold, codes)),
        rows=tuple(f"level {name}" for name in manifold.levels),
        columns=("code", *[""] * (_STEPS - 2), "draw"),
    )


def _nearest(manifold: Manifold, train: Dataset, test: Dataset, seed: int) -> Mosaic:
    labels = chosen_images(test, _DRAWS, seed).labels.to(device_of(manifold))
    samples = _decoded(manifold, manifold.sample_codes(labels, seed)[None])[0]
    found = nearest_images(samples, train)
    rows = []
    for places in (found.distances.argsort()[:_COLUMNS], torch.arange(min(_COLUMNS, len(samples)))):
        rows += [samples[places], train.batch(found.positions[places], "cpu").images.to(samples)]
    caption = (
        f"Above, of {len(samples)} samples those nearest to a training image in L2; below, samples as they come. "
        "A copy would show the same image twice."
    )
    names = ("nearest sample", "training image", "any sample", "training image")
    return Mosaic(
        *("nearest", "Nearest training images", caption, torch.stack(rows), names), group=2
    )


def _between(first: Tensor, second: Tensor, share: float, box: float | None) -> Tensor:
    """Latents (B, D) at a share of the way: straight in a box, else on the arc between them (Shoemake 1985)."""
    if box is not None:
        return first.lerp(second, share)
    cosine = torch.cosine_similarity(first, second, dim=1).clamp(-1, 1).unsqueeze(1)
    angle = cosine.acos()
    # Of nearly parallel latents the arc is the straight line.
    flat = angle.sin() < 1e-3
    sine = torch.where(flat, 1.0, angle.sin())
    arc: Tensor = ((1 - share) * angle).sin() / sine * first + (share * angle).sin() / sine * second
    arc = torch.where(flat, first.lerp(second, share), arc)
    return arc


def _decoded(manifold: Manifold, codes: Tensor) -> Tensor:
    """Images (R, S, C, H, W) float32 on the CPU of codes (R, S, code_size)."""
    parts = torch.split(codes.flatten(0, 1).to(dtype_of(manifold)), BATCH)
    images = torch.cat([manifold.decode(part).float().cpu() for part in parts])
    return images.view(*codes.shape[:2], *images.shape[1:])
