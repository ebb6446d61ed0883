"""The run store: keys, the mark of finished work, and the lock between processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from onmanifold.experiments.store import Store, digest
from onmanifold.foundation.errors import DataError

KEY = {"method": {"type": "normal"}, "seed": 0, "radius": 0.1}


def test_key_ignores_order_and_sees_every_value():
    assert digest(KEY) == digest(dict(reversed(KEY.items())))
    keys = [
        KEY,
        KEY | {"seed": 1},
        KEY | {"method": {"type": "other"}},
        KEY | {"radius": 0.1000001},
        {},
    ]
    assert len({digest(key) for key in keys}) == len(keys)


def test_run_is_found_again_and_finished_only_by_its_result(tmp_path):
    store = Store(tmp_path)
    run = store.run("training", "DMAT [PGD-5]", KEY)
    assert run.folder == tmp_path / "training" / f"dmat-pgd-5-{digest(KEY)}"
    with run.locked() as ours:
        assert ours
        assert not run.finished
        run.finish({"seconds": 1.5})
    again = Store(tmp_path).run("training", "DMAT [PGD-5]", KEY)
    assert again.finished
    assert again.result() == {"seconds": 1.5}
    assert not store.run("training", "DMAT [PGD-5]", KEY | {"seed": 1}).finished


def test_damaged_result_is_an_error(tmp_path):
    run = Store(tmp_path).run("training", "x", KEY)
    with run.locked():
        (run.folder / "result.json").write_text('{"seco')
    with pytest.raises(DataError, match="truncated"):
        run.result()


HOLD = """
    import sys
    from onmanifold.experiments.store import Store
    with Store(sys.argv[1]).run("training", "x", {"seed": 0}).locked() as ours:
        print("held" if ours else "refused", flush=True)
        sys.stdin.read()
"""


def test_lock_keeps_others_out_until_the_process_is_killed(tmp_path):
    run = Store(tmp_path).run("training", "x", {"seed": 0})
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with run.locked() as ours:
            assert not ours
        holder.kill()
        holder.wait()
        with run.locked() as ours:
            assert ours
    finally:
        holder.kill()
        holder.communicate()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "training").write_text("a file where the folder should be")
    run = Store(tmp_path).run("training", "x", KEY)
    with pytest.raises(DataError, match="Could not write"), run.locked():
        pass
