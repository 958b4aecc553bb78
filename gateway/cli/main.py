"""The command line: every command by its name, and how a failure ends it.

Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` ends with the command's own.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Final, NoReturn

import typer
from pydantic import ValidationError

from gateway import __version__
from gateway.cli.confirming import Failed
from gateway.cli.loading import STYLE, Command, Group, Table, group_of
from gateway.errors import ExecFailed, GatewayError
from gateway.terminal import err, out, set_in
from gateway_client import Disconnected

# by name, in the order in which `--help` lists them; each loads only itself
COMMANDS: Final[Table] = {
    "serve": Command("gateway.cli.host:serve", epilog="gateway.cli.host:settings_help"),
    "broker": "gateway.cli.host:broker",
    "setup": "gateway.cli.host:setup",
    "doctor": "gateway.cli.host:doctor",
    "capacity": "gateway.cli.host:capacity",
    "image": Group("The tenants' base image.", {"build": "gateway.cli.host:image_build"}),
    "token": "gateway.cli.operator:token",
    "audit": "gateway.cli.operator:audit",
    "create": "gateway.cli.tenants:create",
    "deploy": "gateway.cli.sites:deploy",
    "deployments": "gateway.cli.former:deployments",
    "rollback": "gateway.cli.former:rollback",
    "env": "gateway.cli.former:env",
    "migrate": "gateway.cli.sites:migrate",
    "list": "gateway.cli.tenants:list_tenants",
    "start": "gateway.cli.tenants:start",
    "stop": "gateway.cli.tenants:stop",
    "restart": "gateway.cli.tenants:restart",
    "destroy": "gateway.cli.tenants:destroy",
    "snapshot": "gateway.cli.tenants:snapshot",
    "restore": "gateway.cli.tenants:restore",
    "clone": "gateway.cli.tenants:clone",
    "rename": "gateway.cli.tenants:rename",
    "resize": "gateway.cli.tenants:resize",
    "history": "gateway.cli.history:history",
    "undo": "gateway.cli.history:undo",
    "logs": "gateway.cli.watching:logs",
    "metrics": "gateway.cli.watching:metrics",
    "events": "gateway.cli.watching:events",
    "exec": Command("gateway.cli.exec:exec", settings={"allow_interspersed_args": False}),
}

app = typer.Typer(
    name="incus-gateway",
    help="One websocket in front of Incus tenant containers: commands, file tools, deploys, events.",
    cls=group_of(COMMANDS),
    no_args_is_help=True,
    **STYLE,
)


def main() -> NoReturn:
    """Run the command line; failures end as one line and exit code 1."""
    try:
        app()
    except Disconnected as error:
        _fail(
            f"{error.message}\nIs the gateway running? `incus-gateway serve` starts it; --url names another."
        )
    except ExecFailed as error:
        _fail(error.message, int(error.facts.get("exitCode", 1)))
    except GatewayError as error:
        _fail(error.message)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            err.say(f"setting GATEWAY_{name}: {problem['msg']}")
        sys.exit(1)
    except PermissionError as error:
        _fail(f"{error.strerror}: {error.filename}; run it as root")
    except Failed as failed:
        _fail(str(failed))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # a fault of ours; what it names may be a tenant's
        err.say(set_in(traceback.format_exc()))
        sys.exit(1)
    sys.exit(0)


def _fail(message: str, code: int = 1) -> NoReturn:
    err.say(f"incus-gateway: {set_in(message)}")
    sys.exit(code)


def _version(show: bool) -> None:
    if show:
        out.say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass
