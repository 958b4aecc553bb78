"""The editor's calls over a live gateway: files by websocket and as raw bytes by HTTP, and watching them."""

from __future__ import annotations

import asyncio
import base64
import filecmp
import io
import itertools
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from tests import thorough
from tests.contracts.processes import mark
from tests.live import LiveGateway, RpcFailure, Wire
from tests.waits import pause, until


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
                ("files/move", {"from": top, "to": f"{top}/in/x"}, "invalid_params"),
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


class TransferContract:
    async def test_bytes_go_up_and_down(self, gateway: LiveGateway, tenant: str) -> None:
        url = f"/v1/tenants/{tenant}/files/u-{mark()}/deep"
        data = os.urandom(3_000_001)
        async with gateway.http(tenant) as http:
            async with http.put(f"{url}/a b%25.bin", data=io.BytesIO(data)) as response:
                assert response.status == 201
                first = response.headers["ETag"]
                assert await response.json() == {"etag": first.strip('"'), "size": len(data), "created": True}
            async with http.get(f"{url}/a b%25.bin") as response:
                assert (response.status, response.headers["ETag"]) == (200, first)
                assert response.content_type == "application/octet-stream"
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                assert int(response.headers["Content-Length"]) == len(data)
                assert await response.read() == data
            async with http.head(f"{url}/a b%25.bin") as response:
                assert int(response.headers["Content-Length"]) == len(data)
                assert await response.read() == b""
            async with http.put(f"{url}/a b%25.bin", data=b"") as response:
                assert response.status == 200
            async with http.get(f"{url}/a b%25.bin") as response:
                assert await response.read() == b""
            async with http.delete(f"{url}/a b%25.bin") as response:
                assert response.status == 204
            async with http.delete(f"{url}/a b%25.bin") as response:
                assert (response.status, (await response.json())["code"]) == (404, "not_found")

    async def test_an_upload_belongs_to_the_workspaces_user_and_keeps_its_mode(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        name = f"o-{mark()}"
        async with gateway.http(tenant) as http, gateway.wire(tenant) as wire:
            await http.put(f"/v1/tenants/{tenant}/files/{name}", data=b"one")
            _, out, _ = await wire.run(command=f"[ -O {name} ] && stat -c %a {name}; chmod 750 {name}")
            assert out == b"644\n"
            await http.put(f"/v1/tenants/{tenant}/files/{name}", data=b"two")
            _, out, _ = await wire.run(command=f"stat -c %a {name}; cat {name}")
            assert out == b"750\ntwo"

    async def test_any_name_is_named(self, gateway: LiveGateway, tenant: str) -> None:
        """Line breaks and what a URL means something by, and a tenant whose name is escaped."""
        top = f"n-{mark()}"
        base = f"{gateway.url}/v1/tenants/{tenant}/files/{top}"
        names = (
            "li\nne/end\n",
            "end",
            "a b+c",
            "50%",
            "q?x#y;z",
            "\x1b[1m",
            "e\u0301",
            ".gateway-mine",
            "\u00e9",
            "\\",
        )
        async with gateway.http(tenant) as http, gateway.wire(tenant) as wire:
            for name in names:
                url = URL(f"{base}/{quote(name)}", encoded=True)
                async with http.put(url, data=name.encode()) as response:
                    assert (name, response.status) == (name, 201)
                async with http.get(url) as response:
                    assert (response.status, await response.read()) == (200, name.encode())
                read = await wire.call("files/read", path=f"{top}/{name}")
                assert read["text"] == name
            url = URL(
                f"{gateway.url}/v1/tenants/%{ord(tenant[0]):x}{tenant[1:]}/files/{top}/end", encoded=True
            )
            async with http.get(url) as response:
                assert (response.status, await response.read()) == (200, b"end")
            url = URL(f"{base}/{quote(names[0])}", encoded=True)
            async with http.delete(url) as response:
                assert response.status == 204
            assert await paths(wire, f"{top}/li\nne") == []
            shown = {path.removeprefix(f"{top}/") for path in await paths(wire, top)}
            assert shown == {"li\nne", *names[1:]}

    async def test_ranges(self, gateway: LiveGateway, tenant: str) -> None:
        url = f"/v1/tenants/{tenant}/files/g-{mark()}"
        data = bytes(range(200)) * 20
        async with gateway.http(tenant) as http:
            async with http.put(url, data=data) as response:
                etag = response.headers["ETag"]
            cases: tuple[tuple[dict[str, str], int, bytes], ...] = (
                ({"Range": "bytes=0-9"}, 206, data[:10]),
                ({"Range": "bytes=3990-"}, 206, data[3990:]),
                ({"Range": "bytes=-5"}, 206, data[-5:]),
                ({"Range": "bytes=-9999"}, 206, data),
                ({"Range": "bytes=10-99999"}, 206, data[10:]),
                ({"Range": "bytes=0-0,5-6"}, 200, data),
                ({"Range": "lines=1-2"}, 200, data),
                ({"Range": "bytes=9-3"}, 200, data),
                ({"Range": "bytes=0-9", "If-Range": etag}, 206, data[:10]),
                ({"Range": "bytes=0-9", "If-Range": '"other"'}, 200, data),
            )
            for headers, status, expected in cases:
                async with http.get(url, headers=headers) as response:
                    assert (headers, response.status) == (headers, status)
                    assert await response.read() == expected
                    assert int(response.headers["Content-Length"]) == len(expected)
                    if status == 206:
                        first = data.index(expected) if len(expected) < 200 else len(data) - len(expected)
                        last = first + len(expected) - 1
                        assert response.headers["Content-Range"].endswith(f"/{len(data)}")
                        assert len(expected) == last - first + 1
            for behind in ("bytes=4000-", "bytes=-0"):
                async with http.get(url, headers={"Range": behind}) as response:
                    problem = await response.json()
                    assert (response.status, problem["code"]) == (416, "invalid_params")
                    assert response.headers["Content-Range"] == "bytes */4000"

    async def test_conditions(self, gateway: LiveGateway, tenant: str) -> None:
        url = f"/v1/tenants/{tenant}/files/k-{mark()}"
        async with gateway.http(tenant) as http:

            async def ask(method: str, data: bytes | None = None, **headers: str) -> tuple[int, str | None]:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                async with http.request(method, url, data=data, headers=named) as response:
                    problem = response.content_type == "application/problem+json"
                    return response.status, (await response.json())["code"] if problem else None

            assert await ask("PUT", b"x", If_Match="*") == (412, "conflict")
            assert await ask("PUT", b"one", If_None_Match="*") == (201, None)
            assert await ask("PUT", b"no", If_None_Match="*") == (412, "conflict")
            async with http.get(url) as response:
                etag = response.headers["ETag"]
                assert await response.read() == b"one"
            assert await ask("GET", If_None_Match=etag) == (304, None)
            assert await ask("GET", If_None_Match=f'"a", W/{etag}') == (304, None)
            assert await ask("GET", If_None_Match='"a"') == (200, None)
            assert await ask("GET", If_Match=etag) == (200, None)
            assert await ask("GET", If_Match='"a"') == (412, "conflict")
            assert await ask("PUT", b"two", If_Match=f'"a", {etag}') == (200, None)
            async with http.put(url, data=b"three", headers={"If-Match": etag}) as response:
                problem = await response.json()
                assert (response.status, problem["code"], problem["status"]) == (412, "conflict", 412)
                now = problem["etag"]
            assert await ask("PUT", b"three", If_Match=f'W/"{now}"') == (412, "conflict")
            assert await ask("PUT", b"three", If_Match='"') == (400, "invalid_params")
            assert await ask("DELETE", If_Match=etag) == (412, "conflict")
            assert await ask("DELETE", If_Match=f'"{now}"') == (204, None)

    async def test_refusals_are_problems(self, gateway: LiveGateway, tenant: str) -> None:
        top = f"p-{mark()}"
        base = f"/v1/tenants/{tenant}/files"
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            script = f"mkdir {top} && cd {top} && mkfifo pipe && ln -s /etc/passwd out && ln -s / root"
            await wire.run(command=f"{script} && echo x > f")
            cases = (
                ("GET", f"{top}/none", 404, "not_found"),
                ("GET", f"{top}", 409, "is_a_directory"),
                ("GET", "", 409, "is_a_directory"),
                ("GET", f"{top}/pipe", 409, "not_a_file"),
                ("GET", f"{top}/out", 403, "outside_workspace"),
                ("GET", f"{top}/root/etc/passwd", 403, "outside_workspace"),
                ("GET", "%2Fetc%2Fpasswd", 403, "outside_workspace"),
                ("GET", "%2e%2e/%2e%2e/etc/passwd", 403, "outside_workspace"),
                ("GET", "a%00b", 400, "invalid_params"),
                ("GET", "a%ffb", 400, "invalid_params"),
                ("POST", f"{top}/f", 405, "invalid_params"),
                ("PUT", f"{top}", 409, "is_a_directory"),
                ("PUT", f"{top}/pipe", 409, "not_a_file"),
                ("PUT", f"{top}/out", 409, "not_a_file"),
                ("PUT", f"{top}/root/tmp/x", 403, "outside_workspace"),
                ("PUT", f"{top}/f/x", 409, "not_a_file"),
                ("DELETE", f"{top}", 409, "conflict"),
                ("DELETE", f"{top}/none", 404, "not_found"),
            )
            for method, path, status, code in cases:
                data = b"x" if method == "PUT" else None
                url = URL(f"{gateway.url}{base}/{path}", encoded=True)
                async with http.request(method, url, data=data) as response:
                    assert (method, path, response.status) == (method, path, status)
                    problem = await response.json()
                    assert (response.content_type, problem["code"]) == ("application/problem+json", code)
                    if status == 405:
                        assert response.headers["Allow"] == "DELETE, GET, HEAD, PUT"
                    assert "/var/lib" not in str(problem) and "/tmp" not in str(problem)
            async with http.put(
                f"{base}/{top}/f", data=b"", headers={"Content-Range": "bytes 0-1/2"}
            ) as response:
                assert response.status == 400
            for recursive, status in (("false", 409), ("maybe", 400), ("true", 204)):
                async with http.delete(f"{base}/{top}", params={"recursive": recursive}) as response:
                    assert response.status == status
            for method in ("PUT", "DELETE"):
                async with gateway.http(tenant, scopes=("files:read",)) as reader:
                    async with reader.request(method, f"{base}/x") as response:
                        assert response.status == 403
            async with gateway.http("t-other") as foreign, foreign.get(f"{base}/x") as response:
                assert response.status == 404

    async def test_an_upload_that_breaks_off_leaves_nothing(self, gateway: LiveGateway, tenant: str) -> None:
        """Neither the file nor its folders nor an unfinished file; an old file stays as it was."""
        top = f"v-{mark()}"
        base = f"/v1/tenants/{tenant}/files/{top}"
        begun = asyncio.Event()

        async def endless() -> Any:
            for sent in itertools.count():
                yield b"x" * 65536
                if sent == 512:  # more than the sockets between hold: the file has been opened
                    begun.set()

        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            await http.put(f"{base}/old", data=b"old")

            async def found() -> bytes:
                _, out, _ = await wire.run(command=f"find {top} -printf '%P %s\n' | sort")
                return out

            before = await found()
            for name in ("old", "new/deep/file"):
                begun.clear()
                sending = asyncio.ensure_future(http.put(f"{base}/{name}", data=endless()))
                await begun.wait()
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                async with asyncio.timeout(10):
                    while await found() != before:
                        pass
            async with http.get(f"{base}/old") as response:
                assert await response.read() == b"old"

    async def test_an_upload_over_the_limit_gets_413(self, quick: LiveGateway, tenant: str) -> None:
        top = f"q-{mark()}"
        base = f"/v1/tenants/{tenant}/files/{top}"

        async def chunked() -> Any:
            for _ in range(64):
                yield b"x" * 65536

        async with quick.http(tenant) as http, quick.wire(tenant) as wire:
            async with http.put(f"{base}/fits", data=io.BytesIO(b"x" * (2 << 20))) as response:
                assert response.status == 201
            for body in (io.BytesIO(b"x" * (3 << 20)), chunked()):
                try:
                    async with http.put(f"{base}/large", data=body) as response:
                        problem = await response.json()
                        assert (response.status, problem["code"]) == (413, "too_large")
                        assert problem["limit"] == 2 << 20
                except aiohttp.ClientOSError:
                    pass  # the answer may be overtaken by the reset: the gateway did not read on
            async with asyncio.timeout(10):
                while (await wire.run(argv=["ls", "-A", top]))[1] != b"fits\n":
                    pass

    async def test_an_upload_overtaken_by_another_write_is_stale(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """The condition is held against what is there at the end of the upload, not at its beginning."""
        name = f"s-{mark()}"
        begun, go = asyncio.Event(), asyncio.Event()

        async def slow() -> Any:
            yield b"from the upload"
            begun.set()
            await go.wait()

        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            first = await wire.call("files/write", path=name, text="one")
            headers = {"If-Match": f'"{first["etag"]}"'}
            url = f"/v1/tenants/{tenant}/files/{name}"
            sending = asyncio.ensure_future(http.put(url, data=slow(), headers=headers))
            await begun.wait()
            second = await wire.call("files/write", path=name, text="two")
            go.set()
            async with await sending as response:
                problem = await response.json()
                assert (response.status, problem["etag"]) == (412, second["etag"])
            assert (await wire.call("files/read", path=name))["text"] == "two"

    async def test_a_download_is_of_one_state(self, gateway: LiveGateway, tenant: str) -> None:
        """A file that is replaced while it is sent arrives as it was, to its end."""
        name = f"d-{mark()}"
        url = f"/v1/tenants/{tenant}/files/{name}"
        data = os.urandom(1 << 20) * 24
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            await http.put(url, data=io.BytesIO(data))
            async with http.get(url) as response:
                assert await response.content.readexactly(1000) == data[:1000]
                await wire.call("files/write", path=name, text="other")
                await wire.call("files/remove", path=name)
                assert await response.read() == data[1000:]

    async def test_a_file_that_shrinks_breaks_its_download_off(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        name = f"z-{mark()}"
        url = f"/v1/tenants/{tenant}/files/{name}"
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            await wire.run(command=f"head -c 64M /dev/zero > {name}")
            async with http.get(url) as response:
                await response.content.readexactly(1000)
                await wire.run(command=f": > {name}")
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
            await wire.call("files/remove", path=name)

    async def test_many_transfers_are_limited_and_end_with_their_client(
        self, quick: LiveGateway, tenant: str
    ) -> None:
        name = f"n-{mark()}"
        url = f"/v1/tenants/{tenant}/files/{name}"
        async with quick.wire(tenant) as wire, quick.http(tenant) as http:
            await wire.run(command=f"head -c 64M /dev/zero > {name}")
            held = [await http.get(url) for _ in range(4)]
            async with http.get(url) as response:
                assert (response.status, (await response.json())["code"]) == (429, "rate_limited")
            for response in held:
                response.close()
            async with asyncio.timeout(10):
                while (await http.head(url)).status != 200:
                    pass
            await wire.call("files/remove", path=name)

    async def test_sigterm_ends_transfers_and_leaves_nothing_unfinished(
        self, disposable: LiveGateway, tenant: str
    ) -> None:
        top = f"j-{mark()}"
        base = f"/v1/tenants/{tenant}/files/{top}"
        begun = asyncio.Event()

        async def endless() -> Any:
            yield b"x" * (2 << 20)
            begun.set()
            await asyncio.Event().wait()

        async with disposable.http(tenant) as http:
            await http.put(f"{base}/kept", data=io.BytesIO(bytes(64 << 20)))
            sending = asyncio.ensure_future(http.put(f"{base}/new", data=endless()))
            async with http.get(f"{base}/kept") as download:
                await asyncio.gather(begun.wait(), download.content.readexactly(1000))
                code = await disposable.stop()
                with pytest.raises(aiohttp.ClientPayloadError):
                    while await download.content.readany():
                        pass
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        log = disposable.log.read_text()
        assert code == 0 and "Traceback" not in log, log
        await disposable.start()
        async with disposable.wire(tenant) as wire:
            assert (await wire.run(argv=["ls", "-A", top]))[1] == b"kept\n"

    async def test_a_large_file_passes_through_without_being_held(
        self, gateway: LiveGateway, tenant: str, tmp_path: Path
    ) -> None:
        """Up and down, byte for byte; the gateway's memory grows by some chunks. Prints speeds."""
        url = f"/v1/tenants/{tenant}/files/y-{mark()}"
        mebibytes = 256 if thorough.ALL else 96  # three times of what it may grow by
        size, large = mebibytes << 20, tmp_path / "large"
        large.write_bytes(os.urandom(1 << 20) * mebibytes)

        def peak() -> int:
            assert gateway.process is not None
            status = Path(f"/proc/{gateway.process.pid}/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) << 10

        async with gateway.http(tenant) as http:
            await http.put(url, data=b"")
            before = peak()
            began = time.perf_counter()
            with large.open("rb") as body:
                async with http.put(url, data=body) as response:
                    assert (await response.json())["size"] == size
            up = time.perf_counter() - began
            began = time.perf_counter()
            received = tmp_path / "received"
            with received.open("wb") as file:
                async with http.get(url) as response:
                    async for chunk in response.content.iter_chunked(1 << 20):
                        file.write(chunk)
            down = time.perf_counter() - began
            assert filecmp.cmp(large, received, shallow=False)
            grown = peak() - before
            await http.delete(url)
        rates = [f"{name} {mebibytes / seconds:.0f} MiB/s" for name, seconds in (("PUT", up), ("GET", down))]
        print(*rates, f"{grown / 1e6:.0f} MB more")
        assert grown < 32 << 20

    async def test_a_tenants_stop_ends_its_transfers(self, gateway: LiveGateway, tenant: str) -> None:
        """An upload leaves nothing and is told so, a download is cut: nothing holds the tenant's storage."""
        top = f"x-{mark()}"
        base = f"/v1/tenants/{tenant}/files/{top}"
        begun, stopped = asyncio.Event(), asyncio.Event()

        async def slow() -> Any:
            yield b"x" * (2 << 20)
            begun.set()
            await stopped.wait()
            yield b"x" * (2 << 20)

        async with gateway.http(tenant) as http, gateway.wire(tenant) as wire:
            await http.put(f"{base}/kept", data=io.BytesIO(bytes(32 << 20)))
            sending = asyncio.ensure_future(http.put(f"{base}/new", data=slow()))
            async with http.get(f"{base}/kept") as download:
                await asyncio.gather(begun.wait(), download.content.readexactly(1000))
                seen = await watch(wire, top)
                await http.post(f"/v1/tenants/{tenant}/stop")
                # transfers end with the watches
                await wire.until(lambda: any(told.get("ended") for told in seen.told))
                with pytest.raises(aiohttp.ClientPayloadError):
                    await download.read()
            stopped.set()
            async with await sending as response:
                assert (response.status, (await response.json())["code"]) == (503, "unavailable")
            await http.post(f"/v1/tenants/{tenant}/start")
            assert await paths(wire, top) == [f"{top}/kept"]
            assert (await wire.run(argv=["ls", "-A", top]))[1] == b"kept\n"


class Seen:
    """What one watch was told: the last change of each path, overflows, its end."""

    def __init__(self, wire: Wire, watch: int) -> None:
        self.wire = wire
        self.watch = watch

    @property
    def told(self) -> list[Any]:
        return [
            said.params
            for said in self.wire.notifications
            if said.method == "files/changed" and said.params["watch"] == self.watch
        ]

    def changes(self) -> list[tuple[str, str]]:
        return [(change["path"], change["change"]) for told in self.told for change in told["changes"]]

    async def has(self, path: str, change: str, deadline: float = 10) -> None:
        try:
            await self.wire.until(lambda: (path, change) in self.changes(), deadline)
        except TimeoutError:
            raise AssertionError(f"{path} {change} not in {self.changes()}") from None

    async def overflow(self) -> None:
        await self.wire.until(lambda: any(told["overflow"] for told in self.told))


async def watch(wire: Wire, *paths: str, **more: Any) -> Seen:
    return Seen(wire, (await wire.call("files/watch", paths=list(paths), **more))["watch"])


class WatchContract:
    async def test_a_tools_write_is_seen_within_100_ms(self, gateway: LiveGateway, tenant: str) -> None:
        """By another socket, after the call of the tool. The medians: machines stutter.

        A busy machine gives the notification less of its time, as it does the call: so that counts, too.
        """
        top = f"e-{mark()}"
        took, called = [], []
        async with gateway.wire(tenant) as editor, gateway.wire(tenant) as agent:
            await editor.call("files/mkdir", path=top)
            seen = await watch(editor, ".")
            for number in range(11):
                path = f"{top}/{number}.txt"
                began = time.perf_counter()
                given = {"file_path": path, "content": "x"}
                await agent.call("tools/call", name="Write", arguments=given)
                called.append(time.perf_counter() - began)
                await seen.has(path, "created")
                took.append(time.perf_counter() - began)
                await pause(0.11)  # apart from one another, as an agent's writes are
            edit = {"file_path": f"{top}/0.txt", "old_string": "x", "new_string": "y"}
            await agent.call("tools/call", name="Edit", arguments=edit)
            await seen.has(f"{top}/0.txt", "changed")
            assert not any(".gateway-" in path for path, _ in seen.changes())
        print(f"watch: median {sorted(took)[5] * 1000:.1f} ms, slowest {max(took) * 1000:.1f} ms")
        assert sorted(took)[5] < 0.1 + 3 * sorted(called)[5], (took, called)

    async def test_changes_of_the_tenants_own_are_seen_at_any_depth(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        top = f"o-{mark()}"
        async with gateway.wire(tenant) as wire:
            await wire.run(
                command=f"mkdir -p {top}/old/deep {top}/node_modules/x {top}/.git && echo > {top}/f"
            )
            seen = await watch(wire, top)
            script = f"""
                cd {top}; echo x >> f; mkdir -p a/b/c && echo > a/b/c/new; mv old/deep moved; echo > moved/in
                rm f; echo > node_modules/x/y; echo > .git/index
            """
            await wire.run(command=script)
            await seen.has(f"{top}/f", "removed")
            await seen.has(f"{top}/a/b/c/new", "created")
            await seen.has(f"{top}/old/deep", "removed")
            await seen.has(f"{top}/moved", "created")
            await seen.has(f"{top}/moved/in", "created")
            await wire.run(command=f"echo > {top}/a/b/c/new; rm -r {top}/a; echo > {top}/moved/in")
            await seen.has(f"{top}/a", "removed")
            await seen.has(f"{top}/moved/in", "changed")
            told = {path for path, _ in seen.changes()}
            assert not any("node_modules" in path or ".git" in path for path in told)
            await wire.run(command=f"mv {top}/moved {top}/again && echo > {top}/again/in2")
            await seen.has(f"{top}/again/in2", "created")
            assert not any(told["overflow"] for told in seen.told)

    async def test_paths_and_ignored_names_are_the_clients_choice(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        top = f"i-{mark()}"
        async with gateway.wire(tenant) as wire:
            await wire.run(command=f"mkdir -p {top}/a/node_modules {top}/b {top}/a/skip; echo > {top}/b/one")
            all_of_a = await watch(wire, f"/srv/site/{top}/a", ignore=["skip"])
            one = await watch(wire, f"{top}/b/one", f"{top}/a/node_modules")
            script = (
                f"cd {top}; echo > a/node_modules/x; echo > a/skip/x; echo > b/two; echo > b/one; echo > a/z"
            )
            await wire.run(command=script)
            await all_of_a.has(f"{top}/a/z", "created")
            await all_of_a.has(f"{top}/a/node_modules/x", "created")
            await one.has(f"{top}/b/one", "changed")
            await one.has(f"{top}/a/node_modules/x", "created")
            assert {path for path, _ in all_of_a.changes()} == {f"{top}/a/z", f"{top}/a/node_modules/x"}
            assert {path for path, _ in one.changes()} == {f"{top}/b/one", f"{top}/a/node_modules/x"}
            await wire.call("files/unwatch", watch=one.watch)
            before = len(one.told)
            await wire.run(command=f"cd {top}; echo > b/one; echo > a/last")
            await all_of_a.has(f"{top}/a/last", "created")
            assert len(one.told) == before
            await wire.run(command=f"rm -r {top}")
            await all_of_a.has(f"{top}/a", "removed")
            for method, params, code in (
                ("files/unwatch", {"watch": one.watch}, "not_found"),
                ("files/watch", {"paths": [f"{top}/none"]}, "not_found"),
                ("files/watch", {"paths": ["/etc"]}, "outside_workspace"),
                ("files/watch", {"paths": []}, "invalid_params"),
            ):
                assert (method, (await refused(wire, method, **params)).code) == (method, code)

    async def test_a_storm_is_an_overflow_and_the_gateway_lives(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """More changes than are told at once, folders renamed at full speed: announced, then exact again."""
        top = f"s-{mark()}"
        async with gateway.wire(tenant) as wire:
            await wire.run(command=f"mkdir -p {top}/x/1/2/3 {top}/y/1/2/3 many-{top}")
            await wire.run(command=f"cd many-{top} && seq 30000 | xargs touch")
            seen = await watch(wire, top)
            # made one by one they may be told as they come, where the machine is slow
            await wire.run(command=f"mv many-{top} {top}/many")
            await seen.overflow()
            storm = f"cd {top}; while :; do mv x z; mv y x; mv z y; done"
            started = await wire.call("exec/start", command=storm)
            for _ in range(20):
                began = time.perf_counter()
                await wire.call("files/stat", path=top)
                assert time.perf_counter() - began < 5
                await pause(0.05)
            await wire.call("exec/cancel", exec=started["exec"], graceMs=0)
            folder = f"{top}/x/1/2/3"
            await wire.run(command=f"cd {top}; [ -e x ] || mv z x")
            numbers = itertools.count(1)

            async def told() -> bool:  # the tree is read anew, at most once in a second
                await wire.call("files/write", path=f"{folder}/after-{next(numbers)}", text="")
                return any(path.startswith(f"{folder}/after") for path, _ in seen.changes())

            await until(told, every=0.1)
            await wire.call("files/unwatch", watch=seen.watch)
            await wire.call("files/remove", path=top, recursive=True)

    async def test_limits_are_told(self, quick: LiveGateway, tenant: str) -> None:
        top = f"l-{mark()}"
        async with quick.wire(tenant) as wire, quick.wire(tenant) as other:
            await wire.run(command=f"mkdir -p {top}/few && cd {top} && seq -f w%g 60 | xargs mkdir")
            wide = await refused(wire, "files/watch", paths=[top])
            assert wide.code == "rate_limited" and "folders" in wide.message
            held = [await watch(wire, f"{top}/few") for _ in range(3)]
            assert (await refused(wire, "files/watch", paths=[f"{top}/few"])).code == "rate_limited"
            await watch(other, f"{top}/few")
            assert (await refused(other, "files/watch", paths=[f"{top}/few"])).code == "rate_limited"
            await wire.run(command=f"cd {top}/few && seq -f w%g 60 | xargs mkdir")
            await held[0].overflow()
            await wire.run(command=f"rm -r {top}/few/w*; echo > {top}/few/exact")
            await held[0].has(f"{top}/few/exact", "created")
            await wire.run(command=f"rm -r {top}")

    async def test_a_watch_ends_with_its_socket(self, quick: LiveGateway, tenant: str) -> None:
        """As many again can be had once a client is gone, also one that vanished without a word."""
        for _ in range(3):
            async with quick.wire(tenant) as wire:

                async def given(wire: Wire = wire) -> bool:  # nobody tells when a socket's end was noticed
                    try:
                        await watch(wire, ".")
                        return True
                    except RpcFailure as error:
                        assert error.code == "rate_limited"
                        return False

                for _ in range(3):  # what is given while others are still taken back stays
                    await until(given, every=0.01)
                wire.socket.transport.abort()

    async def test_a_workspace_that_becomes_another_ends_its_watches(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        top = f"a-{mark()}"
        async with gateway.wire(tenant) as wire:
            seen = await watch(wire, ".")
            move = "mv /srv/site /srv/before && mkdir /srv/site && cp -a /srv/before/. /srv/site/"
            await self.as_root(gateway, tenant, f"{move} && chown --reference=/srv/before /srv/site")
            await wire.until(lambda: any(told.get("ended") for told in seen.told))
            assert seen.told[-1]["ended"] == "workspace_changed" and seen.told[-1]["overflow"]
            assert (await refused(wire, "files/unwatch", watch=seen.watch)).code == "not_found"
            async with asyncio.timeout(10):
                while True:
                    anew = await watch(wire, ".")
                    await wire.run(command=f"echo > {top}-{anew.watch}")
                    try:
                        await anew.has(f"{top}-{anew.watch}", "created", 2)
                        break
                    except AssertionError:
                        continue
            await self.as_root(gateway, tenant, "rm -rf /srv/before")

    async def as_root(self, gateway: LiveGateway, tenant: str, script: str) -> None:
        raise NotImplementedError

    async def test_a_tenants_stop_ends_its_watches(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            seen = await watch(wire, ".")
            await http.post(f"/v1/tenants/{tenant}/stop")
            await wire.until(lambda: any(told.get("ended") for told in seen.told))
            assert seen.told[-1]["ended"] == "stopped"
            await http.post(f"/v1/tenants/{tenant}/start")
            await watch(wire, ".")


class FilesContract(EditorContract, TransferContract, WatchContract):
    """All of it."""
