"""The command line: its table of commands, and how failures are printed.

Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` ends with the command's own.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated, Final, NoReturn

import typer

from gateway.cli.confirming import Failed
from gateway.cli.loading import STYLE, Command, Group, Table, group_of
from gateway.cli.options import PROGRAM, VARIABLE
from gateway.errors import ExecFailed, GatewayError
from gateway.notify import status
from gateway.terminal import OutputClosed, err, leave, out, set_in
from gateway_client.errors import Disconnected

# in the order of `--help`; a command's module is imported when it runs
COMMANDS: Final[Table] = {
    "serve": Command("gateway.cli.host:serve", epilog="gateway.cli.host:settings_help"),
    "upgrade": "gateway.cli.host:upgrade",
    "broker": "gateway.cli.host:broker",
    "hold": "gateway.cli.host:hold",
    "setup": "gateway.cli.host:setup",
    "doctor": "gateway.cli.host:doctor",
    "capacity": "gateway.cli.host:capacity",
    "cluster": Group(
        "The members of a cluster, each a server with a gateway.",
        {
            "enable": "gateway.cli.cluster:enable",
            "add": "gateway.cli.cluster:add",
            "list": "gateway.cli.cluster:list_members",
            "drain": "gateway.cli.moving:drain",
            "restore": "gateway.cli.moving:restore",
            "remove": "gateway.cli.cluster:remove",
            "recover": "gateway.cli.cluster:recover",
            "recover-from-quorum-loss": "gateway.cli.cluster:recover_from_quorum_loss",
        },
    ),
    "image": Group("The tenants' base image.", {"build": "gateway.cli.host:image_build"}),
    "token": "gateway.cli.operator:token",
    "audit": "gateway.cli.operator:audit",
    "create": "gateway.cli.tenants:create",
    "deploy": "gateway.cli.sites:deploy",
    "publish": "gateway.cli.sites:publish",
    "deployments": "gateway.cli.former:deployments",
    "rollback": "gateway.cli.former:rollback",
    "env": "gateway.cli.former:env",
    "templates": "gateway.cli.showing:templates",
    "migrate": "gateway.cli.sites:migrate",
    "list": "gateway.cli.tenants:list_tenants",
    "info": "gateway.cli.showing:info",
    "open": "gateway.cli.showing:open_site",
    "start": "gateway.cli.tenants:start",
    "stop": "gateway.cli.tenants:stop",
    "sleep": "gateway.cli.tenants:sleep",
    "restart": "gateway.cli.tenants:restart",
    "destroy": "gateway.cli.tenants:destroy",
    "snapshot": "gateway.cli.tenants:snapshot",
    "restore": "gateway.cli.tenants:restore",
    "clone": "gateway.cli.tenants:clone",
    "move": "gateway.cli.moving:move",
    "rename": "gateway.cli.tenants:rename",
    "resize": "gateway.cli.tenants:resize",
    "history": "gateway.cli.history:history",
    "undo": "gateway.cli.history:undo",
    "logs": "gateway.cli.watching:logs",
    "metrics": "gateway.cli.watching:metrics",
    "events": "gateway.cli.watching:events",
    "exec": Command(
        "gateway.cli.exec:exec", settings={"allow_interspersed_args": False}, kind="gateway.cli.exec:Words"
    ),
    "cp": "gateway.cli.copying:cp",
    "man": "gateway.cli.manual:man",
    "completion": "gateway.cli.completing:completion",
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
            from gateway.cli.completing import answer_shells

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
