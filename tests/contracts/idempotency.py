"""What was asked for under an id of the caller's is done once, also across a restart of the gateway.

A subclass gives `disposable`, a gateway that may be killed, and `tenant`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from tests.contracts.processes import alive, mark
from tests.live import LiveGateway, RpcFailure, Wire


async def refused(wire: Wire, method: str, **params: Any) -> RpcFailure:
    with pytest.raises(RpcFailure) as caught:
        await wire.call(method, **params)
    return caught.value


async def reborn(gateway: LiveGateway) -> None:
    await gateway.stop(signal.SIGKILL)
    await gateway.start()


class ReceiptsContract:
    async def test_a_call_is_made_once_whatever_dies(self, disposable: LiveGateway, tenant: str) -> None:
        """Its result comes from the store, another input is refused, what only reads is made again."""
        name = f"{mark()}.txt"
        write = {"name": "Write", "arguments": {"file_path": name, "content": "a a a"}, "callId": f"w-{name}"}
        edit: dict[str, Any] = {
            "name": "Edit",
            "arguments": {"file_path": name, "old_string": "a a a", "new_string": "a a"},
            "callId": f"e-{name}",
        }
        bash = {"name": "Bash", "arguments": {"command": f"echo x >> {name}; cat {name}"}, "callId": name}
        read = {"name": "Read", "arguments": {"file_path": name}, "callId": f"r-{name}"}
        async with disposable.wire(tenant) as wire:
            first = [await wire.call("tools/call", **call) for call in (write, edit, bash, read)]
            assert [result["isError"] for result in first] == [False] * 4
        await reborn(disposable)
        async with disposable.wire(tenant) as wire:
            again = [await wire.call("tools/call", **call) for call in (write, edit, bash, read)]
            assert again == first
            other = {**edit, "arguments": {**edit["arguments"], "new_string": "b"}}
            assert (await refused(wire, "tools/call", **other)).code == "conflict"
            await wire.run(argv=["rm", name])

    async def test_a_call_that_a_kill_cut_off_is_not_made_again(
        self, disposable: LiveGateway, tenant: str
    ) -> None:
        name = mark()
        line = f"echo x >> {name}; exec sleep 60"
        asked = {"name": "Bash", "arguments": {"command": line}, "callId": name}
        async with disposable.wire(tenant) as wire:
            await wire.start_call("tools/call", **asked)
            await wire.run(command=f"until [ -s {name} ]; do sleep 0.02; done")
            await disposable.stop(signal.SIGKILL)
        await disposable.start()
        async with disposable.wire(tenant) as wire:
            failure = await refused(wire, "tools/call", **asked)
            assert (failure.code, failure.data["reason"]) == ("gone", "unknown_outcome")
            assert (await wire.run(command=f"cat {name}; rm {name}"))[1] == b"x\n"

    async def test_a_command_is_started_once_whatever_dies(
        self, disposable: LiveGateway, tenant: str
    ) -> None:
        """One that had ended is told as it ended, one that was cut off as lost; neither runs again."""
        name = mark()
        done = {"command": f"echo done >> {name}; exit 3", "execId": f"done-{name}"}
        cut = {"command": f"echo cut >> {name}; exec sleep 60", "execId": f"cut-{name}"}
        async with disposable.wire(tenant) as wire:
            before, out, _ = await wire.run(**done)
            assert (before["exitCode"], out) == (3, b"")
            await wire.call("exec/start", **cut)
            await wire.run(command=f"until grep -q cut {name}; do sleep 0.02; done")
            await disposable.stop(signal.SIGKILL)
        await disposable.start()
        async with disposable.wire(tenant) as wire:
            after, out, _ = await wire.run(**done)
            assert (after, out) == (before, b"")
            assert await wire.call("exec/wait", exec=f"done-{name}") == before
            lost, _, _ = await wire.run(**cut)
            assert (lost["reason"], lost["exitCode"]) == ("lost", None)
            assert lost["offsets"] == {"stdout": 0, "stderr": 0}
            listed = {one["exec"]: one["argv"] for one in (await wire.call("exec/list"))["execs"]}
            for known in (done, cut):
                assert listed[known["execId"]] == ["/bin/bash", "-c", known["command"]]
            other = {"command": "true", "execId": f"done-{name}"}
            assert (await refused(wire, "exec/start", **other)).code == "conflict"
            assert (await wire.run(command=f"cat {name}; rm {name}"))[1] == b"done\ncut\n"

    async def test_a_cancel_that_comes_first_holds(self, disposable: LiveGateway, tenant: str) -> None:
        """On another socket and in another life of the gateway too."""
        name = mark()
        asked = {"name": "Write", "arguments": {"file_path": name, "content": "x"}, "callId": name}
        async with disposable.wire(tenant) as wire:
            assert await wire.call("tools/cancel", callId=name) == {}
            assert (await refused(wire, "exec/cancel", exec=name)).code == "not_found"
            assert (await refused(wire, "tools/call", **asked)).code == "cancelled"
        await reborn(disposable)
        async with disposable.wire(tenant) as wire:
            assert (await refused(wire, "tools/call", **asked)).code == "cancelled"
            start = await refused(wire, "exec/start", argv=["touch", name], execId=name)
            assert start.code == "cancelled"
            assert (await wire.run(argv=["ls", name]))[0]["exitCode"] != 0

    async def test_a_cancel_right_behind_a_start_ends_it(self, disposable: LiveGateway, tenant: str) -> None:
        """However far the start has come by then."""
        async with disposable.wire(tenant) as wire, disposable.wire(tenant) as other:
            for canceller in (wire, other):
                seconds = mark()
                _, start = await wire.start_call("exec/start", argv=["sleep", seconds], execId=f"s-{seconds}")
                _, cancel = await canceller.start_call("exec/cancel", exec=f"s-{seconds}")
                async with asyncio.timeout(60):
                    answers: Sequence[Any] = await asyncio.gather(start, cancel, return_exceptions=True)
                started, cancelled = answers
                if isinstance(started, RpcFailure):  # the cancel came first
                    assert (started.code, cancelled.code) == ("cancelled", "not_found")
                else:
                    assert cancelled["survivors"] == 0
                    assert (await wire.exited(f"s-{seconds}"))["reason"] == "cancelled"
                assert alive(seconds) == 0

    async def test_a_key_makes_an_http_call_once(self, disposable: LiveGateway, tenant: str) -> None:
        name = mark()
        body = {"command": f"echo x >> {name}; cat {name}"}
        url, headers = f"/v1/tenants/{tenant}/tools/Bash", {"Idempotency-Key": name}
        async with disposable.http(tenant) as http:
            said = []
            for _ in range(2):
                async with http.post(url, json=body, headers=headers) as response:
                    said.append(await response.json())
            assert said[0] == said[1]
            assert said[0]["content"][0]["text"] == "x"
            async with http.post(url, json={"command": "true"}, headers=headers) as response:
                assert (response.status, (await response.json())["code"]) == (409, "conflict")
            await http.post(url, json={"command": f"rm {name}"})

    async def test_two_that_ask_at_once_get_one_call(self, disposable: LiveGateway, tenant: str) -> None:
        name = mark()
        asked = {"name": "Bash", "arguments": {"command": f"echo x >> {name}; cat {name}"}, "callId": name}
        async with disposable.wire(tenant) as one, disposable.wire(tenant) as two:
            calls = [one.call("tools/call", **asked), two.call("tools/call", **asked)]
            said = await asyncio.gather(*calls)
            assert said[0] == said[1]
            assert said[0]["content"][0]["text"] == "x"
            await one.run(argv=["rm", name])
