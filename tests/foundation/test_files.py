import errno
import os

import pytest

from onmanifold.foundation.errors import DataError
from onmanifold.foundation.files import read_json, write_atomically, write_json


def test_bytes_and_functions_are_written_and_folders_made(tmp_path):
    path = tmp_path / "deep" / "er" / "file.bin"
    assert write_atomically(path, b"one") == path
    assert path.read_bytes() == b"one"
    write_atomically(str(path), lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, monkeypatch, place):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, place, full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        write_atomically(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    write_atomically(tmp_path / "file", b"x" * 100_000)
    assert order == ["fsync", "replace"]


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="Could not write"):
        write_atomically(tmp_path / "file" / "inside", b"x")


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"c": "é"}}
    path = write_json(tmp_path / "value.json", value)
    assert read_json(path) == value


@pytest.mark.parametrize("content", [b'{"a": [1, 2', b"", b"\xff\xfe\x00"])
def test_truncated_or_foreign_json(tmp_path, content):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a JSON file, or is truncated") as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_missing_json(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "value.json")
