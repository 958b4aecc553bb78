"""Commands for this machine: serve, broker, hold, setup, doctor, capacity, the base image."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.cli.asking import run_to_end
from gateway.cli.options import Json
from gateway.settings import load
from gateway.terminal import err, out


def settings_help() -> str:
    """Return every setting with its default, as the help of `serve` prints it."""
    from gateway.settings import Settings

    lines = ["Settings, as environment variables or in the TOML file that GATEWAY_CONFIG names:", ""]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f" [{field.default}]"
        lines.append(f"GATEWAY_{name.upper()}{default}: {field.description}\n")
    return "\n".join(lines)


def serve(
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Replace the running gateway, as `upgrade` does."),
    ] = False,
) -> None:
    """Run the gateway until SIGTERM."""
    from gateway.server import serve as run  # only this command needs uvicorn and uvloop

    run(load(), log_level=log_level, take_over=take_over)


def upgrade(
    back: Annotated[bool, typer.Option("--back", help="Go back to the version before this one.")] = False,
    reload: Annotated[bool, typer.Option("--reload", hidden=True, help="As the unit's ExecReload=.")] = False,
) -> None:
    """Replace the running gateway with this version and the current settings, without a gap.

    Clients get answers all the time, connections resume, and commands keep running. If the new gateway
    cannot serve, the old one keeps running, and this says why.
    """
    from gateway.host import upgrade as upgrading

    if reload:
        upgrading.reload(load(), err.say)
    else:
        upgrading.upgrade(load(), out.say, back=back)


def broker() -> None:
    """Start file workers, end command trees and bind ports for a gateway without root, until SIGTERM.

    It listens at GATEWAY_BROKER_SOCKET, for root and the user GATEWAY_BROKER_USER.
    """
    from gateway.host.broker_service import run

    run(load(), err.say)


def hold() -> None:
    """Keep a gateway's commands running while it restarts, until SIGTERM. Run it as the gateway's user."""
    from gateway.host.holder_process import run

    run(load())


def setup(
    as_json: Json = False,
) -> None:
    """Prepare this host: network, firewall, storage, tenant profile. Idempotent."""
    from gateway.host.setup import setup as run

    changes = run(load(), _silent if as_json else out.say)
    if as_json:
        out.json([{"step": c.step, "changed": c.changed, "detail": c.detail} for c in changes], indent=True)


def doctor(as_json: Json = False) -> None:
    """Check that the gateway runs and has all it needs; change nothing. Exit code 1 if not."""
    from gateway.host.doctor import doctor as run

    found = run(load())
    if as_json:
        out.json(
            [{"what": f.what, "ok": f.ok, "detail": f.detail, "hint": f.hint} for f in found], indent=True
        )
    else:
        for finding in found:
            out.say(str(finding))
    if not all(finding.ok for finding in found):
        raise typer.Exit(1)


def capacity(as_json: Json = False) -> None:
    """Show how many more tenants of each size fit on this host, and what runs out first."""
    from gateway.limits.capacity import host_memory, lines, look
    from gateway.runtime.incus import IncusRuntime

    async def run() -> None:
        settings = load()
        async with IncusRuntime(settings) as runtime:
            report = await look(runtime, settings, host_memory())
        if as_json:
            out.json(report.to_dict(), indent=True)
        else:
            for line in lines(report):
                out.say(line)

    run_to_end(run())


def image_build(
    rebuild: Annotated[bool, typer.Option(help="Build it even if this definition was built before.")] = False,
) -> None:
    """Build the base image and import it into Incus."""
    from gateway.host.image import build

    build(load(), out.say, rebuild=rebuild)


def _silent(line: str) -> None:
    pass
