"""Bash, BashOutput and KillShell over a live gateway, which a subclass gives as in `contracts.gateway`.

What they answer is held by the recorded cases; this is what they leave behind, and who sees what.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from tests.constants import constants
from tests.contracts.claude import call, shell
from tests.contracts.processes import Tree, alive, mark
from tests.live import DEADLINE, LiveGateway, RpcFailure, Wire
from tests.waits import until

QUICK: Mapping[str, str] = {
    "GATEWAY_MAX_SHELLS": "2",
    "GATEWAY_SHELLS_KEPT": "3",
    **constants({"gateway.tools.session.SESSION_IDLE": 2.0}),
    "GATEWAY_BASH_TIMEOUT": "0.5",
    "GATEWAY_BASH_BACKGROUND_TIMEOUT": "3",
    "GATEWAY_BASH_PRINTED_MAX": str(4 << 20),
    "GATEWAY_BASH_OUTPUT_MAX": "200000",
    "GATEWAY_BASH_OUTPUTS_MAX": "500000",
    "GATEWAY_CANCEL_GRACE": "0.2",
}


async def background(wire: Wire, command: str, **more: Any) -> str:
    """Start a command in the background and return its ID."""
    given = {"command": command, "run_in_background": True, **more}
    is_error, text = await call(wire, "Bash", given)
    assert not is_error, text
    return identified(text)


def identified(text: str) -> str:
    match = re.search(r"ID: ([\w-]+)", text)
    assert match is not None, text
    return match[1]


async def printed(wire: Wire, shell_id: str, wanted: str) -> str:
    """Ask BashOutput until `wanted` was printed; return all that came."""
    text = ""

    async def came() -> bool:  # it is a tool that is polled
        nonlocal text
        text += (await call(wire, "BashOutput", {"bash_id": shell_id}))[1]
        return wanted in text

    await until(came)
    return text


class ShellContract:
    async def test_a_cancelled_call_leaves_nothing(self, gateway: LiveGateway, tenant: str) -> None:
        tree = Tree()
        async with gateway.wire(tenant) as wire:
            params = {"name": "Bash", "arguments": {"command": tree.script}}
            number, reply = await wire.start_call("tools/call", **params)
            await tree.grown()
            await wire.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": number}})
            with pytest.raises(RpcFailure) as caught:
                await asyncio.wait_for(reply, DEADLINE)
            assert caught.value.code == "cancelled"
            assert tree.alive() == 0
            assert await call(wire, "Bash", {"command": "echo on"}) == (False, "on")

    async def test_a_closed_socket_leaves_nothing(self, gateway: LiveGateway, tenant: str) -> None:
        """Neither of the command in front nor of those in the background, by timeout or by wish."""
        front, behind, moved = Tree(), Tree(), Tree()
        async with gateway.wire(tenant) as wire:
            await background(wire, behind.script)
            _, text = await call(wire, "Bash", {"command": moved.script, "timeout": 300})
            assert "moved to the background" in text
            _, reply = await wire.start_call("tools/call", name="Bash", arguments={"command": front.script})
            for tree in (front, behind, moved):
                await tree.grown()
        await asyncio.gather(reply, return_exceptions=True)
        await until(lambda: front.alive() + behind.alive() + moved.alive() == 0)

    async def test_an_ended_session_leaves_nothing(self, gateway: LiveGateway, tenant: str) -> None:
        """One with a name too, which another socket shares: it begins anew there."""
        for session in ({}, {"session": "to-end"}):
            tree = Tree()
            async with gateway.wire(tenant, **session) as wire, gateway.wire(tenant, **session) as other:
                await call(wire, "Bash", {"command": "mkdir -p ended && cd ended"})
                await background(wire, tree.script)
                await tree.grown()
                assert await wire.call("session/end") == {}
                assert tree.alive() == 0
                assert await other.call("session/end") == {}
            async with gateway.wire(tenant, **session) as wire:
                assert await call(wire, "Bash", {"command": "basename $PWD"}) == (False, "site")

    async def test_a_dropped_http_request_leaves_nothing(self, gateway: LiveGateway, tenant: str) -> None:
        tree = Tree()
        async with gateway.http(tenant) as http:
            url = f"/v1/tenants/{tenant}/tools/Bash"
            asking = asyncio.create_task(http.post(url, json={"command": tree.script}))
            await tree.grown()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: tree.alive() == 0)

    async def test_after_a_timeout_the_whole_tree_can_be_killed(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        tree = Tree()
        async with gateway.wire(tenant) as wire:
            arguments = {"command": tree.script, "timeout": 300}
            said = await wire.call("tools/call", name="Bash", arguments=arguments)
            shell_id = identified(said["content"][0]["text"])
            assert said["structuredContent"]["shellId"] == shell_id
            await tree.grown()
            assert "ready" in await printed(wire, shell_id, "ready")
            said = await wire.call("tools/call", name="KillShell", arguments={"shell_id": shell_id})
            assert not said["isError"] and tree.alive() == 0
            assert said["structuredContent"]["survivors"] == 0
            assert said["structuredContent"]["killed"] >= Tree.SIZE

    async def test_sessions_do_not_see_each_others_shells(self, gateway: LiveGateway, tenant: str) -> None:
        """But sockets of one named session do, and its shells outlive the first socket."""
        name = f"shared-{mark()}"
        async with (
            gateway.wire(tenant) as one,
            gateway.wire(tenant) as two,
            gateway.wire(tenant, session=name) as third,
        ):
            async with gateway.wire(tenant, session=name) as fourth:
                ids = [
                    await background(wire, f"echo mine {i}; sleep 60") for i, wire in enumerate((one, two))
                ]
                shared = await background(fourth, "echo ours; sleep 60")
            for wire, foreign in ((one, ids[1]), (two, ids[0]), (one, shared), (third, ids[0])):
                for tool, argument in (("BashOutput", "bash_id"), ("KillShell", "shell_id")):
                    is_error, text = await call(wire, tool, {argument: foreign})
                    assert (
                        is_error
                        and text == f"<tool_use_error>No shell found with ID: {foreign}</tool_use_error>"
                    )
            assert "mine 1" in await printed(two, ids[1], "mine")
            assert "ours" in await printed(third, shared, "ours")
            assert not (await call(third, "KillShell", {"shell_id": shared}))[0]

    async def test_the_working_directory_is_the_sessions_for_all_tools(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        folder = f"cwd-{mark()}"
        async with gateway.wire(tenant) as wire, gateway.wire(tenant) as other:
            said = await wire.call(
                "tools/call", name="Bash", arguments={"command": f"mkdir {folder} && cd {folder}"}
            )
            assert said["structuredContent"]["cwd"] == f"/srv/site/{folder}"
            assert not (await call(wire, "Write", {"file_path": "here.txt", "content": "x"}))[0]
            assert await call(wire, "Bash", {"command": "cat here.txt"}) == (False, "x")
            assert (await call(other, "Bash", {"command": "cat here.txt"}))[0]
            # a link that leads out is seen through
            _, text = await call(wire, "Bash", {"command": "ln -s / out; cd out"})
            assert text == "Shell cwd was reset to /srv/site"
            await call(wire, "Bash", {"command": f"cd {folder}"})
            await shell(other, f"rm -r {folder}")
            assert await call(wire, "Bash", {"command": "echo gone"}) == (
                False,
                "gone\nShell cwd was reset to /srv/site",
            )

    async def test_output_can_be_followed_while_the_command_runs(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """`tool.started` names the exec; `exec.started` says that it can be attached to."""
        name = f"go-{mark()}"
        async with gateway.wire(tenant) as wire, gateway.wire(tenant) as viewer:
            await viewer.call("events/subscribe", types=["tool.started", "exec.started"])
            command = f"echo first; echo second >&2; while [ ! -e {name} ]; do sleep 0.05; done; echo last"
            _, reply = await wire.start_call("tools/call", name="Bash", arguments={"command": command})
            event = await viewer.until(lambda: viewer.notified("event", type="tool.started"))
            exec_id = event["data"]["exec"]
            started = await viewer.until(lambda: viewer.notified("event", type="exec.started"))
            assert started["data"]["exec"] == exec_id
            assert started["data"]["command"].startswith("bash -c echo first")
            channel = (await viewer.call("exec/attach", exec=exec_id))["channel"]
            await viewer.until(lambda: viewer.output[channel, 1] == b"first\nsecond\n")
            listed = {one["exec"]: one["offsets"] for one in (await viewer.call("exec/list"))["execs"]}
            assert listed[exec_id] == {"stdout": 13, "stderr": 0}
            await shell(viewer, f": > {name}")
            assert (await viewer.exited(exec_id))["exitCode"] == 0
            assert viewer.output[channel, 1] == b"first\nsecond\nlast\n" and not viewer.output[channel, 2]
            answer = await asyncio.wait_for(reply, DEADLINE)
            assert answer["content"][0]["text"] == "first\nsecond\nlast"
            assert answer["structuredContent"]["exec"] == exec_id

    async def test_the_whole_of_a_large_output_is_readable_and_in_nobodys_way(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        word = f"needle{mark()}"
        async with gateway.wire(tenant) as wire:
            command = f"git init -q . 2>/dev/null; seq 1 400000; echo {word}; echo err >&2"
            said = await wire.call("tools/call", name="Bash", arguments={"command": command})
            facts = said["structuredContent"]
            assert facts["truncated"] and facts["exitCode"] == 0
            file = facts["outputFile"]
            assert file.startswith("/srv/site/.gateway/output/")
            size = len("".join(f"{n}\n" for n in range(1, 400_001))) + len(word) + 5
            assert facts["size"] == size
            inside = file.removeprefix("/srv/site/")
            looks = f"wc -c < {inside}; stat -c %a {inside} .gateway; stat -c %U . {inside} | uniq | wc -l"
            assert await shell(wire, looks) == f"{size}\n600\n700\n1\n".encode()
            is_error, text = await call(wire, "Read", {"file_path": file, "offset": 400_000, "limit": 2})
            assert (is_error, text) == (False, f"400000\t400000\n400001\t{word}")
            for tool, given in (
                ("Glob", {"pattern": "**/*.txt"}),
                ("Grep", {"pattern": word}),
                ("Grep", {"pattern": word, "glob": "*.txt"}),
            ):
                assert inside.rpartition("/")[2] not in (await call(wire, tool, given))[1]
            named = await call(wire, "Grep", {"pattern": word, "path": file, "output_mode": "content"})
            assert named == (False, f"400001:{word}")
            assert inside in (await call(wire, "Glob", {"pattern": ".gateway/**/*.txt"}))[1]
            assert b".gateway" not in await shell(wire, "git status --porcelain --ignored=no || true")

    async def test_bash_output_returns_each_part_once(self, gateway: LiveGateway, tenant: str) -> None:
        """Also a character whose bytes come apart, and filtered lines that come in halves."""
        name = f"part-{mark()}"
        # each part in one write: a shell's own `printf` writes line by line
        part = f"until [ -e {name}-%d ]; do sleep 0.02; done; cat {name}-%d"
        command = f"printf 'a\\303'; {part % (1, 1)}; {part % (2, 2)}"

        async def give(number: int, text: str) -> None:
            await shell(wire, f"printf '{text}' >{name}; mv {name} {name}-{number}")

        async with gateway.wire(tenant) as wire:
            one = await background(wire, command)
            assert "<stdout>\na\n</stdout>" in await printed(wire, one, "a\n")
            await give(1, "\\251b\\nyes 1\\nye")
            assert "<stdout>\néb\nyes 1\nye\n</stdout>" in await printed(wire, one, "ye\n")
            two = await background(wire, command)
            given = {"bash_id": two, "filter": "YES"}
            text = ""
            async with asyncio.timeout(DEADLINE):
                while "yes 1" not in text:
                    text = (await call(wire, "BashOutput", given))[1]
            assert "<stdout>\nyes 1\n</stdout>" in text
            await give(2, "s 2\\n")
            async with asyncio.timeout(DEADLINE):
                while "completed" not in text:
                    text += (await call(wire, "BashOutput", given))[1]
            assert "<stdout>\nyes 2\n</stdout>" in text

    async def test_a_hostile_filter_holds_up_nobody(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            one = await background(wire, "head -c 20000 /dev/zero | tr '\\0' a; echo !")
            await printed(wire, one, "completed")
            async with asyncio.timeout(DEADLINE):
                said = await call(wire, "BashOutput", {"bash_id": one, "filter": "(a+)+$"})
                assert not said[0]

    async def test_only_so_many_run_in_the_background(self, quick: LiveGateway, tenant: str) -> None:
        """And one that can go nowhere at its timeout is ended."""
        tree, seconds = Tree(), mark()
        async with quick.wire(tenant) as wire:
            given = {"command": f"sleep {seconds}", "run_in_background": True, "timeout": 60_000}
            said = await asyncio.gather(*(call(wire, "Bash", given) for _ in range(4)))
            assert sorted(is_error for is_error, _ in said) == [False, False, True, True]
            await until(lambda: alive(seconds) == 2)
            is_error, text = await call(wire, "Bash", {"command": "true", "run_in_background": True})
            assert is_error and "KillShell" in text
            command = tree.script
            said = await wire.call("tools/call", name="Bash", arguments={"command": command, "timeout": 2000})
            assert said["isError"] and said["structuredContent"]["code"] == "timeout"
            assert "ready" in said["content"][0]["text"] and tree.alive() == 0

    async def test_ended_shells_are_forgotten_in_their_order(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.wire(tenant) as wire:
            ids = []
            for number in range(5):
                ids.append(await background(wire, f"echo {number}"))
                await printed(wire, ids[-1], "completed")
            known = [
                "No shell found" not in (await call(wire, "BashOutput", {"bash_id": one}))[1] for one in ids
            ]
            assert known == [False, False, True, True, True]

    async def test_a_background_command_has_an_end(self, quick: LiveGateway, tenant: str) -> None:
        tree = Tree()
        async with quick.wire(tenant) as wire:
            one = await background(wire, tree.script)
            text = await printed(wire, one, "<status>killed</status>")
            assert "ready" in text and tree.alive() == 0  # it is ready when it has grown

    async def test_a_command_that_prints_without_end_is_ended(self, quick: LiveGateway, tenant: str) -> None:
        """In front and in the background; what it printed first is shown."""
        async with quick.wire(tenant) as wire:
            command = {"command": "trap '' TERM; yes no", "timeout": 20_000}
            said = await wire.call("tools/call", name="Bash", arguments=command)
            text = said["content"][0]["text"]
            assert said["isError"] and text.startswith("Exit code 137\nno\nno\n")
            assert text.endswith("it printed more than 4.0MB.")
            one = await background(wire, "yes no", timeout=20_000)
            await printed(wire, one, "<status>killed</status>")

    async def test_output_files_have_a_limit_each_and_together(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.wire(tenant) as wire:
            await shell(wire, "rm -rf .gateway")
            for _ in range(4):
                command = {"command": "head -c 1000000 /dev/zero | tr '\\0' x", "timeout": 20_000}
                said = await wire.call("tools/call", name="Bash", arguments=command)
                assert said["structuredContent"]["size"] == 1_000_000
            sizes = (await shell(wire, "stat -c %s .gateway/output/*")).split()
            assert sizes == [b"200000"] * 2

    async def test_a_workspace_in_which_nothing_can_be_saved_harms_no_command(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        async with gateway.wire(tenant) as wire:
            await shell(wire, "rm -rf .gateway; ln -s /tmp .gateway")
            try:
                is_error, text = await call(wire, "Bash", {"command": "seq 1 100000"})
                assert not is_error and "could not be saved" in text
                one = await background(wire, "seq 1 3")
                assert "1\n2\n3" in await printed(wire, one, "completed")
            finally:
                await shell(wire, "rm .gateway")

    async def test_an_unused_session_ends_with_what_it_runs(self, quick: LiveGateway, tenant: str) -> None:
        seconds = mark()
        headers = {"X-Tool-Session": f"idle-{seconds}"}
        async with quick.http(tenant) as http:
            body = {"command": f"sleep {seconds}", "run_in_background": True, "timeout": 60_000}
            async with http.post(f"/v1/tenants/{tenant}/tools/Bash", json=body, headers=headers) as response:
                assert not (await response.json())["isError"]
        await until(lambda: alive(seconds) == 1)
        await until(lambda: alive(seconds) == 0)

    async def test_a_named_session_lives_while_a_socket_is_open_on_it(
        self, quick: LiveGateway, tenant: str
    ) -> None:
        """Past the time after which it would end, and then that long after the socket."""
        seconds, name = mark(), f"held-{mark()}"
        async with quick.wire(tenant, session=name) as wire:
            first = await background(wire, f"sleep {seconds}", timeout=60_000)
            unheld = {"X-Tool-Session": f"other-{name}"}
            body = {"command": f"sleep 1{seconds}", "run_in_background": True, "timeout": 60_000}
            async with quick.http(tenant) as http:
                await http.post(f"/v1/tenants/{tenant}/tools/Bash", json=body, headers=unheld)
            await until(lambda: alive(seconds) == 1 == alive("1" + seconds))
            await until(lambda: alive("1" + seconds) == 0)  # a session that was used later has ended
            assert "running" in (await call(wire, "BashOutput", {"bash_id": first}))[1]
        await until(lambda: alive(seconds) == 0)

    async def test_a_lone_call_has_no_background(self, gateway: LiveGateway, tenant: str) -> None:
        tree = Tree()
        async with gateway.http(tenant) as http:
            url = f"/v1/tenants/{tenant}/tools/Bash"
            async with http.post(url, json={"command": "true", "run_in_background": True}) as response:
                said = await response.json()
                assert said["isError"] and "X-Tool-Session" in said["content"][0]["text"]
            async with http.post(url, json={"command": tree.script, "timeout": 400}) as response:
                said = await response.json()
                facts = said["structuredContent"]
                assert said["isError"] and (facts["code"], facts["reason"]) == ("timeout", "timeout")
                assert tree.alive() == 0

    async def test_they_need_the_scope_exec(self, gateway: LiveGateway, tenant: str) -> None:
        token = gateway.token(tenant, scopes=("files:read", "files:write"))
        async with gateway.wire(tenant, token=token) as wire:
            for name in ("Bash", "BashOutput", "KillShell"):
                with pytest.raises(RpcFailure) as caught:
                    await call(wire, name, {})
                assert caught.value.code == "forbidden"

    async def test_what_cannot_be_run_is_told_to_the_model(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            for command in ("echo a\0b", "x" * 140_000):
                is_error, text = await call(wire, "Bash", {"command": command})
                assert is_error and text.startswith("<tool_use_error>Error calling tool (Bash): ")

    async def test_the_same_call_id_runs_once(self, gateway: LiveGateway, tenant: str) -> None:
        name = f"once-{mark()}"
        async with gateway.wire(tenant) as wire:
            arguments = {"command": f"echo x >> {name}; cat {name}"}
            said = [
                await wire.call("tools/call", name="Bash", arguments=arguments, callId=name) for _ in range(2)
            ]
            assert said[0] == said[1] and said[0]["content"][0]["text"] == "x"

    async def test_the_gateways_end_leaves_nothing(self, disposable: LiveGateway, tenant: str) -> None:
        front, behind = Tree(), Tree()
        async with disposable.wire(tenant) as wire:
            await background(wire, behind.script)
            _, reply = await wire.start_call("tools/call", name="Bash", arguments={"command": front.script})
            await front.grown()
            await behind.grown()
            assert await disposable.stop(signal.SIGTERM) == 0, disposable.log.read_text()
            assert front.alive() + behind.alive() == 0
            await asyncio.gather(reply, return_exceptions=True)
        assert "Traceback" not in disposable.log.read_text()
