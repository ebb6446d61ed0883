"""Files of on-manifold datasets: a row per sample with picture, original, label, code and index, verified."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from onmanifold.foundation.errors import DataError, InputError
from onmanifold.foundation.files import write_atomically

MEASURES = ("l1", "l2", "perceptual", "rounding")
"""What is known of each sample beside its row: see `Rows`."""

_HEADER = b"onmanifold"
_KIND = "on-manifold dataset"
_FORMAT = 1
_PICTURES = ("image", "original")
_COLUMNS = (*_PICTURES, "label", "code", "index", *MEASURES)


class Rows(NamedTuple):
    """Some samples of an on-manifold dataset, on the CPU.

    Attributes:
        images: (B, C, H, W) uint8, what the manifold generated.
        originals: (B, C, H, W) uint8, what was projected.
        labels: (B,) int64.
        codes: (B, code_size) float32.
        indices: (B,) int64, which samples these are.
        measures: (B,) float32 each, by name: "l1" (mean absolute difference of generated image and original),
            "l2" (root mean square), "perceptual", and "rounding" (mean absolute difference between the
            generated image and its 8-bit picture).
    """

    images: Tensor
    originals: Tensor
    labels: Tensor
    codes: Tensor
    indices: Tensor
    measures: Mapping[str, Tensor]


class Header(NamedTuple):
    """What a file says about itself.

    Attributes:
        key: A digest of all that its rows come from, the same in all files of a split.
        dataset: Name of the dataset that was projected.
        classes: The names of its classes.
        manifold: Name of the manifold.
        fingerprint: The manifold's.
        rows: A digest of all columns but the pictures; `write_shard` fills it in.
        pictures: A digest of the pictures; so is this.
    """

    key: str
    dataset: str
    classes: tuple[str, ...]
    manifold: str
    fingerprint: str
    rows: str = ""
    pictures: str = ""


class Shard(NamedTuple):
    """What a file holds.

    Attributes:
        header: What it says about itself.
        labels: (B,) int64.
        codes: (B, code_size) float32.
        indices: (B,) int64.
        measures: (B,) float32 each, by name; see `Rows`.
        images: B generated images as PNG files; empty where they were not read.
        originals: The images that were projected, likewise.
    """

    header: Header
    labels: Tensor
    codes: Tensor
    indices: Tensor
    measures: Mapping[str, Tensor]
    images: Sequence[bytes]
    originals: Sequence[bytes]


def to_bytes(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] rounded to 8 bits; uint8 stays as it is."""
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def shard_path(folder: Path, split: str, number: int, count: int) -> Path:
    """The file of shard ``number`` of ``count``, named as the Hugging Face hub does."""
    return folder / f"{split}-{number:05d}-of-{count:05d}.parquet"


def write_shard(path: Path, rows: Rows, header: Header) -> None:
    """Write samples as a Parquet file that the Hugging Face hub shows as images, whole or not at all.

    The same rows give the same bytes. An original that is the same picture as the generated image is not
    written a second time.

    Raises:
        InputError: Images of neither 1 nor 3 channels.
        DataError: The disk is full or the place cannot be written.
    """
    table = _table(rows)
    header = header._replace(rows=_digest(table, False), pictures=_digest(table, True))
    facts = {"kind": _KIND, "format": _FORMAT, **header._asdict()}
    features = {"info": {"features": _features(header.classes)}}
    metadata = {_HEADER: json.dumps(facts), b"huggingface": json.dumps(features)}
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_shard(path: Path, pictures: bool = True) -> Shard:
    """Read what `write_shard` wrote, and verify it.

    Args:
        path: The file.
        pictures: Whether to read the images too.

    Raises:
        DataError: The file is missing, truncated, damaged, changed or foreign; the message says which.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            header = _header(path, file.schema_arrow)
            wanted = [name for name in _COLUMNS if pictures or name not in _PICTURES]
            table = file.read(columns=wanted)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} is not a Parquet file, or is truncated or damaged ({reason})."
        ) from None
    for what, expected in (("rows", header.rows), ("pictures", header.pictures)):
        if (pictures or what == "rows") and _digest(table, what == "pictures") != expected:
            raise DataError(f"{path} was changed after it was written: its {what} differ.")
    images = _encoded(table, "image") if pictures else []
    originals = _encoded(table, "original") if pictures else []
    return Shard(
        header=header,
        labels=_tensor(table["label"]),
        codes=_tensor(pc.list_flatten(table["code"])).view(len(table), -1),
        indices=_tensor(table["index"]),
        measures={name: _tensor(table[name]) for name in MEASURES},
        images=images,
        originals=[own or other for own, other in zip(originals, images, strict=True)],
    )


def shards_of(root: Path, split: str) -> list[Path]:
    """The files of a split, in order.

    Raises:
        DataError: There are none, or not all.
    """
    found = sorted(root.glob(f"{split}-*.parquet"))
    numbers = [re.search(r"-(\d{5})-of-(\d{5})\.parquet$", file.name) for file in found]
    counts = {int(match[2]) for match in numbers if match}
    if len(counts) != 1 or not all(numbers):
        listed = ", ".join(file.name for file in found) or "nothing"
        raise DataError(
            f"on_manifold: looked for {shard_path(root, split, 0, 1).name} and the like in {root}, found "
            f"{listed}. `onmanifold project` makes such files."
        )
    expected = [shard_path(root, split, number, *counts) for number in range(*counts)]
    missing = [file for file in expected if file not in found]
    if missing:
        raise DataError(
            f"{missing[0]} does not exist, as {len(missing)} of {len(expected)} files of this split. The "
            "projection is not finished: start it again, and it goes on where it stopped."
        )
    return expected


def _table(rows: Rows) -> pa.Table:
    count, code_size = rows.codes.shape
    pictures = [_png(image) for image in rows.images]
    originals = [
        None if torch.equal(original, image) else _png(original)
        for original, image in zip(rows.originals, rows.images, strict=True)
    ]
    offsets = pa.array(np.arange(0, (count + 1) * code_size, code_size, dtype=np.int32))
    columns = {
        "image": _images_array(pictures),
        "original": _images_array(originals),
        "label": pa.array(rows.labels.numpy()),
        "code": pa.ListArray.from_arrays(offsets, pa.array(rows.codes.flatten().numpy())),
        "index": pa.array(rows.indices.numpy()),
    }
    return pa.table(columns | {name: pa.array(rows.measures[name].numpy()) for name in MEASURES})


def _images_array(encoded: Sequence[bytes | None]) -> pa.Array:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    values = [None if item is None else {"bytes": item, "path": None} for item in encoded]
    return pa.array(values, kind)


def _png(image: Tensor) -> bytes:
    if len(image) not in (1, 3):
        raise InputError(f"images: expected 1 or 3 channels for pictures, found {len(image)}.")
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def _features(classes: Sequence[str]) -> dict[str, Any]:
    """What the columns are, in the words of the Hugging Face library."""
    number = {"dtype": "float32", "_type": "Value"}
    return {
        **{name: {"_type": "Image"} for name in _PICTURES},
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "code": {"feature": number, "_type": "Sequence"},
        "index": {"dtype": "int64", "_type": "Value"},
        **dict.fromkeys(MEASURES, number),
    }


def _header(path: Path, schema: pa.Schema) -> Header:
    try:
        facts = json.loads(schema.metadata[_HEADER])
        if facts.pop("kind") != _KIND or facts.pop("format") != _FORMAT:
            raise ValueError
        header = Header(**facts)._replace(classes=tuple(facts["classes"]))
    except (KeyError, ValueError, TypeError, AttributeError):
        raise DataError(
            f"{path} is a Parquet file, but not one of an onmanifold on-manifold dataset."
        ) from None
    if tuple(schema.names) != _COLUMNS:
        raise DataError(
            f"{path}: expected the columns {', '.join(_COLUMNS)}, found {', '.join(schema.names)}."
        )
    return header


def _digest(table: pa.Table, pictures: bool) -> str:
    """A digest of the values of a table's pictures, or of its other columns."""
    digest = hashlib.blake2b(str(len(table)).encode(), digest_size=16)
    if pictures:
        for name in _PICTURES:
            for item in _encoded(table, name):
                digest.update(b"-" if item is None else len(item).to_bytes(8, "little") + item)
        return digest.hexdigest()
    lengths, values = pc.list_value_length(table["code"]), pc.list_flatten(table["code"])
    measures = [table[name] for name in MEASURES]
    for column in (table["label"], table["index"], *measures, lengths, values):
        digest.update(np.ascontiguousarray(column.to_numpy()).data)
    return digest.hexdigest()


def _encoded(table: pa.Table, name: str) -> list[Any]:
    """The files in a column of pictures; None: none."""
    files: list[Any] = pc.struct_field(table[name], "bytes").to_pylist()
    return files


def _tensor(column: pa.ChunkedArray) -> Tensor:
    # Copied: what pyarrow gives cannot be written to.
    return torch.from_numpy(column.to_numpy().copy())
