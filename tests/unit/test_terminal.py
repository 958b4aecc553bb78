"""What tenants wrote, on the operator's terminal and in the log; every command beside a hostile gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pty
import re
import signal
import sys
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import WSMsgType, web

from gateway.cli import main as cli
from gateway.terminal import LogCleaner, LogFormatter, clean, encoded, line
from tests.live import SECRET

ROOT = Path(__file__).parents[2]
# a window title, a question that the terminal answers as if typed, C1's way to say ESC [, an order of
# direction, back to the line's begin, a line of its own, an invisible tag, and DEL
EVIL = "\x1b]0;owned\x07\x1b[6n\x9b2J\u202egnp.exe\rforged\u2028\U000e0041\x7f"
HARMFUL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f]"
)
LOG = EVIL.encode() + b"\xff\x1b[1mbold\x1b[0m\n"
SEEN = "\\x1b]0;owned"
IN_JSON = "\\u001b]0;owned"


# --- the words themselves -----------------------------------------------------------------------------


def test_what_steers_a_terminal_is_seen_instead() -> None:
    assert clean(EVIL) == ("\\x1b]0;owned\\x07\\x1b[6n\\x9b2J\\u202egnp.exe\\rforged\\u2028\\U000e0041\\x7f")
    assert clean("a\tb\r\nc\n") == "a\tb\nc\n"
    assert line("a\tb\r\nc\n") == "a\\tb\\nc\\n"
    assert clean("\x1b[1;31mred\x1b[0m") == "red"
    assert clean("a\udcff") == "a\\udcff"


@pytest.mark.parametrize(
    "text", ["Grüße, 日本語\u3000とス", "👩\u200d👩\u200d👧", "می\u200cخواهم", "❤\ufe0f", "a\\x1b"]
)
def test_what_people_write_stays(text: str) -> None:
    assert clean(text) == text


def test_no_control_and_no_order_of_direction_is_forgotten() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        kind, direction = unicodedata.category(char), unicodedata.bidirectional(char)
        if kind in ("Cc", "Zl", "Zp", "Cs") or direction in (
            "LRE",
            "RLE",
            "PDF",
            "LRO",
            "RLO",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        ):
            assert (clean(char) == char) is (char in "\t\n"), hex(code)


def test_json_means_the_same_and_steers_nothing() -> None:
    value = {"name": EVIL, EVIL: [1, "plain"]}
    for indent in (False, True):
        text = encoded(value, indent=indent)
        assert orjson.loads(text) == value
        assert not HARMFUL.search(text)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_log_in_pieces_is_cleaned_as_a_whole(size: int) -> None:
    text = f"one\r\n{EVIL}\x1b[32mgreen\x1b[0m ü日 end\r"
    data, lines = text.encode() + b"\xff", LogCleaner()
    pieces = [lines.cleaned(data[at : at + size]) for at in range(0, len(data), size)]
    whole = b"".join([*pieces, lines.cleaned(b"", last=True)]).decode()
    assert whole == clean(text) + "\\xff"
    assert not HARMFUL.search(whole)


# --- the log ------------------------------------------------------------------------------------------


def test_no_text_passes_for_a_record() -> None:
    forged = f"{EVIL}\n2026-01-01 00:00:00,000 INFO gateway: all is well\n<3>x"
    try:
        raise ValueError(forged)
    except ValueError:
        record = logging.LogRecord("gateway.x", logging.ERROR, "f", 1, "of %s", (forged,), sys.exc_info())
    said = LogFormatter().format(record)
    assert not HARMFUL.search(said)
    first, *rest = said.split("\n")
    assert "all is well" in first and SEEN in first
    assert rest.pop(0) == "Traceback (most recent call last):"
    assert rest and all(one.startswith("    ") for one in rest)


# --- every command ------------------------------------------------------------------------------------


class Hostile:
    """A gateway that answers everything with what steers terminals, or refuses with it."""

    def __init__(self) -> None:
        self.refuses = False
        self.asked: list[tuple[str, str]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        if request.path.endswith("/ws"):
            return await self._socket(request)
        if self.refuses:
            body = {"code": "not_found", "title": EVIL, "detail": f"first {EVIL}\nsecond", "status": 404}
            return web.json_response(body, status=404, content_type="application/problem+json")
        if request.path == "/readyz":
            return web.json_response({"detail": EVIL}, status=503)
        if request.path == "/v1/events":
            return await self._events(request)
        if request.path.endswith("/logs"):
            return web.Response(body=LOG)
        return web.json_response(self._value(request))

    def _value(self, request: web.Request) -> Any:
        snapshot = {"name": f"s{EVIL}", "created": EVIL}
        tenant: dict[str, Any] = {
            "name": EVIL,
            "status": EVIL,
            "address": EVIL,
            "domain": EVIL,
            "limits": {"memory": EVIL},
        }
        tenant |= {"url": EVIL, "port": EVIL, "usage": {"processes": EVIL}}
        tenant |= {"created": EVIL, "asleep": False, "snapshots": [], "type": EVIL, "template": EVIL}
        path = request.path
        if path == "/v1/tenants":
            return {"tenants": [tenant, {**tenant, "name": "shop"}]}
        if path == "/v1/templates":
            return {"templates": [{"name": EVIL, "description": EVIL}, {"name": EVIL, "error": EVIL}]}
        if path.endswith("/site"):
            return {"answers": False, "status": None, "reason": "host_refused", "said": EVIL}
        if path == "/v1/audit":
            facts = {"path": EVIL, EVIL: EVIL}
            return {
                "entries": [
                    {"id": 1, "time": 1.0, "who": EVIL, "action": EVIL, "tenant": EVIL, "facts": facts}
                ]
            }
        if path.endswith("/snapshots"):
            return {"snapshots": [snapshot]} if request.method == "GET" else snapshot
        if path.endswith("/metrics"):
            return {EVIL: EVIL}
        if path.endswith("/move"):
            return {"id": EVIL, "tenant": EVIL, "from": EVIL, "to": EVIL, "state": "moved", "gap_ms": 1}
        error = {"code": "failed", "message": f"{EVIL}\nforged", "phase": EVIL}
        deployment = {"id": "d1", "tenant": EVIL, "domain": EVIL, "url": EVIL, "kind": "create", "phases": [],
                      "state": "rolledback", "error": error, "created": 1.0, "rollback": None, "env": [EVIL],
                      "template": EVIL}  # fmt: skip
        if path.endswith("/deployments") and request.method == "GET":
            return {"deployments": [deployment], "live": EVIL, "kept": [{"id": EVIL}]}
        if path.endswith("/env") and request.method == "GET":
            return {"names": [EVIL], "env": {EVIL: EVIL}}
        if "/deployments" in path or path.endswith(("/publish", "/rollback", "/env")):
            return deployment
        return tenant

    async def _events(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        log = {"deployment": "d1", "phase": "install", "lines": [EVIL, f"{EVIL} last"]}
        done = {"deployment": "d1", "phase": "expose", "ms": 1, "address": EVIL, "port": EVIL}
        told: list[tuple[str, dict[str, Any]]] = [
            ("deployment.started", {"deployment": "d1"}),
            ("deployment.phase.log", log),
            ("deployment.phase.finished", done),
            ("deployment.rolledback", {"deployment": "d1"}),
        ]
        for number, (kind, data) in enumerate(told, 1):
            event = {"id": number, "type": kind, "time": EVIL, "tenant": EVIL, "source": "x", "data": data}
            await answer.write(
                f"id: {number}\nevent: {kind}\ndata: ".encode() + orjson.dumps(event) + b"\n\n"
            )
        await answer.write_eof()
        return answer

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("gateway.v1",))
        await socket.prepare(request)
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            asked = orjson.loads(message.data)
            error = {
                "code": -32000,
                "message": f"{EVIL}\nforged",
                "data": {"code": "exec_failed", "exitCode": 127},
            }
            await socket.send_str(
                orjson.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}).decode()
            )
        return socket


@pytest.fixture
async def hostile() -> AsyncIterator[tuple[Hostile, str]]:
    gateway = Hostile()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", gateway.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield gateway, f"{host}:{port}"
    await runner.cleanup()


DEPLOY = ["deploy", "d.example", "--template", "x"]
# by which each command is tried; those without words are of the host and show nothing that a tenant wrote
COMMANDS: dict[str, list[list[str]]] = {
    "serve": [],
    "upgrade": [],
    "broker": [],
    "hold": [],
    "setup": [],
    "image": [],
    "capacity": [],
    "cluster": [],
    "migrate": [],
    "token": [["token", "--revoke", EVIL]],
    "doctor": [["doctor"], ["doctor", "--json"]],
    "audit": [["audit"], ["audit", "--json"]],
    "create": [["create", EVIL]],
    "deploy": [DEPLOY, [*DEPLOY, "--json"]],
    "list": [["list"], ["list", "--json"]],
    "templates": [["templates"], ["templates", "--json"]],
    "info": [["info", "shop"], ["info", "shop", "--json"]],
    "open": [["open", "shop"]],
    "cp": [["cp", "shop:a", "."], ["cp", "/dev/null", "shop:a"]],
    "man": [["man"]],
    "start": [["start", "shop"]],
    "stop": [["stop", "shop"]],
    "sleep": [["sleep", "shop"]],
    "restart": [["restart", "shop"]],
    "destroy": [["destroy", "shop", "--yes"], ["destroy", EVIL]],
    "snapshot": [[*("snapshot", "shop"), *more] for more in ([], ["--list"], ["--list", "--json"])],
    "restore": [["restore", "shop", "s"]],
    "clone": [["clone", "shop", "new"]],
    "move": [["move", "shop", "m2"]],
    "rename": [["rename", "shop", "d.example"]],
    "resize": [["resize", "shop", "medium"]],
    "deployments": [["deployments", "shop"], ["deployments", "shop", "--json"]],
    "publish": [["publish", "shop", "www.example"]],
    "rollback": [["rollback", "shop"]],
    "env": [["env", "shop"], ["env", "shop", "--values"], ["env", "shop", "set", "A=1"]],
    "history": [["history", "shop"], ["history", "shop", "a" * 40]],
    "undo": [["undo", "shop", "--yes"]],
    "logs": [["logs", "shop"]],
    "metrics": [["metrics", "shop"], ["metrics", "shop", "--json"]],
    "events": [["events"], ["events", "--json"]],
    "exec": [["exec", "shop", "--", "true"]],
    "completion": [["completion", "bash"]],
}  # fmt: skip
# these say nothing of what the gateway answers where all goes well
SILENT = {
    *("start", "stop", "sleep", "restart", "destroy", "restore", "clone", "rename"),
    *("token", "completion", "man"),
}
LOCAL = {"doctor", "completion", "man"}  # whose gateway gives no reason then
# an event stream that ended is begun again: what was printed by then is enough
ENDLESS = {"events"}

_ALL = """
import json, sys
from gateway.cli import main as cli
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    for output in (sys.stdout, sys.stderr):
        output.write("=====\\n")
        output.flush()
    cli.run()
"""


def test_every_command_is_tried() -> None:
    assert cli.COMMANDS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("refuses", [False, True], ids=["answers", "refuses"])
async def test_nothing_of_a_tenants_steers_the_terminal(
    hostile: tuple[Hostile, str], tmp_path: Path, refuses: bool
) -> None:
    gateway, address = hostile
    gateway.refuses = refuses
    tried = [words for of in COMMANDS.values() for words in of if words[0] not in ENDLESS]
    out, err = await _run(tried, address, tmp_path)
    outs, errs = out.split("=====\n")[1:], err.split("=====\n")[1:]
    assert len(outs) == len(errs) == len(tried)
    for words, said, complained in zip(tried, outs, errs, strict=True):
        assert not HARMFUL.search(said + complained), words
        assert "Traceback" not in complained, (words, complained)
        if words[0] not in (LOCAL if refuses else SILENT):  # the test does reach what it is about
            assert SEEN in said + complained or IN_JSON in said, (words, said, complained)
        # what would be a line of its own is set in
        assert not re.search("^(forged|second)", said + complained, re.MULTILINE), words


async def test_nothing_of_an_event_steers_the_terminal(hostile: tuple[Hostile, str], tmp_path: Path) -> None:
    for words in COMMANDS["events"]:
        process = await _start([words], hostile[1], tmp_path)
        assert process.stdout is not None
        async with asyncio.timeout(30):
            said = b"".join([await process.stdout.readline() for _ in range(4)]).decode()
        process.kill()
        await process.communicate()
        assert IN_JSON in said and not HARMFUL.search(said)


async def test_nothing_steers_a_real_terminal(hostile: tuple[Hostile, str], tmp_path: Path) -> None:
    """Where colours and moves of the cursor are ours, and a deployment is drawn while it runs."""
    tried = [["list"], ["audit"], DEPLOY, ["logs", "shop"]]
    said = (await _at_a_terminal(tried, hostile[1], tmp_path)).decode()
    # colours, and the cursor that Live hides, shows and moves up
    ours = re.sub(r"\x1b\[(?:[0-9;]*m|\?25[lh]|2K|1A)|\r(?=\n|\x1b\[2K|\x1b\[1A)|\r", "", said)
    assert not HARMFUL.search(ours)
    assert SEEN in said and "owned\x07" not in said and "\x1b[6n" not in said


async def test_a_log_is_raw_into_a_pipe_alone(hostile: tuple[Hostile, str], tmp_path: Path) -> None:
    out, _ = await _run([["logs", "shop", "--raw"]], hostile[1], tmp_path, errors="surrogateescape")
    assert (
        out.partition("=====\n")[2].encode(errors="surrogateescape")
        == EVIL.encode() + b"\xff\x1b[1mbold\x1b[0m\n"
    )
    said = (await _at_a_terminal([["logs", "shop", "--raw"]], hostile[1], tmp_path)).decode()
    assert "for a pipe" in said and "owned" not in said


async def test_who_destroys_is_asked_or_says_so(hostile: tuple[Hostile, str], tmp_path: Path) -> None:
    gateway, address = hostile
    _, err = await _run([["destroy", "shop"]], address, tmp_path)
    assert "nothing was destroyed" in err and "incus-gateway destroy shop --yes" in err
    assert gateway.asked == []
    for typed, destroyed in ((b"n\n", 0), (b"\n", 0), (b"\x04", 0), (b"y\n", 1)):
        gateway.asked.clear()
        said = (await _at_a_terminal([["destroy", "shop"]], address, tmp_path, typed)).decode()
        assert ", 1 snapshot)? Its files are gone for good. [y/N]" in said and SEEN in said
        assert ("nothing was destroyed" in said) is not bool(destroyed)
        assert gateway.asked.count(("DELETE", "/v1/tenants/shop")) == destroyed


@pytest.mark.parametrize(
    ("words", "question", "path"),
    [
        (["restore", "shop", "s1"], "to s1? All later changes are lost. [y/N]", "snapshots/s1/restore"),
        (["stop", "shop"], "Stop shop? Its site is down until it is started again. [y/N]", "stop"),
    ],
    ids=["restore", "stop"],
)
async def test_who_changes_much_is_asked_at_a_terminal(
    hostile: tuple[Hostile, str], tmp_path: Path, words: list[str], question: str, path: str
) -> None:
    """And nowhere else, nor with --yes."""
    gateway, address = hostile
    gateway.asked.clear()
    done = ("POST", f"/v1/tenants/shop/{path}")
    said = (await _at_a_terminal([words], address, tmp_path, b"\n")).decode()
    assert question in said and re.search("nothing was (changed|stopped)", said)
    assert done not in gateway.asked
    await _at_a_terminal([[*words, "--yes"]], address, tmp_path)
    assert gateway.asked.count(done) == 1
    await _run([words], address, tmp_path)
    assert gateway.asked.count(done) == 2


async def test_an_interrupt_is_an_answer_too(hostile: tuple[Hostile, str], tmp_path: Path) -> None:
    """Ctrl-C at a question ends the command at once, and nothing is done."""
    gateway, address = hostile
    gateway.asked.clear()
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "destroy", "shop"),
        env=_environment(address, tmp_path),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    said = b""
    while b"[y/N]" not in said:
        said += await asyncio.to_thread(os.read, master, 65536)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 30) == 130
    os.close(master)
    assert ("DELETE", "/v1/tenants/shop") not in gateway.asked


def _environment(address: str, folder: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")},
        "GATEWAY_CONFIG": "/nonexistent",
        "GATEWAY_LISTEN": address,
        "GATEWAY_SECRET": SECRET,
        "GATEWAY_STATE_DIR": str(folder),
        "GATEWAY_RUNTIME": "local",
        "TERM": "xterm-256color",
        "COLUMNS": "400",
    }


async def _start(
    tried: list[list[str]], address: str, folder: Path, **streams: Any
) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _ALL, orjson.dumps(tried).decode()),
        env=_environment(address, folder),
        **{"stdin": asyncio.subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **streams},
    )


async def _run(tried: list[list[str]], address: str, folder: Path, errors: str = "strict") -> tuple[str, str]:
    process = await _start(tried, address, folder)
    out, err = await asyncio.wait_for(process.communicate(), 100)
    return out.decode(errors=errors), err.decode(errors=errors)


async def _at_a_terminal(tried: list[list[str]], address: str, folder: Path, typed: bytes = b"") -> bytes:
    master, slave = pty.openpty()
    try:
        process = await _start(tried, address, folder, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        os.write(master, typed)
        said = bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):  # what reading gives once nobody holds the other end
                while piece := os.read(master, 65536):
                    said.extend(piece)

        await asyncio.wait_for(asyncio.to_thread(read), 60)
        await asyncio.wait_for(process.wait(), 10)
    finally:
        os.close(master)
    return bytes(said)


def test_nobody_prints_around_it() -> None:
    """One room writes to the operator's terminal. `bun` runs before anything is installed, of no tenant;
    `detection` answers the gateway by a pipe.
    """
    around = re.compile(
        r"(?<!\.)\bprint\(|sys\.(__)?std(out|err)\b|typer\.(echo|secho|confirm|prompt)|click\."
        r"|StreamHandler|basicConfig|os\.write\([12],|rich\.console import .*\bConsole\b"
    )
    may = {
        "gateway/terminal.py",
        "gateway/host/image.py",
        "gateway/host/toolchain.py",
        "gateway/detection/__main__.py",
    }
    found = []
    for path in sorted((ROOT / "gateway").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if name not in may and around.search(text) and "isatty()" not in text:
                found.append(f"{name}:{number} {text.strip()}")
    assert found == []
