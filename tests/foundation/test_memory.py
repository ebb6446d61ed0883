"""Freed memory is kept, unless the user has chosen otherwise."""

import os
import subprocess
import sys

import pytest

SCRIPT = "from onmanifold.foundation.memory import keep_freed_memory as keep; print(keep(), keep())"


def said(**variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_it_is_set_where_the_user_has_set_nothing():
    assert said() == ["True", "True"]


def test_the_users_own_setting_stands():
    assert said(MALLOC_TRIM_THRESHOLD_="100000") == ["False", "False"]
