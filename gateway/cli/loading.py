"""Lazy loading: a table of commands becomes click groups, and a command's module is imported when it runs."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.abc import InspectLoader
from types import CodeType
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


@dataclass(frozen=True)
class Command:
    """A function as a command: parameters are arguments and options, the docstring is the help."""

    function: str
    """`module:function`"""
    epilog: str = ""
    """`module:function` that returns the end of the `--help` text"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of click's context"""
    kind: str = ""
    """`module:class` of click's command, if it parses its arguments differently"""


@dataclass(frozen=True)
class Group:
    """Subcommands of one command."""

    help: str
    commands: Table


Table = Mapping[str, str | Command | Group]
"""Commands by name, in the order of the help; a string is the `function` of a `Command`."""

STYLE: Final[dict[str, Any]] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}


def group_of(table: Table) -> type[TyperGroup]:
    """Return the class of a group with the commands of a table, for `typer.Typer(cls=…)`."""

    class OfTable(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands.update({name: _entry(name, entry) for name, entry in table.items()})

    return OfTable


def _entry(name: str, entry: str | Command | Group) -> Any:
    if isinstance(entry, Group):
        about: dict[str, Any] = {"help": entry.help, "short_help": entry.help.removesuffix(".")}
        return group_of(entry.commands)(name=name, **about, no_args_is_help=True, rich_markup_mode=None)
    return _Unloaded(name, Command(entry) if isinstance(entry, str) else entry)


class _Unloaded(TyperCommand):
    """A command's name and summary for lists and help; loads the command when it is run."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name, rich_markup_mode=None)
        self._command = command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.loaded().make_context(info_name, args, parent, **extra)

    def loaded(self) -> Any:
        """Import the function and return it as a click command."""
        command = self._command
        alone = typer.Typer(**STYLE)
        kind = _named(command.kind) if command.kind else None
        epilog = _named(command.epilog)() if command.epilog else None
        settings = dict(command.settings)
        register = alone.command(self.name, cls=kind, epilog=epilog, context_settings=settings)
        register(_named(command.function))
        if not gc.isenabled():  # `gateway.__main__` let it wait for the imports, which stay
            gc.freeze()
            gc.enable()
        return get_command(alone)

    def get_short_help_str(self, limit: int = 45) -> str:
        self.short_help = self.short_help or summary(self._command.function)
        return super().get_short_help_str(limit)


def _named(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def summary(function: str) -> str:
    """Return the first sentence of the docstring of a `module:function` without running the module."""
    module, _, name = function.partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None and isinstance(found.loader, InspectLoader)
    # from the cached bytecode; parsing all modules took 40 ms, and fails now and then before Python 3.11.8
    # beside other threads (python/cpython#106905)
    code = found.loader.get_code(module)
    assert code is not None
    for part in code.co_consts:
        if isinstance(part, CodeType) and part.co_name == name:
            first = inspect.cleandoc(part.co_consts[0]).partition("\n")[0]
            return first.partition(". ")[0].removesuffix(".")
    raise LookupError(function)
