"""Run the broker as a service.

The broker itself is `gateway.rootfs.broker`, which reads no settings. It runs in a separate interpreter,
because workers are forked from it and must not have settings, above all the secret, in their memory.
"""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path
from typing import NoReturn

import orjson

from gateway.host import HostError, Report
from gateway.rootfs.broker_client import BOOT, instances
from gateway.settings import Settings

OPERATIONS = "gateway.tools.worker_operations"


def run(settings: Settings, report: Report) -> NoReturn:
    """Become a broker that serves until SIGTERM. Raises `HostError` if that is impossible.

    Creates the socket's folder writable by root only, so that nobody else can put a socket there.
    """
    path = settings.broker_socket
    if path is None:
        raise HostError("GATEWAY_BROKER_SOCKET is not set; set it for this command and for `serve`")
    if sys.platform != "linux" or os.geteuid() != 0:
        raise HostError("the broker needs root on Linux; without it leave GATEWAY_BROKER_SOCKET unset")
    uids, gid = [], 0
    try:
        user = pwd.getpwnam(settings.broker_user)
        uids, gid = [user.pw_uid], user.pw_gid
    except KeyError:
        report(f"there is no user {settings.broker_user}: serving only root")
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot create {path.parent}: {error.strerror}") from None
    imports = "\n".join(folder or str(Path.cwd()) for folder in sys.path)
    told = {
        "path": str(path),
        "operations": OPERATIONS,
        "tenants": instances(settings).to_dict(),
        "uids": uids,
        "gid": gid,
    }
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8"}
    if "NOTIFY_SOCKET" in os.environ:
        environment["NOTIFY_SOCKET"] = os.environ["NOTIFY_SOCKET"]
    report(f"serving gateways of {', '.join(['root', *([settings.broker_user] if uids else [])])} at {path}")
    words = (
        sys.executable,
        "-ISBc",
        BOOT,
        imports,
        "gateway.rootfs.broker:listening",
        orjson.dumps(told),
    )
    os.execve(sys.executable, words, environment)  # noqa: S606 - our own interpreter with our own words
