"""Runs recorded cases of Claude Code's tools against a live gateway, over its websocket.

Everything that a case wants laid or looked at goes through the same wire, so that the cases run alike on
plain processes and in containers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.live import DEADLINE, LiveGateway, Wire
from tests.waits import until

WORKSPACE = "/srv/site"
CASES: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "claude_cases.jsonl").read_text().splitlines()
]
_LONG = 5.0  # seconds: what sleeps for less may have gone on by the next look on a busy machine
_OF_BASH = ("Bash", "BashOutput", "KillShell")
# the one case of a file tool that needs Bash is run here
BASH_CASES = [case for case in CASES if case["tool"] in _OF_BASH or case["id"] == "read-persisted-output"]


@dataclass
class Outcome:
    """What a case's call answered: the expected text or pattern with its `${NAME}`s filled in."""

    is_error: bool
    text: str
    expected: str
    files: Mapping[str, tuple[str, str] | None]


async def outcomes(
    gateway: LiveGateway, tenants: Sequence[str], shown: Callable[[str, str], str]
) -> dict[str, Outcome | Exception]:
    """Run all cases, one at a time in each of `tenants`, whose workspaces are emptied for them.

    `shown` turns a text of a tenant into what it would be where `/srv/site` is really that.
    """
    cases = iter(BASH_CASES)
    found: dict[str, Outcome | Exception] = {}

    async def work(tenant: str) -> None:
        for case in cases:
            try:
                found[case["id"]] = await run(gateway, tenant, case, lambda text: shown(tenant, text))
            except Exception as error:
                found[case["id"]] = error

    async with asyncio.TaskGroup() as group:
        for tenant in tenants:
            group.create_task(work(tenant))
    return found


async def run(
    gateway: LiveGateway, tenant: str, case: Mapping[str, Any], shown: Callable[[str], str]
) -> Outcome:
    async with gateway.wire(tenant) as wire:
        await shell(wire, "find . -mindepth 1 -delete; " + "; ".join(map(_laid, case["setup"])))
        saved: dict[str, str] = {}
        command = ""
        for step in case.get("before", ()):
            if "wait_ms" in step:
                await _reached(wire, command, step["wait_ms"] / 1000)
            else:
                command = step["input"].get("command", command)
                await _step(wire, step, saved, shown)
        is_error, text = await call(wire, case["tool"], _filled(_unhurried(case), saved))
        expected = case.get("text") or _filled(case.get("match", ""), saved)
        files = {path: await _file(wire, path) for path in case.get("files_after", {})}
        return Outcome(is_error, shown(text), _filled(expected, saved), files)


def _unhurried(case: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the input, with more time where the recorded command ended within a short one.

    A busy machine may need longer. How the number is written stays as it was.
    """
    given: Mapping[str, Any] = case["input"]
    limit = given.get("timeout", 0)
    if not 0 < int(limit) < 60_000 or "timeout" in case.get("text", case.get("match", "")):
        return given
    return {**given, "timeout": type(limit)(int(limit) * 60)}


def check(case: Mapping[str, Any], outcome: Outcome | Exception) -> None:
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome.is_error == case["is_error"], outcome.text
    if "text" in case:
        assert outcome.text == outcome.expected
    else:
        assert re.fullmatch(outcome.expected, outcome.text, re.DOTALL), outcome.text[-1000:]
    for path, want in case.get("files_after", {}).items():
        found = outcome.files[path]
        if want is None:
            assert found is None
        else:
            assert found is not None
            want = {"text": want} if isinstance(want, str) else want
            assert found[0] == want["text"]
            assert found[1] == want.get("mode", found[1])


async def call(wire: Wire, name: str, arguments: Mapping[str, Any]) -> tuple[bool, str]:
    """Call a tool and return whether it failed, and its text."""
    said = await wire.call("tools/call", name=name, arguments=arguments)
    return said["isError"], "\n".join(block["text"] for block in said["content"])


async def shell(wire: Wire, script: str) -> bytes:
    """Run a script past the tools and return its output; it must succeed."""
    exit_, out, err = await wire.run(argv=["sh", "-c", script])
    assert exit_["exitCode"] == 0, err
    return out


def _laid(item: Mapping[str, Any]) -> str:
    path = shlex.quote(item["path"].removeprefix(WORKSPACE + "/"))
    if item.get("dir"):
        return f"mkdir -p {path}"
    data = base64.b64encode(item["text"].encode()).decode()
    return f"mkdir -p $(dirname {path}); echo {data} | base64 -d > {path}"


async def _step(
    wire: Wire, step: Mapping[str, Any], saved: dict[str, str], shown: Callable[[str], str]
) -> None:
    is_error, text = await call(wire, step["tool"], _filled(step["input"], saved))
    assert is_error == step.get("is_error", False), text
    for name, pattern in step.get("save", {}).items():
        match = re.search(pattern, shown(text))
        assert match is not None, text
        saved[name] = match[1]


async def _reached(wire: Wire, command: str, seconds: float) -> None:
    """Return once a command is where the recording had it after `seconds`, however long it takes here.

    That is at its end, or at a `sleep` that lasts longer, with all printed that comes before.
    """
    before, _, rest = command.partition("sleep ")
    lasts = float(rest.partition(";")[0] or 0)
    ends = lasts < seconds
    if not ends and lasts < _LONG:  # to look for where it is would take too long
        return
    first = subprocess.run(["bash", "-c", "" if ends else before], capture_output=True, check=True)
    printed = len(first.stdout + first.stderr)

    async def there() -> bool:
        listed = (await wire.call("exec/list"))["execs"]
        running = [sum(one["offsets"].values()) for one in listed if one["state"] == "running"]
        if ends or not running:
            return not running
        # what is in its file BashOutput has
        return printed in running and int(await shell(wire, "cat .gateway/output/* | wc -c")) >= printed

    await until(there, DEADLINE)


def _filled(value: Any, saved: Mapping[str, str]) -> Any:
    text = json.dumps(value)
    for name, found in saved.items():
        text = text.replace(f"${{{name}}}", found)
    return json.loads(text)


async def _file(wire: Wire, path: str) -> tuple[str, str] | None:
    """Return a file's text and mode, None where there is none."""
    path = shlex.quote(path.removeprefix(WORKSPACE + "/"))
    exit_, out, _ = await wire.run(argv=["sh", "-c", f"stat -c 0%a {path} && cat {path}"])
    if exit_["exitCode"] != 0:
        return None
    mode, _, text = out.decode().partition("\n")
    return text, mode


__all__ = ["BASH_CASES", "CASES", "Outcome", "call", "check", "outcomes", "shell"]
