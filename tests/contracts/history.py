"""History by turns over a live gateway, which a subclass gives as in `contracts.gateway`.

`tenant` is new for each test. `gateway` has turns that rest after a moment.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from typing import Any

import pytest
from mcp import MCPError

from gateway.history.recorder import COARSE
from tests.constants import constants
from tests.contracts.claude import call
from tests.contracts.gateway import sse
from tests.contracts.mcp import BOTH, mcp
from tests.live import LiveGateway, RpcFailure, Wire
from tests.waits import until_time

QUICK: Mapping[str, str] = constants(
    {"gateway.history.recorder.TURN_REST": 2.0, "gateway.history.repository.TURN_FILE_MAX": 100_000}
)


HOSTILE = r"""set -e
git init -q -b main .
git config user.email a@b
printf '#!/bin/sh\ntouch $PWD/hooked\n' > .git/hooks/reference-transaction
cp .git/hooks/reference-transaction .git/hooks/post-index-change
chmod +x .git/hooks/*
printf '* text=auto eol=crlf filter=x ident\n' > .gitattributes
git config filter.x.clean 'touch filtered; cat'
printf 'a\r\nb\n$Id$\n' > mixed
mkfifo fifo
git init -q nested
touch nested/n
head -c 200000 /dev/zero > big
touch -- '-rf' "$(printf 'a\nb')" '*'
mkdir node_modules
touch node_modules/x
ln -s /etc up
"""


async def write(wire: Wire, path: str, text: str) -> None:
    is_error, said = await call(wire, "Write", {"file_path": path, "content": text})
    assert not is_error, said


async def bash(wire: Wire, command: str) -> str:
    is_error, said = await call(wire, "Bash", {"command": command})
    assert not is_error, said
    return said


async def end(wire: Wire) -> dict[str, Any]:
    turn: dict[str, Any] = (await wire.call("turn/end"))["turn"]
    return turn


async def text(wire: Wire, path: str) -> str:
    found: str = (await wire.call("files/read", path=path))["text"]
    return found


def told(wire: Wire) -> list[Any]:
    return [one.params["data"] for one in wire.notifications if one.params.get("type") == "turn.committed"]


async def event(wire: Wire, kind: str, **facts: Any) -> None:
    """Wait until an event is told, of which history hears then too."""

    def heard() -> bool:
        events = [one.params for one in wire.notifications if one.params.get("type") == kind]
        return any(facts.items() <= one["data"].items() for one in events)

    await wire.until(heard)


class HistoryContract:
    async def test_a_turn_is_told_shown_undone_and_gone_back_to(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """What two turns did is listed with agent and prompt, shown as a patch, and both ways are open."""
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["turn.*"])
            await write(wire, "page.html", "one\n")
            await write(wire, "kept.css", "body {}\n")
            await end(wire)
            assert await wire.call("turn/begin", title="Make it\ngreen", agent="Claude <c@x>") == {
                "before": None
            }
            await write(wire, "page.html", "two\n")
            await write(wire, "new.html", "new\n")
            turn = await end(wire)
            assert (turn["title"], turn["agent"], turn["by"]) == ("Make it\ngreen", "Claude c@x", "test")
            assert (turn["kind"], turn["files"], turn["added"], turn["removed"]) == ("turn", 2, 2, 1)
            await wire.until(lambda: turn in told(wire))
            listed = (await wire.call("history/list"))["turns"]
            assert listed[0] == turn
            assert (listed[1]["title"], listed[1]["files"]) == ("Untitled", 2)
            shown = await wire.call("history/diff", turn=turn["turn"])
            assert {"path": "page.html", "added": 1, "removed": 1, "binary": False} in shown["changed"]
            assert "-one\n+two\n" in shown["diff"] and not shown["truncated"]

            undone = (await wire.call("history/restore", turn=turn["turn"], to="before"))["turn"]
            assert (undone["title"], undone["kind"]) == ("Undo: Make it", "restored")
            assert await text(wire, "page.html") == "one\n"
            with pytest.raises(RpcFailure) as caught:
                await text(wire, "new.html")
            assert caught.value.code == "not_found"
            again = (await wire.call("history/restore", turn=turn["turn"]))["turn"]
            assert again["title"] == "Restore: Make it"
            assert (await text(wire, "page.html"), await text(wire, "new.html")) == ("two\n", "new\n")
            assert await wire.call("history/restore", turn=turn["turn"]) == {"turn": None}

    async def test_a_command_s_changes_are_its_session_s(self, gateway: LiveGateway, tenant: str) -> None:
        """What another session at work wrote by a file tool is not in the turn of a Bash."""
        async with gateway.wire(tenant) as one, gateway.wire(tenant) as other:
            await write(one, "base", "base\n")
            await end(one)
            await write(one, "mine", "mine\n")
            await bash(other, "rm base; mkdir deep; echo x > deep/theirs; ln -s nowhere link")
            theirs, mine = await end(other), await end(one)
            changed = {
                entry["path"] for entry in (await one.call("history/diff", turn=theirs["turn"]))["changed"]
            }
            assert changed == {"base", "deep/theirs", "link"}
            assert mine["files"] == 1

    async def test_a_turn_ends_by_itself_once_its_session_rests(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """Neither a client that never heard of turns nor one that went away loses one."""
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["turn.committed"])
            await write(wire, "rested", "x\n")
            await wire.until(lambda: "Untitled" in [turn["title"] for turn in told(wire)])
            async with gateway.wire(tenant) as gone:
                await gone.call("turn/begin", title="went away")
                await write(gone, "gone", "x\n")
            await wire.until(lambda: "went away" in [turn["title"] for turn in told(wire)])

    async def test_what_was_changed_without_a_turn_is_kept_when_one_is_undone(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """A person's change to the same file is a turn of its own, and other files stay as they are."""
        async with gateway.wire(tenant) as wire:
            await write(wire, "a", "before\n")
            await end(wire)
            await write(wire, "a", "agent\n")
            turn = await end(wire)
            await wire.call("files/write", path="a", text="person\n")
            await wire.call("files/write", path="upload", text="a visitor's\n")
            await wire.call("history/restore", turn=turn["turn"], to="before")
            assert (await text(wire, "a"), await text(wire, "upload")) == ("before\n", "a visitor's\n")
            listed = (await wire.call("history/list"))["turns"]
            assert [one["kind"] for one in listed[:2]] == ["restored", "outside"]
            await wire.call("history/restore", turn=listed[1]["turn"])
            assert await text(wire, "a") == "person\n"

    async def test_an_undo_takes_back_one_turn_and_keeps_what_came_later(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """What a person saved since in the same file stays, and a later turn; overlaps are listed."""
        before = "".join(f"line {number}\n" for number in range(9))
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["turn.committed"])
            await write(wire, "page", before)
            await end(wire)
            await wire.call("turn/begin", title="Green", agent="Claude")
            await write(wire, "page", before.replace("line 1", "green"))
            await write(wire, "new", "1\n")
            turn = await end(wire)
            await wire.call("turn/begin", title="Later")
            await write(wire, "page", before.replace("line 1", "green").replace("line 4", "later"))
            await end(wire)
            now = before.replace("line 1", "green").replace("line 4", "later").replace("line 8", "person")
            await wire.call("files/write", path="page", text=now)
            done = await wire.call("history/undo", turn=turn["turn"])
            assert done["conflicts"] == []
            undone = done["turn"]
            facts = (undone["kind"], undone["title"], undone["by"], undone["files"])
            assert facts == ("restored", "Undo: Green", "test", 2)
            await wire.until(lambda: undone in told(wire))
            assert await text(wire, "page") == now.replace("green", "line 1")
            with pytest.raises(RpcFailure) as caught:
                await text(wire, "new")
            assert caught.value.code == "not_found"
            assert await wire.call("history/undo", turn=turn["turn"]) == {"turn": None, "conflicts": []}
            redone = (await wire.call("history/undo", turn=undone["turn"]))["turn"]
            assert redone["title"] == "Redo: Green" and await text(wire, "page") == now

            mine = now.replace("green", "blue")
            await wire.call("files/write", path="page", text=mine)
            listed = {"turn": None, "conflicts": ["page"]}
            for force in ([], ["new", "nowhere"]):
                assert await wire.call("history/undo", turn=turn["turn"], force=force) == listed
            assert (await text(wire, "page"), await text(wire, "new")) == (mine, "1\n")
            done = await wire.call("history/undo", turn=turn["turn"], force=["page"])
            assert done["conflicts"] == [] and await text(wire, "page") == before
            await wire.call("history/undo", turn=done["turn"]["turn"])
            assert await text(wire, "page") == mine

    async def test_what_a_person_saved_before_a_turn_is_there_when_it_is_undone(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """It is on record before the agent changes it, and what is saved elsewhere meanwhile stays."""
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["turn.committed"])
            await write(wire, "begun", "x\n")
            await end(wire)
            await wire.call("files/write", path="page", text="a person's\n")
            await wire.until(lambda: "Saved page" in [turn["title"] for turn in told(wire)])
            await wire.call("turn/begin", title="edit")
            await write(wire, "page", "an agent's\n")
            turn = await end(wire)
            await wire.call("files/write", path="other", text="a person's\n")
            await wire.until(lambda: "Saved other" in [turn["title"] for turn in told(wire)])
            await wire.call("history/restore", turn=turn["turn"], to="before")
            assert [await text(wire, path) for path in ("page", "other")] == ["a person's\n"] * 2
            listed = (await wire.call("history/list"))["turns"]
            assert [(one["kind"], one["title"]) for one in listed[:4]] == [
                ("restored", "Undo: edit"),
                ("outside", "Saved other"),
                ("turn", "edit"),
                ("outside", "Saved page"),
            ]
            await wire.call("history/restore", turn=listed[1]["turn"], to="before")
            names = [entry["path"] for entry in (await wire.call("files/list", path="."))["entries"]]
            # a turn of later, here the undo, is taken back with it
            assert "other" not in names and await text(wire, "page") == "an agent's\n"

    async def test_what_a_person_saved_a_moment_before_an_agent_writes_is_on_record(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """Whether it writes by a file tool or by a command, and also where its turn was open before."""
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["file.written"])
            await write(wire, "begun", "x\n")
            await end(wire)
            await write(wire, "first", "x\n")
            for path, change in (("page", None), ("style", 'echo "an agent\'s" >style')):
                await wire.call("files/write", path=path, text="a person's\n")
                await event(wire, "file.written", path=path)
                await (write(wire, path, "an agent's\n") if change is None else bash(wire, change))
            turn = await end(wire)
            assert turn["files"] == 3
            listed = (await wire.call("history/list"))["turns"]
            assert [one["title"] for one in listed[1:3]] == ["Saved style", "Saved page"]
            await wire.call("history/restore", turn=turn["turn"], to="before")
            assert [await text(wire, path) for path in ("page", "style")] == ["a person's\n"] * 2

    async def test_what_a_terminal_or_a_command_changed_is_in_no_turn_of_an_agent(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """It is on record by itself, before the next turn changes anything, and stays when that is undone."""
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["exec.started"])
            await write(wire, "base", "x\n")
            await end(wire)
            shell = await wire.call("exec/start", argv=["/bin/sh"], pty={"cols": 80, "rows": 24})
            await event(wire, "exec.started", exec=shell["exec"])
            await wire.stdin(shell["channel"], b"echo a person >typed; echo do''ne\n")
            await wire.until(lambda: b"done" in wire.output[shell["channel"], 1])
            await wire.call("turn/begin", title="edit")
            await write(wire, "typed", "an agent\n")
            turn = await end(wire)
            listed = (await wire.call("history/list"))["turns"]
            assert [(one["kind"], one["title"], one["by"]) for one in listed[:2]] == [
                ("turn", "edit", "test"),
                ("outside", "Changed in a terminal", "test"),
            ]
            await wire.call("history/restore", turn=turn["turn"], to="before")
            assert await text(wire, "typed") == "a person\n"

            # a command of a client, and a turn that nobody has announced
            ran = await wire.call("exec/start", argv=["sh", "-c", "echo built >out"])
            await wire.exited(ran["exec"])
            await event(wire, "exec.started", exec=ran["exec"])
            await bash(wire, "echo an agent >out")
            turn = await end(wire)
            listed = (await wire.call("history/list"))["turns"]
            assert listed[1]["title"] == "Changed by sh -c echo built >out"
            await wire.call("history/restore", turn=turn["turn"], to="before")
            assert await text(wire, "out") == "built\n"

    @pytest.mark.parametrize("helper", [True, False], ids=["helper", "command"])
    async def test_what_prints_all_the_time_has_nobody_s_work(
        self, gateway: LiveGateway, tenant: str, helper: bool
    ) -> None:
        """As a language server does: an agent's turn, what people save, move and remove stay theirs."""
        serve = "while :; do echo x; [ ! -e go ] || { echo own >cache; rm go; }; sleep 0.02; done"
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["exec.started", "turn.committed"])
            for path in ("moved", "gone"):
                await write(wire, path, "1\n")
            await end(wire)
            server = await wire.call("exec/start", argv=["sh", "-c", serve], helper=helper)
            await event(wire, "exec.started", exec=server["exec"])
            await wire.call("turn/begin", title="Agent")
            await write(wire, "page", "an agent's\n")
            await wire.call("files/write", path="saved", text="a person's\n")
            turn = await end(wire)
            await wire.until(lambda: "Saved saved" in [one["title"] for one in told(wire)])
            await wire.call("files/move", **{"from": "moved", "to": "there"})
            await wire.call("files/remove", path="gone")
            await wire.until(lambda: "Changed 3 files" in [one["title"] for one in told(wire)])
            shown = await wire.call("history/diff", turn=turn["turn"])
            assert [one["path"] for one in shown["changed"]] == ["page"]
            await wire.call("turn/begin", title="Shell")
            await bash(wire, "echo an agent >shell")
            await wire.call("files/write", path="go", text="")
            await bash(wire, "while [ -e go ]; do sleep 0.01; done; echo an agent >more")
            turn = await end(wire)
            listed = {one["title"]: one for one in (await wire.call("history/list"))["turns"]}
            assert not [title for title in listed if helper and "while" in title]
            changed = (await wire.call("history/diff", turn=listed["Saved saved"]["turn"]))["changed"]
            assert [one["path"] for one in changed] == ["saved"]
            changed = (await wire.call("history/diff", turn=turn["turn"]))["changed"]
            assert {"shell", "more"} <= {one["path"] for one in changed}
            await wire.call("exec/cancel", exec=server["exec"])

    async def test_what_changes_between_the_commands_of_a_turn_is_nobody_s(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """The site's process, a formatter: it is on record apart, and stays when the turn is undone."""
        site = "read x; echo own >site; rm other/old; mkdir d; echo own >d/site; echo done; read x"
        async with gateway.wire(tenant) as wire:
            await write(wire, "other/old", "1\n")
            await write(wire, "folder/kept", "1\n")
            await end(wire)
            helper = await wire.call("exec/start", argv=["sh", "-c", site], stdin=True, helper=True)
            await wire.call("turn/begin", title="Shell")
            await bash(wire, "echo 1 >one; mv folder renamed")
            await until_time(time.time() + COARSE)
            await wire.stdin(helper["channel"], b"\n")
            await wire.until(lambda: b"done" in wire.output[helper["channel"], 1])
            await until_time(time.time() + COARSE)
            await bash(wire, "echo 2 >two")
            turn = await end(wire)
            changed = (await wire.call("history/diff", turn=turn["turn"]))["changed"]
            assert {one["path"] for one in changed} == {"one", "two", "folder/kept", "renamed/kept"}
            before = (await wire.call("history/list"))["turns"][1]
            assert (before["kind"], before["by"], before["title"]) == (
                *("outside", "nobody"),
                "Changed outside of turns",
            )
            changed = (await wire.call("history/diff", turn=before["turn"]))["changed"]
            assert {one["path"] for one in changed} == {"site", "other/old", "d/site"}
            await wire.call("history/undo", turn=turn["turn"])
            listed = await bash(wire, "find . -type f -not -path './.git*' | sort | tr '\\n' ' '")
            assert listed.split() == ["./d/site", "./folder/kept", "./site"]
            await wire.call("exec/cancel", exec=helper["exec"])

    async def test_what_several_change_in_one_file_during_a_turn_is_told_apart(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """A person's save and another agent's edit between two of a turn are theirs, and outlive its undo."""
        lines = [f"line {number}" for number in range(12)]

        def page(**changed: str) -> str:
            return "".join(f"{changed.get(line.replace(' ', ''), line)}\n" for line in lines)

        async with gateway.wire(tenant) as one, gateway.wire(tenant) as other:
            await write(one, "page", page())
            await end(one)
            for wire, title in ((one, "One"), (other, "Other")):
                await wire.call("turn/begin", title=title)
            await write(one, "page", page(line0="one"))
            await one.call("files/write", path="page", text=page(line0="one", line3="person"))
            await write(other, "page", page(line0="one", line3="person", line6="other"))
            await write(one, "other", "one\n")
            await end(other)
            await end(one)
            turns = (await one.call("history/list"))["turns"]
            by_title = [turn for turn in turns if turn["title"] == "One"]
            assert len(by_title) == 2, "what it did before the save, and after"
            for turn in by_title:
                assert (await one.call("history/undo", turn=turn["turn"]))["conflicts"] == []
            assert await text(one, "page") == page(line3="person", line6="other")
            for turn in [turn for turn in turns if turn["title"] == "Other"]:
                assert (await one.call("history/undo", turn=turn["turn"]))["conflicts"] == []
            assert await text(one, "page") == page(line3="person")

    async def test_what_was_asked_for_is_carried_out_though_its_client_is_gone(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """The end of a turn is its record, and an undo leaves no half of the files."""
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["turn.committed"])
            async with gateway.wire(tenant) as gone:
                await gone.call("turn/begin", title="Agent")
                await write(gone, "page", "1\n")
                await gone.start_call("turn/end")
            await wire.until(lambda: "Agent" in [turn["title"] for turn in told(wire)])
            turn = next(one for one in told(wire) if one["title"] == "Agent")
            async with gateway.wire(tenant) as gone:
                await gone.start_call("history/undo", turn=turn["turn"])
            await wire.until(lambda: "Undo: Agent" in [turn["title"] for turn in told(wire)])
            names = [entry["path"] for entry in (await wire.call("files/list", path="."))["entries"]]
            assert "page" not in names

    async def test_hostile_trees_and_repositories_do_not_matter(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """Hooks, filters, attributes and faults of the site's own repository are nothing to ours."""
        async with gateway.wire(tenant) as wire:
            await write(wire, "start", "x\n")
            await end(wire)
            await bash(wire, HOSTILE)
            turn = await end(wire)
            shown = await wire.call("history/diff", turn=turn["turn"])
            names = {entry["path"] for entry in shown["changed"]}
            assert {"-rf", "a\\nb", "*", "mixed", "up", ".gitattributes"} <= names
            assert not names & {"fifo", "big", "node_modules/x", "nested/n", "hooked", "filtered"}
            assert {"big", "nested/"} <= set(turn["leftOut"])
            await bash(wire, "rm mixed; git checkout -q -b other; rm -rf .git/objects; echo > .git/HEAD")
            broke = await end(wire)
            await wire.call("history/restore", turn=broke["turn"], to="before")
            found = await bash(wire, "base64 mixed; ls -a")
            assert base64.b64encode(b"a\r\nb\n$Id$\n").decode() in found
            assert "hooked" not in found and "filtered" not in found

    async def test_a_broken_history_begins_again(self, gateway: LiveGateway, tenant: str) -> None:
        """A tenant that breaks the record of its turns loses those before, and no turn after."""
        async with gateway.wire(tenant) as wire:
            await write(wire, "a", "1\n")
            await end(wire)
            place = await self.place(gateway, tenant)
            breaks = "echo x > {}/index", "find {}/objects -type f -delete", "rm -rf {}/refs", "rm -rf {}"
            for how in breaks:
                await bash(wire, f"{how.format(place)}; date +%N > a")
                turn = await end(wire)
                assert (await wire.call("history/list"))["turns"][0] == turn

    async def place(self, gateway: LiveGateway, tenant: str) -> str:
        """Return where a tenant's commands find its history."""
        return "/home/site/.local/state/incus-gateway/history.git"

    async def test_bad_asks_are_refused_with_words(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            assert await wire.call("history/list") == {"turns": [], "more": False}
            assert await wire.call("turn/end") == {"turn": None}
            for method in ("history/diff", "history/restore", "history/undo"):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(method, turn="0" * 40)
                assert caught.value.code == "not_found"
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(method, turn="HEAD")
                assert caught.value.code == "invalid_params"
            await write(wire, "a", "1\n")
            await end(wire)
            first = (await wire.call("history/list"))["turns"][-1]
            for method, asked in (("restore", {"to": "before"}), ("undo", {})):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(f"history/{method}", turn=first["turn"], **asked)
                assert caught.value.code == "conflict"
            for force in (["x"] * 1001, ["x" * 4097], [""], "x"):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call("history/undo", turn=first["turn"], force=force)
                assert caught.value.code == "invalid_params"
        reader = gateway.token(tenant, scopes=("files:read",))
        async with gateway.wire(tenant, token=reader) as wire:
            await wire.call("history/list")
            for method in ("turn/begin", "turn/end"):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(method)
                assert caught.value.code == "forbidden"
            for method in ("history/restore", "history/undo"):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(method, turn=first["turn"])
                assert caught.value.code == "forbidden"

    async def test_http_has_the_same(self, gateway: LiveGateway, tenant: str) -> None:
        base, session = f"/v1/tenants/{tenant}", {"X-Tool-Session": "agent"}
        async with gateway.http(tenant) as http:
            for content in ("one\n", "two\n"):
                asked = {"title": f"Write {content.strip()}"}
                async with http.post(f"{base}/turn", json=asked, headers=session) as answer:
                    assert answer.status == 200, await answer.text()
                body = {"file_path": "h", "content": content}
                async with http.post(f"{base}/tools/Write", json=body, headers=session) as answer:
                    assert answer.status == 200
            async with http.delete(f"{base}/turn", headers=session) as answer:
                turn = (await answer.json())["turn"]
                assert turn["title"] == "Write two"
            async with http.get(f"{base}/history?limit=1") as answer:
                assert await answer.json() == {"turns": [turn], "more": True}
            async with http.get(f"{base}/history?before={turn['turn']}") as answer:
                assert (await answer.json())["turns"][0]["title"] == "Write one"
            async with http.get(f"{base}/history/{turn['turn']}") as answer:
                assert "+two" in (await answer.json())["diff"]
            async with http.post(f"{base}/history/{turn['turn']}/restore", json={"to": "before"}) as answer:
                assert (await answer.json())["turn"]["kind"] == "restored"
            async with http.get(f"{base}/files/h") as answer:
                assert await answer.text() == "one\n"
            async with http.get(f"{base}/history?limit=1") as answer:
                undo = f"{base}/history/{(await answer.json())['turns'][0]['turn']}/undo"
            async with http.put(f"{base}/files/h", data=b"mine\n") as answer:
                assert answer.status == 200
            async with http.post(undo) as answer:
                assert (answer.status, await answer.json()) == (200, {"turn": None, "conflicts": ["h"]})
            async with http.post(undo, json={"force": ["h"]}) as answer:
                done = await answer.json()
                assert (done["turn"]["kind"], done["conflicts"]) == ("restored", [])
            async with http.get(f"{base}/files/h") as answer:
                assert await answer.text() == "two\n"
        async with gateway.http("t-other") as http:
            async with http.get(f"{base}/history") as answer:
                assert answer.status == 404
            async with http.post(f"{base}/turn") as answer:
                assert answer.status == 404

    async def test_a_turn_of_a_tenant_that_is_stopped_is_recorded_when_it_runs_again(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """Whether it rests before the tenant is stopped, while it is, or afterwards."""
        async with gateway.http(tenant) as http:
            async with gateway.wire(tenant) as wire:
                await write(wire, "first", "x\n")
                await end(wire)
                events = await http.get("/v1/events?type=turn.committed")
                await write(wire, "late", "x\n")
                async with http.post(f"/v1/tenants/{tenant}/stop") as answer:
                    assert answer.status == 200
            async with http.post(f"/v1/tenants/{tenant}/start") as answer:
                assert answer.status == 200
            (told,) = await sse(events, 1, 60)
            turn = told["data"]["data"]["turn"]
            async with http.get(f"/v1/tenants/{tenant}/history/{turn}") as answer:
                assert [one["path"] for one in (await answer.json())["changed"]] == ["late"]

    @BOTH
    async def test_mcp_has_turns_as_resources(self, gateway: LiveGateway, tenant: str, version: str) -> None:
        async with mcp(gateway, tenant, version, X_Tool_Session="m") as client, gateway.wire(tenant) as wire:
            assert [one.uri for one in (await client.list_resources()).resources] == ["history:///turns"]
            await write(wire, "m", "one\n")
            turn = (await end(wire))["turn"]
            listed = (await client.read_resource("history:///turns")).contents[0]
            assert turn in listed.model_dump()["text"]
            shown = (await client.read_resource(f"history:///turns/{turn}")).contents[0]
            assert "+one" in shown.model_dump()["text"]
            assert "UndoTurn" in [tool.name for tool in (await client.list_tools()).tools]
            await wire.call("files/write", path="m", text="two\n")
            for asked, conflicts in (({}, ["m"]), ({"force": ["m"]}, [])):
                done = await client.call_tool("UndoTurn", {"turn": turn, **asked})
                assert done.structured_content is not None and not done.is_error
                assert done.structured_content["conflicts"] == conflicts
            refused = await client.call_tool("UndoTurn", {"turn": "0" * 40})
            assert refused.is_error and (refused.structured_content or {})["code"] == "not_found"
            for uri in ("history:///turns/nothing", f"history:///turns/{'0' * 40}", "file:///etc/passwd"):
                with pytest.raises(MCPError):
                    await client.read_resource(uri)

    async def test_calls_go_on_while_turns_are_recorded(self, gateway: LiveGateway, tenant: str) -> None:
        """None of the changes is lost, whichever turn has it."""
        async with gateway.wire(tenant) as wire:
            ends = []
            for number in range(10):
                await write(wire, f"f{number}", "x\n")
                ends.append((await wire.start_call("turn/end"))[1])
            await asyncio.gather(*ends)
            names = set()
            for turn in (await wire.call("history/list"))["turns"]:
                shown = await wire.call("history/diff", turn=turn["turn"])
                names |= {entry["path"] for entry in shown["changed"]}
            assert names == {f"f{number}" for number in range(10)}
