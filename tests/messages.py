"""A scripted model on loopback: the Messages API as Claude's clients ask it, streamed or whole.

What it says is a list of turns, one for each request, each a list of blocks; after the last it says "done".
Nothing here knows a gateway: the real CLI, SDK and client are pointed at it by `environment`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

MODEL = "claude-sonnet-4-5"

Block = Mapping[str, Any]
_ids = itertools.count(1)


def say(text: str) -> Block:
    return {"type": "text", "text": text}


def use(tool: str, /, id: str | None = None, **arguments: Any) -> Block:
    """Return the call of a tool; each has an id that no other has."""
    return {"type": "tool_use", "id": id or f"toolu_{next(_ids):06}", "name": tool, "input": arguments}


@dataclass(frozen=True, slots=True)
class Result:
    """What a client gave the model for one call: its text blocks joined by newlines, and the other blocks."""

    text: str
    is_error: bool
    others: Sequence[Block] = ()

    @classmethod
    def of(cls, block: Block) -> Result:
        content = block.get("content", "")
        blocks = [say(content)] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in blocks if part["type"] == "text")
        others = [part for part in blocks if part["type"] != "text"]
        return cls(text, bool(block.get("is_error")), others)


@dataclass
class Model:
    """The model: what it will say, and all that it was asked."""

    turns: list[list[Block]]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def results(self) -> dict[str, Result]:
        """The results of all calls, by their ids."""
        return {
            block["tool_use_id"]: Result.of(block)
            for request in self.requests
            for message in request["messages"]
            if isinstance(message["content"], list)
            for block in message["content"]
            if block["type"] == "tool_result"
        }

    def result(self, call: Block) -> Result:
        """Return what came back for `call`, which must have been answered."""
        return self.results[call["id"]]

    @property
    def heard(self) -> str:
        """Everything that it was asked, as one text: to look for what must not be in it."""
        return orjson.dumps(self.requests).decode()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that point Claude's programs here, with a home of their own.

        Without the last one the CLI looks up names outside and asks other routes.
        """
        return {
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": "scripted",
            "CLAUDE_CONFIG_DIR": str(home / ".claude"),
            "HOME": str(home),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json(loads=orjson.loads)
        self.requests.append(asked)
        blocks = self.turns.pop(0) if self.turns else [say("done")]
        calls = any(block["type"] == "tool_use" for block in blocks)
        message = {
            "id": f"msg_{next(_ids):06}",
            "type": "message",
            "role": "assistant",
            "model": asked["model"],
            "content": blocks,
            "stop_reason": "tool_use" if calls else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 10, "output_tokens": 10},
        }
        if not asked.get("stream"):
            return web.json_response(message)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # an interrupted client reads no further
            for event in _events(message):
                await response.write(
                    b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event))
                )
        return response

    async def _count(self, request: web.Request) -> web.Response:
        return web.json_response({"input_tokens": len(await request.read()) // 4})


def _events(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a message as the events of its stream."""
    start = {**message, "content": [], "stop_reason": None}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": start}]
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            written = orjson.dumps(block["input"]).decode()
            empty, delta = {**block, "input": {}}, {"type": "input_json_delta", "partial_json": written}
        events += [
            {"type": "content_block_start", "index": index, "content_block": empty},
            {"type": "content_block_delta", "index": index, "delta": delta},
            {"type": "content_block_stop", "index": index},
        ]
    ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    return [
        *events,
        {"type": "message_delta", "delta": ended, "usage": {"output_tokens": 10}},
        {"type": "message_stop"},
    ]


@contextlib.asynccontextmanager
async def model(*turns: Sequence[Block]) -> AsyncIterator[Model]:
    """Serve a model that says these turns."""
    scripted = Model([list(turn) for turn in turns])
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/messages", scripted._messages)
    app.router.add_post("/v1/messages/count_tokens", scripted._count)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address: tuple[str, int] = runner.addresses[0]
    scripted.url = f"http://127.0.0.1:{address[1]}"
    try:
        yield scripted
    finally:
        await runner.cleanup()


def claude_program() -> Path:
    """Return the real CLI, the one that the SDK bundles."""
    import claude_agent_sdk

    return Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"


async def claude(model: Model, home: Path, *words: str, deadline: float = 120, **environment: str) -> str:
    """Run the real CLI and return what it printed; it must succeed."""
    home.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        str(claude_program()),
        *words,
        env={"PATH": "/usr/bin:/bin", **model.environment(home), **environment},
        cwd=home,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(deadline):
            printed, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, (printed + complained).decode()
    return printed.decode()
