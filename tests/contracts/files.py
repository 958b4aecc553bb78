"""The editor's calls over a live gateway: files by websocket and as raw bytes by HTTP, and watching them."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.contracts.processes import mark
from tests.live import LiveGateway, RpcFailure, Wire


async def refused(wire: Wire, method: str, **params: Any) -> RpcFailure:
    """Return the error of a call that must fail."""
    with pytest.raises(RpcFailure) as caught:
        await wire.call(method, **params)
    assert "/var/lib" not in str(caught.value) and "/tmp" not in str(caught.value)
    return caught.value


async def paths(wire: Wire, path: str, depth: int = 1) -> list[str]:
    listed = await wire.call("files/list", path=path, depth=depth)
    assert not listed["truncated"]
    return sorted(entry["path"] for entry in listed["entries"])


class EditorContract:
    async def test_a_file_is_written_read_and_described(self, gateway: LiveGateway, tenant: str) -> None:
        folder = f"w-{mark()}"
        async with gateway.wire(tenant) as wire:
            path = f"{folder}/src/App.tsx"
            missing = await refused(wire, "files/write", path=path, text="x")
            assert missing.code == "not_found"
            written = await wire.call("files/write", path=path, text="grün\r\n", createDirs=True)
            read = await wire.call("files/read", path=f"/srv/site/{path}")
            assert (read["text"], read["encoding"], read["etag"]) == ("grün\r\n", "utf-8", written["etag"])
            entry = await wire.call("files/stat", path=path)
            assert (entry["path"], entry["type"], entry["size"]) == (path, "file", 7)
            assert (entry["mode"], entry["etag"]) == (0o644, written["etag"])
            assert entry["mtime"] > 1_700_000_000
            assert await paths(wire, folder) == [f"{folder}/src"]
            assert await paths(wire, folder, 2) == [f"{folder}/src", path]
            assert (await wire.call("files/stat", path="."))["type"] == "directory"
            _, out, _ = await wire.run(argv=["cat", path])
            assert out == "grün\r\n".encode()

    async def test_bytes_come_back_as_they_were(self, gateway: LiveGateway, tenant: str) -> None:
        name = f"b-{mark()}"
        cases = (bytes(range(256)) * 64, b"\x00", b"caf\xe9", b"\xef\xbb\xbfbom", b"", b"\x01" * 5000)
        async with gateway.wire(tenant) as wire:
            for data in cases:
                encoded = base64.b64encode(data).decode()
                await wire.call("files/write", path=name, data=encoded)
                read = await wire.call("files/read", path=name)
                assert ("text" in read) != ("data" in read)
                back = read["text"].encode() if "text" in read else base64.b64decode(read["data"])
                assert back == data
                assert read["encoding"] == ("utf-8" if "text" in read else "base64")
            assert (await refused(wire, "files/write", path=name, data="*")).code == "invalid_params"
            assert (await refused(wire, "files/write", path=name)).code == "invalid_params"

    async def test_a_stale_etag_is_a_conflict(self, gateway: LiveGateway, tenant: str) -> None:
        name = f"c-{mark()}"
        async with gateway.wire(tenant) as wire:
            first = await wire.call("files/write", path=name, text="one", ifNoneMatch="*")
            exists = await refused(wire, "files/write", path=name, text="no", ifNoneMatch="*")
            assert (exists.code, exists.data["etag"]) == ("conflict", first["etag"])
            edit = {"file_path": name, "old_string": "one", "new_string": "two"}
            await wire.call("tools/call", name="Edit", arguments=edit)
            now = (await wire.call("files/stat", path=name))["etag"]
            assert now != first["etag"]
            stale = await refused(wire, "files/write", path=name, text="three", ifMatch=first["etag"])
            assert (stale.code, stale.data["etag"]) == ("conflict", now)
            stale = await refused(wire, "files/remove", path=name, ifMatch=first["etag"])
            assert (stale.code, stale.data["etag"]) == ("conflict", now)
            second = await wire.call("files/write", path=name, text="three", ifMatch=now)
            await wire.call("files/remove", path=name, ifMatch=second["etag"])
            gone = await refused(wire, "files/write", path=name, text="x", ifMatch=second["etag"])
            assert (gone.code, gone.data["etag"]) == ("conflict", None)

    async def test_folders_and_moves(self, gateway: LiveGateway, tenant: str) -> None:
        top = f"m-{mark()}"
        async with gateway.wire(tenant) as wire:
            made = await wire.call("files/mkdir", path=f"{top}/a/b")
            assert (made["path"], made["type"]) == (f"{top}/a/b", "directory")
            assert (await refused(wire, "files/mkdir", path=f"{top}/a/b")).code == "conflict"
            for name in ("x", "y"):
                await wire.call("files/write", path=f"{top}/{name}", text=name)
            there = await refused(wire, "files/move", **{"from": f"{top}/x", "to": f"{top}/y"})
            assert there.code == "conflict" and there.data["etag"]
            moved = await wire.call("files/move", **{"from": f"{top}/x", "to": f"{top}/y", "overwrite": True})
            assert moved["path"] == f"{top}/y"
            assert (await wire.call("files/read", path=f"{top}/y"))["text"] == "x"
            await wire.call("files/move", **{"from": f"{top}/y", "to": f"{top}/a/b/y"})
            inside = await refused(wire, "files/move", **{"from": f"{top}/a", "to": f"{top}/a/b/a"})
            assert inside.code == "invalid_params"
            lost = await refused(wire, "files/move", **{"from": f"{top}/no", "to": f"{top}/n"})
            assert lost.code == "not_found"
            full = await refused(wire, "files/remove", path=f"{top}/a")
            assert full.code == "conflict"
            assert (await wire.call("files/remove", path=top, recursive=True))["removed"] == 4
            assert (await refused(wire, "files/stat", path=top)).code == "not_found"

    async def test_refusals_have_their_codes(self, gateway: LiveGateway, tenant: str) -> None:
        top = f"r-{mark()}"
        async with gateway.wire(tenant) as wire:
            await wire.call("files/write", path=f"{top}/file", text="x", createDirs=True)
            script = f"cd {top} && mkfifo pipe && ln -s /etc/passwd out && ln -s file in && ln -s / root"
            assert (await wire.run(command=script))[0]["exitCode"] == 0
            cases: tuple[tuple[str, dict[str, Any], str], ...] = (
                ("files/read", {"path": "/etc/passwd"}, "outside_workspace"),
                ("files/read", {"path": "../../../etc/passwd"}, "outside_workspace"),
                ("files/write", {"path": "/srv/site-evil/x", "text": ""}, "outside_workspace"),
                ("files/read", {"path": f"{top}/out"}, "outside_workspace"),
                ("files/list", {"path": f"{top}/root/etc"}, "outside_workspace"),
                ("files/mkdir", {"path": f"{top}/root/tmp/x"}, "outside_workspace"),
                ("files/write", {"path": f"{top}/root/tmp/x", "text": ""}, "outside_workspace"),
                ("files/write", {"path": f"{top}/out", "text": ""}, "not_a_file"),
                ("files/write", {"path": f"{top}/in", "text": ""}, "not_a_file"),
                ("files/read", {"path": f"{top}/pipe"}, "not_a_file"),
                ("files/write", {"path": f"{top}/pipe", "text": ""}, "not_a_file"),
                ("files/read", {"path": top}, "is_a_directory"),
                ("files/write", {"path": top, "text": ""}, "is_a_directory"),
                ("files/list", {"path": f"{top}/file"}, "not_a_file"),
                ("files/stat", {"path": f"{top}/file/x"}, "not_a_file"),
                ("files/stat", {"path": f"{top}/none"}, "not_found"),
                ("files/stat", {"path": ""}, "invalid_params"),
                ("files/stat", {"path": "a\0b"}, "invalid_params"),
                ("files/stat", {"path": "x" * 300}, "invalid_params"),
                ("files/remove", {"path": "."}, "invalid_params"),
                ("files/list", {"path": ".", "depth": 0}, "invalid_params"),
            )
            for method, params, code in cases:
                assert (method, params, (await refused(wire, method, **params)).code) == (
                    method,
                    params,
                    code,
                )
            kinds = await wire.call("files/list", path=top)
            told = {entry["path"].rpartition("/")[2]: entry for entry in kinds["entries"]}
            assert {name: entry["type"] for name, entry in told.items()} == {
                "file": "file",
                "pipe": "other",
                "out": "symlink",
                "in": "symlink",
                "root": "symlink",
            }
            assert (told["in"]["target"], told["out"]["target"]) == (f"{top}/file", None)
            assert (await wire.call("files/read", path=f"{top}/in"))["text"] == "x"
            await wire.call("files/remove", path=top, recursive=True)
            assert (await wire.run(argv=["test", "-s", "/etc/passwd"]))[0]["exitCode"] == 0

    async def test_hostile_trees_are_listed_and_removed(self, gateway: LiveGateway, tenant: str) -> None:
        """A tree deeper than a path can name, 3 000 names, names that are no text: bounded and whole."""
        top = f"h-{mark()}"
        script = f"""
            mkdir {top} && cd {top} && touch "$(printf 'bad\\377')"
            touch "$(printf 'new\\nline')" "$(printf 'e\\033[31m')"
            mkdir many && (cd many && seq 3000 | xargs touch)
            for i in $(seq 300); do d=$(printf 'd%.0s' $(seq 20)); mkdir $d && cd $d || exit 1; done
        """
        async with gateway.wire(tenant) as wire:
            assert (await wire.run(command=script))[0]["exitCode"] == 0
            listed = await wire.call("files/list", path=top)
            names = {entry["path"].removeprefix(top + "/"): entry for entry in listed["entries"]}
            assert names["bad\\xff"]["escaped"] is True
            assert "new\nline" in names and "e\x1b[31m" in names
            await wire.call("files/stat", path=f"{top}/new\nline")
            deep = await wire.call("files/list", path=top, depth=64)
            assert len(deep["entries"]) == 5 + 3000 + 63
            removed = await wire.call("files/remove", path=top, recursive=True)
            assert removed["removed"] == 3 + 3001 + 300 + 1
            assert await paths(wire, ".") == [path for path in await paths(wire, ".") if top not in path]

    async def test_scopes_hold(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant, token=gateway.token(tenant, scopes=("files:read",))) as wire:
            await wire.call("files/list")
            for method, params in (
                ("files/write", {"path": "x", "text": ""}),
                ("files/move", {"from": "x", "to": "y"}),
                ("files/remove", {"path": "x"}),
                ("files/mkdir", {"path": "x"}),
            ):
                assert (await refused(wire, method, **params)).code == "forbidden"
        async with gateway.wire(tenant, token=gateway.token(tenant, scopes=("files:write",))) as wire:
            assert (await refused(wire, "files/read", path="x")).code == "forbidden"

    async def test_a_write_is_told_as_the_tools_tell_theirs(self, gateway: LiveGateway, tenant: str) -> None:
        name = f"t-{mark()}"
        async with gateway.wire(tenant) as wire:
            await wire.call("events/subscribe", types=["file.*"])
            await wire.call("files/write", path=name, text="secret")
            event = await wire.until(lambda: wire.notified("event", type="file.written"))
            assert event["data"] == {"path": name, "by": "test"}

    async def test_too_large_is_told_with_the_limit(self, gateway: LiveGateway, tenant: str) -> None:
        name = f"l-{mark()}"
        async with gateway.wire(tenant) as wire:
            await wire.run(command=f"truncate -s 1T {name} || truncate -s 1G {name}")
            large = await refused(wire, "files/read", path=name)
            assert large.code == "too_large" and large.data["size"] > large.data["limit"]
            large = await refused(wire, "files/write", path=name, text="x" * (9 << 20))
            assert large.code == "too_large" and large.data["limit"] == 8 << 20
            await wire.call("files/remove", path=name)


class FilesContract(EditorContract):
    """All of it."""
