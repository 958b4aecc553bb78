"""The table of commands: each is listed, has its help, and loads only itself."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli.main import COMMANDS, CommandGroup, CommandTable, app, summary


def functions(table: CommandTable, *before: str) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, entry in table.items():
        if isinstance(entry, CommandGroup):
            yield from functions(entry.commands, *before, name)
        else:
            yield (*before, name), entry if isinstance(entry, str) else entry.function


ALL = dict(functions(COMMANDS))


def said(*words: str) -> str:
    result = CliRunner().invoke(app, words, terminal_width=200, prog_name="incus-gateway")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_its_help(words: tuple[str, ...]) -> None:
    """The list shows the first sentence of what the command's own help says."""
    module, _, name = ALL[words].partition(":")
    function: Any = getattr(import_module(module), name)
    said_first = summary(ALL[words])
    assert said_first and (inspect.getdoc(function) or "").startswith(said_first)
    assert said_first in said(*words, "--help")
    listed = [line.split(maxsplit=1) for line in said(*words[:-1], "--help").splitlines()]
    assert [words[-1], said_first] in listed


def test_the_list_needs_no_command_and_a_command_no_other() -> None:
    script = """
import sys
from typer.testing import CliRunner
from gateway.cli.main import app
CliRunner().invoke(app, sys.argv[1:])
print(*(name for name in sys.modules if name.startswith("gateway.cli.")))
"""

    def loaded(*words: str) -> set[str]:
        run = [sys.executable, "-c", script, *words]
        return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())

    listing = loaded("--help")
    commands = {function.partition(":")[0] for function in ALL.values()} - {"gateway.cli.main"}
    assert not listing & commands
    assert loaded("exec", "--help") & commands == {"gateway.cli.exec"}


# each takes a command longer to import than to do what it does
HEAVY = {
    "aiohttp",
    "jwt",
    "pydantic",
    "pydantic_settings",
    "rich",
    "starlette",
    "uvicorn",
    "uvloop",
    "tarfile",
}


def test_a_command_in_a_tenant_needs_little() -> None:
    """All that `exec` needs is imported before it begins; the rest is for other commands."""
    script = """
import sys
import gateway.cli.exec, gateway.cli.main
from gateway.cli.invocation import client_of
print(*(name for name in sys.modules))
"""
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())
    assert "websockets.asyncio.client" in loaded.stdout.split()
