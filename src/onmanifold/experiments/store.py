"""The run store: a folder for each piece of work, keyed by all that produced it, so nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onmanifold.foundation.errors import DataError
from onmanifold.foundation.files import read_json, write_json

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: runs there are not locked
    fcntl = None  # type: ignore[assignment]

# Raise when the same specification would give other numbers, so that no old result is taken for a new one.
STORE_VERSION = 1


def digest(key: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name a key.

    >>> digest({"a": 1, "b": 2.0}) == digest({"b": 2.0, "a": 1})
    True
    """
    text = json.dumps({"store": STORE_VERSION, **key}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def slug(text: str) -> str:
    """A folder's name that reminds of ``text``.

    >>> slug("DMAT [PGD-5, OM-PGD-5]")
    'dmat-pgd-5-om-pgd-5'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


@dataclass(frozen=True)
class Run:
    """One piece of work: a training or an evaluation.

    Attributes:
        folder: Where its files live.
        key: What produced them.
    """

    folder: Path
    key: Mapping[str, Any]

    @property
    def identifier(self) -> str:
        """The digest of the key."""
        return digest(self.key)

    @property
    def finished(self) -> bool:
        """Whether the work is done; the mark is its result, the last file written."""
        return (self.folder / "result.json").is_file()

    def result(self) -> dict[str, Any]:
        """What `finish` was given.

        Raises:
            DataError: Not finished, or the file is damaged.
        """
        result = read_json(self.folder / "result.json")
        if not isinstance(result, dict):
            raise DataError(
                f"{self.folder / 'result.json'} is damaged; remove its folder to repeat the run."
            )
        return result

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the work as done."""
        write_json(self.folder / "result.json", dict(result))

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the folder against other processes; gives False at once where another one holds it.

        The lock belongs to the process and goes with it, also when it is killed.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(f"Could not write to {self.folder}: {error.strerror}.") from None
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                    return
            if not (self.folder / "key.json").is_file():
                write_json(self.folder / "key.json", dict(self.key))
            yield True
        finally:
            os.close(descriptor)


class Store:
    """All runs below one folder.

    Args:
        root: The folder; made when the first run is.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def run(self, stage: str, label: str, key: Mapping[str, Any]) -> Run:
        """The run of a stage ("training", "evaluation") with this key; the label only helps the eye."""
        return Run(self.root / stage / f"{slug(label)}-{digest(key)}", key)
