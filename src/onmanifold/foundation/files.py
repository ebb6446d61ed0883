"""Files that are either whole or absent: written to a temporary name, flushed, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from onmanifold.foundation.errors import DataError


def write_atomically(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write a file so that at any moment, also after kill -9, it is whole or absent.

    Args:
        path: Where to; parent folders are made.
        content: The bytes, or a function that writes them into the open binary file it is given.

    Raises:
        DataError: The disk is full or the place cannot be written; the old file is left as it was.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


def write_json(path: str | Path, value: object) -> Path:
    """Write ``value`` as readable JSON, atomically."""
    return write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file is missing, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not a JSON file, or is truncated ({error}).") from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"Could not write {path}: {reason}. Nothing written before is lost; "
            "free some space or choose another folder, and start again to resume."
        ) from error
