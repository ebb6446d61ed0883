"""Commands that the README, the pages and the experiment files tell people to type are ones that there are."""

import re
import shlex
from pathlib import Path

import click
import pytest
from typer.main import get_command

from onmanifold.cli import app
from onmanifold.experiments.spec import load_experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = sorted((ROOT / "experiments").rglob("*.yaml"))
COMMAND = re.compile(
    r"^(?:# +)?(?:ONMANIFOLD_DATA=\S+ )?onmanifold ([a-z]\w* .*|\w+)$", re.MULTILINE
)


def commands():
    for path in (*PAGES, *FILES):
        text = re.sub(r" *\\\n(?:#)? *", " ", path.read_text())
        for line in COMMAND.findall(text):
            yield pytest.param(line, id=f"{path.name}: {line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_can_be_typed_as_it_stands(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *words = shlex.split(line, comments=True)
    command = get_command(app).commands[name]
    try:
        context = command.make_context(name, words)
    except click.BadParameter as error:
        # A file that another command makes.
        if "does not exist" in str(error) and "experiments/" not in str(error):
            return
        raise
    file = context.params.get("experiment")
    assert context.info_name == name
    if name == "run" and file.exists():
        assert load_experiment(file, context.params["overrides"] or ()).methods


def test_there_are_commands_to_check():
    assert len(list(commands())) > 100
