"""`incus-gateway upgrade`: replaces the running gateway without a gap for its clients, or changes nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gateway.host import HostError, Report, successor
from gateway.host.gateway_process import GatewayProcess
from gateway.host.place import Place
from gateway.settings import Settings


def upgrade(settings: Settings, report: Report, *, back: bool) -> None:
    """Have this installation take over with the current settings or, with `back`, the previous installation.

    Raises `HostError` with the reason if the new gateway does not serve; the old one then keeps running.
    """
    process = GatewayProcess(settings, Place(settings.state_dir), None, _program(), {})
    if not process.can_be_replaced():
        raise HostError(
            f"no running gateway of {settings.state_dir} can be replaced; start one: deploy/quickstart"
        )
    try:
        if back:
            report(f"back in {process.back(report)}")
        else:
            process.replace(Path(sys.prefix), report)
    except HostError as error:
        raise HostError(f"nothing has changed, the old gateway keeps running: {error.message}") from error
    report(f"replaced, pid {process.pid()}")


def reload(settings: Settings, report: Report) -> None:
    """Start the successor inside the unit, for its `ExecReload=`. Raises `HostError`."""
    if not successor.possible(settings.state_dir):
        raise HostError("no running gateway can be replaced; restart the unit")
    successor.start(_program(), os.environ, None, report, patience=settings.upgrade_patience)


def _program() -> Path:
    return Path(sys.executable).with_name("incus-gateway")
