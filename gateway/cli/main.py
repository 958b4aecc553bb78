"""The command line: every command by its name, and how a failure ends it.

Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` ends with the command's own.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from gateway import __version__
from gateway.cli import exec, host, operator, sites, tenants, watching
from gateway.cli.confirming import Failed
from gateway.errors import ExecFailed, GatewayError
from gateway.terminal import err, out, set_in
from gateway_client import Disconnected

app = typer.Typer(
    name="incus-gateway",
    help="One websocket in front of Incus tenant containers: commands, file tools, deploys, events.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
image_app = typer.Typer(no_args_is_help=True, help="The tenants' base image.", rich_markup_mode=None)
app.add_typer(image_app, name="image")

# in the order in which `--help` lists them
app.command(epilog=host.settings_help())(host.serve)
app.command()(host.broker)
app.command()(host.setup)
app.command()(host.doctor)
app.command()(host.capacity)
image_app.command("build")(host.image_build)
app.command()(operator.token)
app.command()(operator.audit)
app.command()(tenants.create)
app.command()(sites.deploy)
app.command()(sites.migrate)
app.command("list")(tenants.list_tenants)
app.command()(tenants.start)
app.command()(tenants.stop)
app.command()(tenants.restart)
app.command()(tenants.destroy)
app.command()(tenants.snapshot)
app.command()(tenants.restore)
app.command()(tenants.clone)
app.command()(tenants.rename)
app.command()(tenants.resize)
app.command()(watching.logs)
app.command()(watching.metrics)
app.command()(watching.events)
app.command(context_settings={"allow_interspersed_args": False})(exec.exec)


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
