"""A gateway that was forked for the tests is the one that `python -m gateway serve` starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.constants import constants, program
from tests.live import LiveGateway, local_gateway
from tests.waits import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process is started as usual")


def numberless(text: str) -> str:
    return re.sub(r"\bx-\w+|\d+", "N", text)


def process(pid: int) -> dict[str, Any]:
    """Return what the kernel tells of a process, but for numbers that belong to it alone."""
    place = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines())
    return {
        "words": (place / "cmdline").read_bytes(),
        "environment": (place / "environ").read_bytes(),
        **{key: status[key] for key in ("Name", "Umask", "Uid", "Gid", "Groups", "NoNewPrivs")},
        **{key: status[key] for key in ("SigBlk", "SigIgn", "SigCgt", "CapEff", "CapBnd")},
        **{link: os.readlink(place / link) for link in ("cwd", "exe", "root")},
        "limits": (place / "limits").read_text(),
        "cgroup": (place / "cgroup").read_text(),
        "group": os.getpgid(pid),
        "session": os.getsid(pid),
        "nice": os.getpriority(os.PRIO_PROCESS, pid),
        "files": sorted(
            numberless(os.readlink(file).replace(str(pid), "")) for file in (place / "fd").iterdir()
        ),
    }


async def answers(gateway: LiveGateway) -> dict[str, Any]:
    """Return what a gateway answers about itself."""
    found: dict[str, Any] = {}
    async with gateway.http("*", scopes=("admin",)) as http:
        for path in ("/readyz", "/openapi.json", "/v1/tenants", "/metrics"):
            async with http.get(path) as response:
                text = await response.text()
            found[path] = (
                response.status,
                re.findall("# TYPE .*(?<!_created) .*", text) if path == "/metrics" else text,
            )
    async with gateway.wire("demo") as wire:
        command = """
            cat /proc/self/limits
            grep -E '^(Sig|Cap|Umask)' /proc/self/status
            unset GATEWAY_EXEC
            env
            ls -l /proc/self/fd
        """
        exit_, out, err = await wire.run(argv=["sh", "-c", command])
        found["command"] = (exit_["exitCode"], numberless(out.decode()), err)
    return found


async def test_a_forked_gateway_is_as_a_started_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process, its answers, its commands, its log and its end."""
    gateway = await local_gateway(tmp_path, "demo")
    found: dict[bool, Mapping[str, Any]] = {}
    for forking in (False, True):
        monkeypatch.setattr(forks, "enabled", forking)
        gateway.log.unlink(missing_ok=True)
        await gateway.start()
        assert gateway.process is not None and isinstance(gateway.process, forks.Forked) is forking
        answered = await answers(gateway)
        pid = gateway.process.pid
        if forking:  # the sockets of what was asked are closed a moment later

            async def settled(pid: int = pid) -> bool:
                return bool(process(pid)["files"] == found[False]["process"]["files"])

            with contextlib.suppress(AssertionError):  # told below, with what differs
                await until(settled)
        shown = process(pid)
        assert await gateway.stop() == 0
        found[forking] = {
            "process": shown,
            "answers": answered,
            "log": numberless(gateway.log.read_text()),
            "left": sorted(path.name for path in tmp_path.iterdir()),
        }
    for what, started in found[False].items():
        assert found[True][what] == started, what


@pytest.mark.parametrize("forking", [False, True], ids=["started", "forked"])
async def test_an_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forking: bool) -> None:
    monkeypatch.setattr(forks, "enabled", forking)
    gateway = await local_gateway(tmp_path, "demo")
    for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        await gateway.start()
        assert gateway.process is not None and gateway.process.returncode is None
        assert await gateway.stop(number) == code
        assert gateway.process.returncode == code == await gateway.process.wait()
        with pytest.raises(ProcessLookupError):
            gateway.process.kill()


@pytest.fixture(scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("state"), "demo")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0


@pytest.mark.parametrize(
    ("words", "stdin"),
    [
        (("--version",), b""),
        (("token", "--help"), b""),
        (("list", "--json"), b""),
        (("destroy", "demo"), b"no\n"),
        (("exec", "demo", "--", "sh", "-c", "cat; echo wrong >&2; exit 3"), b"x" * (1 << 20)),
        (("nope",), b""),
    ],
)
async def test_a_forked_command_is_as_a_started_one(
    serving: LiveGateway, words: tuple[str, ...], stdin: bytes
) -> None:
    environment = {**serving.environment, "USER": "tester"}
    forked = await forks.run(*words, environment=environment, stdin=stdin)
    started = await asyncio.create_subprocess_exec(
        *forks.PROGRAM, *words, env=environment, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    out, err = await asyncio.wait_for(started.communicate(stdin), 30)
    assert forked == (started.returncode, out, err)


@pytest.mark.parametrize("name", ["PYTHONPATH", "LANG", "FORCE_COLOR", "TZ"])
def test_what_is_read_while_modules_are_imported_is_not_forked(name: str) -> None:
    assert forks.can_start({"PATH": "/bin", "GATEWAY_SECRET": "x"})
    assert not forks.can_start({"PATH": "/bin", name: "x"})


async def test_a_process_has_the_constants_that_a_test_gives_it() -> None:
    environment = {"PATH": os.environ["PATH"], **constants({"gateway.__version__": "9.8.7"})}
    assert await forks.run("--version", environment=environment) == (0, b"9.8.7\n", b"")
    words = program(forks.PROGRAM, environment)
    process = await asyncio.create_subprocess_exec(*words, "--version", env=environment, stdout=PIPE)
    assert (await process.communicate())[0] == b"9.8.7\n"


def test_a_constant_that_is_not_there_is_named() -> None:
    with pytest.raises(AssertionError, match=r"there is no gateway\.execs\.runner\.NONE"):
        constants({"gateway.execs.runner.NONE": 1})
