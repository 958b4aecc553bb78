"""The command line: its table of commands, their help and completion, and how failures are printed.

A command's module is imported when the command runs. Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` ends
with the command's own.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.abc import InspectLoader
from types import CodeType
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from gateway.cli.invocation import PROGRAM, VARIABLE, Failed
from gateway.errors import ExecFailed, GatewayError
from gateway.notify import status
from gateway.terminal import OutputClosed, err, leave, out, set_in
from gateway_client.errors import Disconnected


@dataclass(frozen=True)
class LazyCommand:
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
class CommandGroup:
    """Subcommands of one command."""

    help: str
    commands: CommandTable


CommandTable = Mapping[str, str | LazyCommand | CommandGroup]
"""Commands by name, in the order of the help; a string is the `function` of a `Command`."""

STYLE: Final[dict[str, Any]] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}


def group_of(table: CommandTable) -> type[TyperGroup]:
    """Return the class of a group with the commands of a table, for `typer.Typer(cls=…)`."""

    class OfTable(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands.update({name: _entry(name, entry) for name, entry in table.items()})

    return OfTable


def _entry(name: str, entry: str | LazyCommand | CommandGroup) -> Any:
    if isinstance(entry, CommandGroup):
        about: dict[str, Any] = {"help": entry.help, "short_help": entry.help.removesuffix(".")}
        return group_of(entry.commands)(name=name, **about, no_args_is_help=True, rich_markup_mode=None)
    return _Unloaded(name, LazyCommand(entry) if isinstance(entry, str) else entry)


class _Unloaded(TyperCommand):
    """A command's name and summary for lists and help; loads the command when it is run."""

    def __init__(self, name: str, command: LazyCommand) -> None:
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


# --- the manual page ----------------------------------------------------------------------------------------


def man(context: typer.Context) -> None:
    """Print the manual page: incus-gateway man | man -l -

    incus-gateway man >/usr/local/share/man/man1/incus-gateway.1 installs it.
    """
    root = context.find_root()
    out.say("\n".join(_page(root.command, root)))


def _page(group: Any, context: Any) -> Iterator[str]:
    from gateway import __version__

    yield f'.TH INCUS\\-GATEWAY 1 "" "incus-gateway {_roff(__version__)}"'
    yield from (".SH NAME", f"incus\\-gateway \\- {_roff(group.help)}")
    yield from (".SH SYNOPSIS", ".B incus\\-gateway", "COMMAND [OPTION]... [ARGUMENT]...")
    yield ".SH COMMANDS"
    yield from _commands(group, context)
    yield ".SH EXIT STATUS"
    yield "0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 nobody read the output;"
    yield ".B exec\nends with the exit code of its command."
    yield ".SH ENVIRONMENT"
    for name, what in (
        ("GATEWAY_URL", "the gateway to ask, as --url"),
        ("GATEWAY_TOKEN", "the token, as --token"),
        ("GATEWAY_CONFIG", "the file of settings; default: /etc/incus-gateway/gateway.toml"),
    ):
        yield from (".TP", f".B {_roff(name)}", _roff(what))
    yield f"All settings of the gateway are listed by\n.B incus\\-gateway serve \\-\\-help{chr(10)}."


@dataclass(frozen=True, slots=True)
class CommandHelp:
    """What `--help` says of one command: its name with that of its group, its arguments, its options."""

    name: str
    usage: str
    help: str
    options: list[tuple[str, str]]


def command_helps(group: Any, context: Any, before: str = "") -> Iterator[CommandHelp]:
    """Yield every command, those of groups too."""
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if hasattr(found, "list_commands"):
            yield from command_helps(found, context, f"{before}{name} ")
            continue
        command = found.loaded()
        inner = type(context)(command, info_name=name, parent=context)
        records = [
            param.get_help_record(inner) for param in command.get_params(inner) if param.name != "help"
        ]
        usage = " ".join(command.collect_usage_pieces(inner))
        yield CommandHelp(before + name, usage, command.help or "", [record for record in records if record])


def _commands(group: Any, context: Any) -> Iterator[str]:
    for entry in command_helps(group, context):
        yield from (f".SS {_roff(entry.name)} {_roff(entry.usage)}", *_paragraphs(entry.help))
        for words, what in entry.options:
            yield from (".TP", f".B {_roff(words)}", _roff(what) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    for number, part in enumerate(text.split("\n\n")):
        if number:
            yield ".PP"
        yield _roff(" ".join(part.split()))


def _roff(text: str) -> str:
    """Escape text for roff; see groff_char(7) and roff(7)."""
    safe = text.replace("\\", "\\e").replace("-", "\\-").replace("\n", " ")
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe


# --- completion ---------------------------------------------------------------------------------------------


# typer's only registers itself, so that nothing is completed where zsh has just loaded it for the first word
_ZSH: Final = """if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _incus_gateway_completion "$@"
else
  compdef _incus_gateway_completion incus-gateway
fi"""


class CompletionShell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[CompletionShell, typer.Argument(metavar="SHELL", help="bash, zsh or fish")],
) -> None:
    """Print a completion script, for commands, options and tenants.

    bash: incus-gateway completion bash >/etc/bash_completion.d/incus-gateway

    zsh: incus-gateway completion zsh >/usr/local/share/zsh/site-functions/_incus-gateway

    fish: incus-gateway completion fish >~/.config/fish/completions/incus-gateway.fish
    """
    from typer import completion as typers

    # typer does not declare this one and the next as exported
    script = typers.get_completion_script  # type: ignore[attr-defined]
    said = script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value)
    if shell is CompletionShell.ZSH:
        said, _, _ = said.rpartition("compdef ")
        said += _ZSH
    out.say(said)


def answer_shells() -> None:
    """Register the answers to the completion scripts, which set `VARIABLE` when they ask."""
    from typer import completion as typers

    typers.completion_init()  # type: ignore[attr-defined]


# --- the commands -------------------------------------------------------------------------------------------


# in the order of `--help`; a command's module is imported when it runs
COMMANDS: Final[CommandTable] = {
    "serve": LazyCommand("gateway.cli.host:serve", epilog="gateway.cli.host:settings_help"),
    "upgrade": "gateway.cli.host:upgrade",
    "broker": "gateway.cli.host:broker",
    "hold": "gateway.cli.host:hold",
    "setup": "gateway.cli.host:setup",
    "doctor": "gateway.cli.host:doctor",
    "capacity": "gateway.cli.host:capacity",
    "cluster": CommandGroup(
        "The members of a cluster, each a server with a gateway.",
        {
            "enable": "gateway.cli.cluster:enable",
            "add": "gateway.cli.cluster:add",
            "list": "gateway.cli.cluster:list_members",
            "drain": "gateway.cli.cluster:drain",
            "restore": "gateway.cli.cluster:restore",
            "remove": "gateway.cli.cluster:remove",
            "recover": "gateway.cli.cluster:recover",
            "recover-from-quorum-loss": "gateway.cli.cluster:recover_from_quorum_loss",
        },
    ),
    "image": CommandGroup("The tenants' base image.", {"build": "gateway.cli.host:image_build"}),
    "token": "gateway.cli.host:token",
    "audit": "gateway.cli.host:audit",
    "create": "gateway.cli.tenants:create",
    "deploy": "gateway.cli.sites:deploy",
    "publish": "gateway.cli.sites:publish",
    "deployments": "gateway.cli.deployments:deployments",
    "rollback": "gateway.cli.deployments:rollback",
    "env": "gateway.cli.deployments:env",
    "templates": "gateway.cli.tenants:templates",
    "migrate": "gateway.cli.sites:migrate",
    "list": "gateway.cli.tenants:list_tenants",
    "info": "gateway.cli.tenants:info",
    "open": "gateway.cli.tenants:open_site",
    "start": "gateway.cli.tenants:start",
    "stop": "gateway.cli.tenants:stop",
    "sleep": "gateway.cli.tenants:sleep",
    "restart": "gateway.cli.tenants:restart",
    "destroy": "gateway.cli.tenants:destroy",
    "snapshot": "gateway.cli.tenants:snapshot",
    "restore": "gateway.cli.tenants:restore",
    "clone": "gateway.cli.tenants:clone",
    "move": "gateway.cli.cluster:move",
    "rename": "gateway.cli.tenants:rename",
    "resize": "gateway.cli.tenants:resize",
    "history": "gateway.cli.tenants:history",
    "undo": "gateway.cli.tenants:undo",
    "logs": "gateway.cli.tenants:logs",
    "metrics": "gateway.cli.tenants:metrics",
    "events": "gateway.cli.tenants:events",
    "exec": LazyCommand(
        "gateway.cli.exec:exec", settings={"allow_interspersed_args": False}, kind="gateway.cli.exec:Words"
    ),
    "cp": "gateway.cli.copying:cp",
    "man": "gateway.cli.main:man",
    "completion": "gateway.cli.main:completion",
}

app = typer.Typer(
    name=PROGRAM,
    help="One websocket in front of Incus tenant containers: commands, file tools, deploys, events.",
    cls=group_of(COMMANDS),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **STYLE,
)


def main() -> NoReturn:
    """Run the command line, and exit the process with its code."""
    leave(run())


def run() -> int:
    """Run the command line and return its exit code. A failure prints one line."""
    try:
        if VARIABLE in os.environ:
            from gateway.cli.main import answer_shells

            answer_shells()
        app(prog_name=PROGRAM)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except Disconnected as error:
        hint = "is it running? `incus-gateway serve` starts one, --url names another"
        return _failed(f"{error.message}; {hint}")
    except ExecFailed as error:
        return _failed(error.message, int(error.facts.get("exitCode", 1)))
    except GatewayError as error:
        hint = "; `incus-gateway list` shows all" if error.message.startswith("no tenant ") else ""
        return _failed(error.message + hint)
    except PermissionError as error:
        return _failed(f"{error.strerror}: {error.filename}; run it as root")
    except OSError as error:
        return _failed(": ".join(str(part) for part in (error.strerror or error, error.filename) if part))
    except Failed as failed:
        return _failed(str(failed))
    except OutputClosed:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        # otherwise it is a bug here; the file that it names may be a tenant's
        wrong = _wrong_settings(error)
        for line in wrong or [set_in(traceback.format_exc())]:
            err.say(line)
        status("; ".join(wrong) or f"{type(error).__name__}: {error}")
        return 1
    return 0


def _failed(message: str, code: int = 1) -> int:
    err.say(f"incus-gateway: {set_in(message)}")
    status(message)
    return code


def _wrong_settings(error: Exception) -> list[str]:
    """Return what is wrong with the settings, if this error is about them."""
    loaded = sys.modules.get("pydantic")  # if it is not imported, no settings were checked
    if loaded is None or not isinstance(error, loaded.ValidationError):
        return []
    problems = error.errors(include_url=False, include_input=False)
    names = ("_".join(str(part) for part in problem["loc"]).upper() for problem in problems)
    return [
        f"setting GATEWAY_{name}: {problem['msg']}" for name, problem in zip(names, problems, strict=True)
    ]


def _version(show: bool) -> None:
    if show:
        from gateway import __version__

        out.say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass
