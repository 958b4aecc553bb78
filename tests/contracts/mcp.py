"""The MCP endpoint over a live gateway, asked by the package's own client in both protocols.

A subclass gives `gateway`, `tenant` and `quick` as in `contracts.gateway`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import mcp_types as types
import orjson
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from gateway.tools.schemas import descriptions
from tests.contracts.processes import Tree
from tests.contracts.shells import identified
from tests.live import LiveGateway
from tests.waits import until

HANDSHAKE, SESSIONLESS = "2025-11-25", "2026-07-28"
BOTH = pytest.mark.parametrize("version", [HANDSHAKE, SESSIONLESS])
ACCEPT = {"Accept": "application/json, text/event-stream"}


@contextlib.asynccontextmanager
async def mcp(gateway: LiveGateway, tenant: str, version: str, **headers: str) -> AsyncIterator[Client]:
    """Connect the real client, pinned to one protocol version."""
    given = {"Authorization": f"Bearer {gateway.token(tenant)}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx2.AsyncClient(headers=given, timeout=60, trust_env=False) as http:
        transport = streamable_http_client(
            f"{gateway.url}/v1/tenants/{tenant}/mcp", http_client=http, max_sse_event_size=16 << 20
        )
        mode = "legacy" if version == HANDSHAKE else version
        async with Client(transport, mode=mode, cache=None) as client:
            assert client.session.protocol_version == version
            yield client


def text(result: types.CallToolResult) -> str:
    return "\n".join(part.text for part in result.content if isinstance(part, types.TextContent))


async def bash(client: Client, command: str, **more: Any) -> str:
    return text(await client.call_tool("Bash", {"command": command, **more}))


def call(name: str, arguments: Mapping[str, Any], number: int = 1) -> dict[str, Any]:
    """Return the bare message of a call in the handshake protocol."""
    params = {"name": name, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}


class McpContract:
    @BOTH
    async def test_the_tools_are_the_websockets(
        self, gateway: LiveGateway, tenant: str, version: str
    ) -> None:
        """Same names, descriptions, schemas, texts and facts; read-only ones are marked.

        Unasked the facts of a success come in `_meta`: Claude Code would show a model nothing else.
        """
        async with (
            mcp(gateway, tenant, version, X_Structured_Content="1") as client,
            mcp(gateway, tenant, version) as plain,
            gateway.wire(tenant) as wire,
        ):
            listed = (await client.list_tools()).tools
            assert [
                {"name": tool.name, "description": tool.description, "inputSchema": tool.input_schema}
                for tool in listed
                if tool.name != "UndoTurn"
            ] == descriptions()
            marked = {tool.name for tool in listed if tool.annotations and tool.annotations.read_only_hint}
            assert marked == {"Read", "Glob", "Grep"}
            for name, given in (
                ("Write", {"file_path": "m/a.txt", "content": "one\ntwo\n"}),
                ("Write", {"file_path": "m/b.txt", "content": "ä" * 300_000}),
                ("Read", {"file_path": "m/a.txt"}),
                ("Grep", {"pattern": "tw", "path": "m", "output_mode": "content"}),
                ("Glob", {"pattern": "m/*.txt"}),
                ("Read", {"file_path": "m/none.txt"}),
                ("Edit", {"file_path": "m/a.txt"}),
                ("Bash", {"command": "cat m/a.txt; exit 3"}),
            ):
                here = await client.call_tool(name, given)
                there = await wire.call("tools/call", name=name, arguments=given)
                if name in ("Write", "Bash"):  # told apart by times and ids: compared by their words
                    assert here.content[0].model_dump(by_alias=True)["text"].split() != []
                    assert here.is_error == there["isError"]
                    continue
                said = here.model_dump(by_alias=True, mode="json", exclude_none=True)
                if here.is_error:  # what many clients show a model alone
                    assert said["structuredContent"].pop("message") == text(here)
                assert {key: said[key] for key in there} == there
                unasked = await plain.call_tool(name, given)
                assert unasked.content == here.content
                if not here.is_error:
                    assert unasked.structured_content is None and unasked.meta is not None
                    assert unasked.meta["incus-gateway/facts"] == there["structuredContent"]

    @BOTH
    async def test_a_session_is_named_or_stands_alone(
        self, gateway: LiveGateway, tenant: str, version: str
    ) -> None:
        name = f"mcp-{version}"
        async with mcp(gateway, tenant, version, X_Tool_Session=name) as client:
            await bash(client, "mkdir -p deep && cd deep")
            async with mcp(gateway, tenant, version, X_Tool_Session=name) as other:
                assert (await bash(other, "pwd")).endswith("/deep")
            async with mcp(gateway, tenant, version) as alone:
                assert not (await bash(alone, "pwd")).endswith("/deep")
        async with mcp(gateway, tenant, version, X_Read_Before_Write="1") as careful:
            await careful.call_tool("Write", {"file_path": "careful.txt", "content": "x"})
            async with mcp(gateway, tenant, version, X_Read_Before_Write="1") as stranger:
                refused = await stranger.call_tool("Write", {"file_path": "careful.txt", "content": "y"})
                assert refused.is_error and "has not been read" in text(refused)

    async def test_a_handshake_session_ends_with_its_client(self, gateway: LiveGateway, tenant: str) -> None:
        """Without any header it has a working directory and a background, which nothing survives."""
        tree = Tree()
        async with mcp(gateway, tenant, HANDSHAKE) as client:
            await bash(client, "mkdir -p own && cd own")
            assert (await bash(client, "pwd")).endswith("/own")
            shell_id = identified(await bash(client, tree.script, run_in_background=True))
            await tree.grown()
            output = await client.call_tool("BashOutput", {"bash_id": shell_id})
            assert "<status>running</status>" in text(output)
        await until(lambda: tree.alive() == 0)

    @BOTH
    async def test_a_call_that_is_given_up_leaves_nothing(
        self, gateway: LiveGateway, tenant: str, version: str
    ) -> None:
        """By a notification in one protocol, by dropping the response in the other; the client goes on."""
        tree = Tree()
        async with mcp(gateway, tenant, version) as client:
            calling = asyncio.create_task(client.call_tool("Bash", {"command": tree.script}))
            await tree.grown()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            await until(lambda: tree.alive() == 0)
            assert await bash(client, "echo on") == "on"

    async def test_a_dropped_response_leaves_nothing(self, gateway: LiveGateway, tenant: str) -> None:
        """In the handshake protocol too, although its clients are not bound to mean it."""
        tree = Tree()
        async with gateway.http(tenant) as http:
            body = call("Bash", {"command": tree.script})
            asking = asyncio.ensure_future(http.post(f"/v1/tenants/{tenant}/mcp", json=body, headers=ACCEPT))
            response = await asking  # its headers come at once
            await tree.grown()
            response.close()
            await until(lambda: tree.alive() == 0)

    async def test_nobody_elses_call_is_cancelled(self, gateway: LiveGateway, tenant: str) -> None:
        """A notification finds only calls of its own session: ids are small numbers, alike for everybody."""
        tree = Tree()
        async with mcp(gateway, tenant, HANDSHAKE) as client, gateway.http(tenant) as http:
            calling = asyncio.create_task(client.call_tool("Bash", {"command": tree.script}))
            await tree.grown()
            for session in ({}, {"Mcp-Session-Id": "0" * 32}):
                for number in range(8):
                    params = {"requestId": number}
                    body = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
                    headers = {**ACCEPT, **session}
                    async with http.post(f"/v1/tenants/{tenant}/mcp", json=body, headers=headers) as said:
                        assert said.status == 202
            assert not calling.done() and tree.alive() == Tree.SIZE
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            await until(lambda: tree.alive() == 0)

    @BOTH
    async def test_progress_grows_while_a_command_runs(
        self, quick: LiveGateway, tenant: str, version: str
    ) -> None:
        seen: list[tuple[float, str | None]] = []
        enough = asyncio.Event()

        async def told(progress: float, total: float | None, message: str | None) -> None:
            seen.append((progress, message))
            if len(seen) == 3:
                enough.set()

        async with mcp(quick, tenant, version) as client:
            calling = asyncio.create_task(
                client.call_tool("Bash", {"command": "sleep 60"}, progress_callback=told)
            )
            async with asyncio.timeout(20):
                await enough.wait()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
        times = [done for done, _ in seen]
        assert times == sorted(set(times))
        assert seen[0][1] is not None and seen[0][1].startswith("Bash has run for ")

    @BOTH
    async def test_what_is_refused_is_told_to_the_model(
        self, gateway: LiveGateway, tenant: str, version: str
    ) -> None:
        token = gateway.token(tenant, scopes=("files:read",))
        async with mcp(gateway, tenant, version, Authorization=f"Bearer {token}") as client:
            refused = await client.call_tool("Bash", {"command": "true"})
            assert refused.is_error and "scope exec" in text(refused)
            told = refused.structured_content or {}
            assert (told["code"], told["scope"], told["message"]) == ("forbidden", "exec", text(refused))
            with pytest.raises(MCPError, match="no tool Rm; there are Read"):
                await client.call_tool("Rm", {})

    async def test_a_repeated_call_of_claudes_is_made_once(self, gateway: LiveGateway, tenant: str) -> None:
        async with mcp(gateway, tenant, SESSIONLESS) as client:
            meta: Any = {"claudecode/toolUseId": "toolu_once_mcp"}
            given = {"command": "echo x >>once.txt; wc -l <once.txt"}
            said = [text(await client.call_tool("Bash", given, meta=meta)) for _ in range(3)]
            assert said == ["1"] * 3

    async def test_who_may_ask(self, gateway: LiveGateway, tenant: str) -> None:
        """As on every other route: 401, 404 alike for foreign and unknown, 403 by origin, 413, 405."""
        url, body = f"/v1/tenants/{tenant}/mcp", call("Read", {"file_path": "x"})
        async with gateway.http(tenant) as http:
            for headers, status, code in (
                ({"Authorization": "Bearer wrong"}, 401, "unauthorized"),
                ({"Origin": "https://evil.example"}, 403, "forbidden"),
                ({"Origin": "null"}, 403, "forbidden"),
                ({"Mcp-Session-Id": "x" * 65}, 400, "invalid_params"),
            ):
                async with http.post(url, json=body, headers={**ACCEPT, **headers}) as response:
                    assert (response.status, (await response.json())["code"]) == (status, code)
                    assert response.content_type == "application/problem+json"
            async with http.get(url, headers=ACCEPT) as response:
                assert response.status == 405
        seen = []
        for name in (tenant, "t-none"):
            async with gateway.http("t-other") as other:
                async with other.post(f"/v1/tenants/{name}/mcp", json=body, headers=ACCEPT) as response:
                    assert response.status == 404
                    seen.append((await response.text()).replace(name, "?"))
        assert seen[0] == seen[1]
        async with gateway.http("*") as every:
            async with every.post("/v1/tenants/t-none/mcp", json=body, headers=ACCEPT) as response:
                assert (response.status, (await response.text()).replace("t-none", "?")) == (404, seen[0])

    async def test_a_body_over_the_limit_is_refused_unread(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.http(tenant) as http:
            url = f"/v1/tenants/{tenant}/mcp"
            body = orjson.dumps(call("Write", {"file_path": "big", "content": "x" * (1 << 20)}))
            headers = {**ACCEPT, "Content-Type": "application/json"}
            async with http.post(url, data=io.BytesIO(body), headers=headers) as response:
                assert (response.status, (await response.json())["code"]) == (413, "too_large")
            async with http.post(url, data=b"not json", headers=headers) as response:
                assert response.status == 400

    async def test_what_is_too_large_in_a_message_is_refused_by_the_schema(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """All but the arguments of a tool, whose maximum is that of a file; the package parses none of it."""
        url, long = f"/v1/tenants/{tenant}/mcp", "é" * 40_000
        told = {"jsonrpc": "2.0", "id": 1}
        async with gateway.http(tenant) as http:
            for message, status in (
                ({**told, "method": "tools/list", "params": {"cursor": "x"}}, 200),
                ({**told, "method": "tools/list", "params": {"cursor": long}}, 413),
                ({**told, "method": "tools/list", "params": {"_meta": {"x": [1] * 257}}}, 400),
                ({**told, "method": "ping", "id": "x" * 257}, 400),
                ({**told, "method": "initialize", "params": {"clientInfo": {"name": long}}}, 413),
                ({**call("Read", {"file_path": "x"}), "more": long}, 200),
                (call("Write", {"file_path": "m/long.txt", "content": long}), 200),
                ({**told, "method": "tools/call", "params": {"name": "Read", "arguments": [long]}}, 413),
                ([told], 400),
            ):
                async with http.post(url, json=message, headers=ACCEPT) as response:
                    assert response.status == status, (message, await response.text())
            deep = b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b'{"a":[' * 300 + b"]}" * 300 + b"}"
            headers = {**ACCEPT, "Content-Type": "application/json"}
            async with http.post(url, data=deep, headers=headers) as response:
                assert (response.status, (await response.json())["code"]) == (400, "invalid_params")
