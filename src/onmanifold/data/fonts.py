"""The letters "A" to "J" in every usable font of a folder, for FONTS (Disentangling section 3.1 and B.1)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onmanifold.data.letters import PASS, SIDE, recognised
from onmanifold.data.locations import cache_folder, data_folder
from onmanifold.foundation.errors import DataError
from onmanifold.foundation.files import write_atomically

LETTERS = "ABCDEFGHIJ"
SIZE = 28
"""Side of an image in pixels."""

EM = 3 * SIZE // 4
"""Font size in pixels."""

# Letters are drawn four times larger than they are kept; areas are averaged.
_OVERSAMPLING = 4
# Two letters, or all letters of two fonts, are one if their L2 distance is below this share of their norm.
_SAME_LETTER = 0.1
_SAME_FONT = 0.08
# Raise when a change of this file or of letters.py changes what comes out: cached renderings become old.
_VERSION = 1

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RejectedFont:
    """A font file that cannot serve.

    Attributes:
        file: Its name.
        reason: "unreadable", "missing glyph", "blank glyph", "same glyph twice", "letters not
            recognised" or "near-duplicate".
        detail: What exactly was found.
    """

    file: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason} ({self.detail})"


@dataclass(frozen=True)
class FontSet:
    """The letters of all fonts of a folder that can serve.

    Attributes:
        prototypes: (F, 10, 28, 28) uint8; the letter is centred, the font size 21 pixels.
        names: File names of the F fonts.
        rejected: The fonts left out, and why.
        fingerprint: Digest of prototypes and names.
    """

    prototypes: Pixels
    names: tuple[str, ...]
    rejected: tuple[RejectedFont, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def summary(self) -> str:
        """One line: how many fonts serve, and how many were left out for which reason."""
        counts = Counter(font.reason for font in self.rejected)
        parts = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        return f"{len(self)} fonts; left out: {parts or 'none'}"


@dataclass(frozen=True)
class _Drawing:
    """What is drawn of one font: the letters in place, and stretched to their bounding boxes."""

    prototypes: Pixels
    stretched: Pixels
    aspects: npt.NDArray[np.float32]


def embedded_folder() -> Path:
    """The folder of the fonts inside matplotlib, which need no download."""
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf"


def fonts_folder(folder: str | Path | None = None) -> Path:
    """Where the fonts are: ``folder``, else ``$ONMANIFOLD_DATA/fonts`` if it exists, else matplotlib's.

    Raises:
        DataError: ``folder`` is given and is not a folder.
    """
    if folder is not None:
        if not Path(folder).is_dir():
            raise DataError(
                f"The folder of fonts {folder} does not exist; expected .ttf or .otf files in it."
            )
        return Path(folder)
    root = data_folder()
    if root is not None and (root / "fonts").is_dir():
        return root / "fonts"
    return embedded_folder()


def load_fonts(folder: str | Path | None = None) -> FontSet:
    """Render the letters of every usable font in a folder.

    The second time the result comes from the cache, as long as the folder's files are the same.

    Args:
        folder: Of .ttf and .otf files; None: see `fonts_folder`.

    Raises:
        DataError: The folder does not exist, or no font in it can serve.
    """
    place = fonts_folder(folder)
    files = sorted(
        (path for path in place.iterdir() if path.suffix.lower() in (".ttf", ".otf")),
        key=lambda path: path.name,
    )
    digest = hashlib.blake2b(f"{_VERSION} {SIZE} {EM}".encode(), digest_size=12)
    for path in files:
        status = path.stat()
        digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    fonts = _load(place, tuple(path.name for path in files), digest.hexdigest(), cache_folder())
    if not len(fonts):
        first = f" The first: {fonts.rejected[0]}." if fonts.rejected else ""
        raise DataError(
            f"No usable font among the {len(files)} .ttf and .otf files in {place}.{first}"
        )
    return fonts


@lru_cache(maxsize=4)
def _load(folder: Path, names: tuple[str, ...], key: str, cache: Path) -> FontSet:
    path = cache / f"fonts-{key}.npz"
    found = _read_cache(path)
    if found is not None:
        return found
    fonts = render_fonts([folder / name for name in names])
    # The cache saves seconds; a place that cannot be written must not stop the work.
    with contextlib.suppress(DataError):
        _write_cache(path, fonts)
    return fonts


def render_fonts(files: list[Path]) -> FontSet:
    """Render the letters of the given font files, judge them, and keep those that can serve."""
    drawings: dict[str, _Drawing] = {}
    rejected: list[RejectedFont] = []
    for path in files:
        drawn = _draw(path)
        if isinstance(drawn, RejectedFont):
            rejected.append(drawn)
        else:
            drawings[path.name] = drawn
    rejected += _not_the_letters(drawings)
    for font in rejected:
        drawings.pop(font.file, None)
    rejected += _near_duplicates(drawings)
    for font in rejected:
        drawings.pop(font.file, None)
    return _font_set(
        np.stack([drawing.prototypes for drawing in drawings.values()])
        if drawings
        else np.zeros((0, len(LETTERS), SIZE, SIZE), np.uint8),
        tuple(drawings),
        tuple(sorted(rejected, key=lambda font: font.file)),
    )


def _font_set(
    prototypes: Pixels, names: tuple[str, ...], rejected: tuple[RejectedFont, ...]
) -> FontSet:
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=12)
    digest.update(prototypes.tobytes())
    prototypes.setflags(write=False)
    return FontSet(prototypes, names, rejected, digest.hexdigest())


def _draw(path: Path) -> _Drawing | RejectedFont:
    """The letters of one font file, or why it has none."""
    from PIL import Image, ImageFont

    def reject(reason: str, detail: str) -> RejectedFont:
        return RejectedFont(path.name, reason, detail)

    try:
        content = path.read_bytes()
        missing = _missing_letters(content)
        if missing:
            return reject("missing glyph", f"no {', '.join(missing)}")
        font = ImageFont.truetype(
            io.BytesIO(content), EM * _OVERSAMPLING, layout_engine=ImageFont.Layout.BASIC
        )
        drawn = [_ink(font, letter) for letter in LETTERS]
    except Exception as error:
        # Parsers of foreign bytes raise nearly everything; whatever it is, this font cannot be read.
        return reject("unreadable", f"{type(error).__name__}: {error}")
    letters = [letter for letter in drawn if letter is not None]
    if len(letters) < len(LETTERS):
        return reject("blank glyph", LETTERS[drawn.index(None)])
    largest = max(max(letter.size) for letter in letters)
    # A few fonts draw far beyond their em square; they are shrunk until they fit.
    scale = max(float(_OVERSAMPLING), largest / SIZE)
    prototypes = np.stack([_place(letter, scale) for letter in letters])
    twins = _same_letters(prototypes)
    if twins:
        return reject("same glyph twice", twins)
    stretch = [letter.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BOX) for letter in letters]
    return _Drawing(
        prototypes,
        np.stack([np.asarray(letter) for letter in stretch]),
        np.array([letter.width / letter.height for letter in letters], np.float32),
    )


def _ink(font: Any, letter: str) -> Any:
    """The picture of a letter, cut to its ink, or None where there is none."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = map(int, font.getbbox(letter))
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    box = image.getbbox()
    return image.crop(box) if box is not None else None


def _missing_letters(content: bytes) -> list[str]:
    """The letters for which a font file has no glyph of its own.

    Raises:
        ValueError: The file ends before its tables do, or has no character map.
    """
    from fontTools.ttLib import TTFont

    with TTFont(io.BytesIO(content), lazy=True) as font:
        end = max((table.offset + table.length for table in font.reader.tables.values()), default=0)
        if end > len(content):
            raise ValueError(f"truncated: {len(content)} of {end} bytes")
        characters: dict[int, str] | None = font.getBestCmap()
        if characters is None:
            raise ValueError("no Unicode character map")
        return [letter for letter in LETTERS if characters.get(ord(letter), ".notdef") == ".notdef"]


def _place(letter: Any, scale: float) -> Pixels:
    """A letter, ``scale`` times too large, averaged down into the middle of an image of SIZE x SIZE."""
    from PIL import Image

    side = SIZE * scale
    # The frame may lie between pixels; what it needs beyond the letter is cut out as zeros.
    left, top = (letter.width - side) / 2, (letter.height - side) / 2
    column, row = math.floor(left), math.floor(top)
    extent = math.ceil(side) + 1
    canvas = letter.crop((column, row, column + extent, row + extent))
    frame = (left - column, top - row, left - column + side, top - row + side)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX, box=frame))


def _same_letters(prototypes: Pixels) -> str:
    """The first two letters with the same picture, or nothing."""
    distances = _relative_distances(prototypes)
    np.fill_diagonal(distances, np.inf)
    first, second = np.unravel_index(int(distances.argmin()), distances.shape)
    if distances[first, second] >= _SAME_LETTER:
        return ""
    return f"{LETTERS[first]} and {LETTERS[second]}"


def _not_the_letters(drawings: dict[str, _Drawing]) -> list[RejectedFont]:
    """The fonts whose glyphs the consensus does not recognise.

    The fonts inside matplotlib always have a voice, so that a folder of one font can be judged.
    """
    if not drawings:
        return []
    jury = [_draw(path) for path in sorted(embedded_folder().glob("DejaVu*.ttf"))]
    voices = [*drawings.values(), *(drawing for drawing in jury if isinstance(drawing, _Drawing))]
    counts = recognised(
        np.stack([drawing.stretched for drawing in voices]),
        np.stack([drawing.aspects for drawing in voices]),
    )
    return [
        RejectedFont(name, "letters not recognised", f"{count} of {len(LETTERS)} recognised")
        for name, count in zip(drawings, counts, strict=False)
        if count < PASS
    ]


def _near_duplicates(drawings: dict[str, _Drawing]) -> list[RejectedFont]:
    """All but the first, by name, of fonts that are nearly the same in every pixel."""
    if not drawings:
        return []
    names = list(drawings)
    distances = _relative_distances(np.stack([drawing.prototypes for drawing in drawings.values()]))
    kept: list[int] = []
    rejected = []
    for index, name in enumerate(names):
        nearest = kept[int(distances[index, kept].argmin())] if kept else index
        if nearest != index and distances[index, nearest] < _SAME_FONT:
            detail = f"of {names[nearest]}, {distances[index, nearest]:.1%} of the ink differs"
            rejected.append(RejectedFont(name, "near-duplicate", detail))
        else:
            kept.append(index)
    return rejected


def _relative_distances(pictures: Pixels) -> npt.NDArray[np.float32]:
    """Euclidean distances (N, N) of N pictures by the larger of the two norms."""
    points = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    squares = np.einsum("nd,nd->n", points, points)
    squared = squares[:, None] + squares - 2 * (points @ points.T)
    distances: npt.NDArray[np.float32] = np.sqrt(
        np.maximum(squared, 0) / np.maximum(np.maximum(squares[:, None], squares), 1e-12)
    )
    return distances


def _write_cache(path: Path, fonts: FontSet) -> None:
    rejected = [(font.file, font.reason, font.detail) for font in fonts.rejected]
    write_atomically(
        path,
        lambda file: np.savez_compressed(
            file,
            prototypes=fonts.prototypes,
            names=np.array(fonts.names, dtype=str),
            rejected=np.array(rejected, dtype=str).reshape(-1, 3),
            fingerprint=np.array(fonts.fingerprint),
        ),
    )


def _read_cache(path: Path) -> FontSet | None:
    """What was written, or None where it is absent or damaged."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            rejected = tuple(RejectedFont(*map(str, row)) for row in stored["rejected"])
            fonts = _font_set(stored["prototypes"], tuple(map(str, stored["names"])), rejected)
            return fonts if fonts.fingerprint == str(stored["fingerprint"]) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
