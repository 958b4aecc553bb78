"""The results of every method and the parameters of every notification, as clients may rely on them.

They describe what the server sends. `protocol.wire_schema` turns them into JSON Schema, and the tests check
every answer of a live gateway against that. A later version may add members.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, Literal, NotRequired, TypeAlias

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from typing_extensions import TypedDict

from gateway.protocol.params import METHODS, CancelRequest
from gateway_client.wire import SUBPROTOCOL

EntryType: TypeAlias = Literal["file", "directory", "symlink", "other"]
ExitReason: TypeAlias = Literal["exited", "cancelled", "timeout", "lost"]
TurnKind: TypeAlias = Literal["turn", "restored", "outside", "deployed", "first"]


class Empty(TypedDict):
    """No result, except that the call succeeded."""


class Server(TypedDict):
    name: str
    version: str


class Limits(TypedDict):
    """Limits for clients; `maxFrame`, `execTail` and `maxArgument` are in bytes."""

    maxFrame: int
    maxRequests: int
    maxExecs: int
    execTail: int
    maxArgument: int


class Home(TypedDict):
    """The member of a cluster that has the tenant; `url` is null if it has no address for clients."""

    member: str
    url: str | None


class Initialized(TypedDict):
    """What the gateway is, and what the token allows; `expires` is in seconds since the epoch.

    `home` exists only in a cluster.
    """

    server: Server
    protocol: int
    tenant: str
    workspace: str
    user: str
    scopes: list[str]
    expires: float
    home: NotRequired[Home]
    limits: Limits


class Renewed(TypedDict):
    """What a new token allows on an open connection; `expires` is in seconds since the epoch."""

    expires: float
    scopes: list[str]


class Tool(TypedDict):
    name: str
    description: str
    inputSchema: dict[str, Any]


class Tools(TypedDict):
    tools: list[Tool]


class Text(TypedDict):
    type: Literal["text"]
    text: str


class Image(TypedDict):
    """`data` is base64."""

    type: Literal["image"]
    data: str
    mimeType: str


class Blob(TypedDict):
    """`blob` is base64."""

    uri: str
    mimeType: str
    blob: str


class Resource(TypedDict):
    type: Literal["resource"]
    resource: Blob


class ToolResult(TypedDict):
    """`content` is for the model; `structuredContent` has the same facts as data, and a failure's `code`."""

    content: list[Text | Image | Resource]
    isError: bool
    structuredContent: dict[str, Any]


class Counts(TypedDict):
    """Bytes of each stream since the command's start."""

    stdout: int
    stderr: int


class ExecStarted(TypedDict):
    """`attachment` identifies this reader; send it as `resume` after a lost connection."""

    exec: str
    channel: int
    pid: int
    startedAt: str
    attachment: str
    stdinWindow: int


ExecAttached = TypedDict(
    "ExecAttached",
    {
        "channel": int,
        "from": Counts,
        "lost": Counts,
        "state": Literal["running", "ended"],
        "attachment": str,
        "stdin": int,
        "stdinWindow": int,
    },
)
"""`lost` bytes in front of `from` are no longer kept; `stdin` counts the bytes of the input that arrived."""


class Killed(TypedDict):
    killed: int
    escalated: bool
    survivors: int
    method: Literal["cgroup", "scan"]


class ExecExited(TypedDict):
    """`exitCode` is null if it is unknown; `left` counts processes of the command that still run."""

    exec: str
    exitCode: int | None
    signal: str | None
    reason: ExitReason
    durationMs: int
    offsets: Counts
    left: int | None


class LeftProcess(TypedDict):
    pid: int
    name: str


class ExecInfo(TypedDict):
    """One command, with the first 4096 characters of `argv`."""

    exec: str
    argv: list[str]
    pid: int
    startedAt: str
    pty: bool
    state: Literal["running", "ended"]
    attached: int
    offsets: Counts
    exit: NotRequired[ExecExited]
    left: NotRequired[list[LeftProcess]]


class ExecList(TypedDict):
    execs: list[ExecInfo]


class Entry(TypedDict):
    """`mode` has the permission bits, `mtime` is in seconds since the epoch, `target` is a link's target."""

    path: str
    type: EntryType
    size: int
    mode: int
    mtime: float
    etag: str
    target: NotRequired[str | None]
    escaped: NotRequired[bool]


class Listing(TypedDict):
    """`truncated` if there are more; `skipped` counts folders that could not be read."""

    path: str
    entries: list[Entry]
    truncated: bool
    skipped: int


class FileContent(TypedDict):
    """`text`, or else `data` in base64."""

    text: NotRequired[str]
    data: NotRequired[str]
    etag: str
    encoding: Literal["utf-8", "base64"]
    size: int
    mode: int


class FileWritten(TypedDict):
    etag: str
    size: int
    created: bool


class Removed(TypedDict):
    removed: int


class Watching(TypedDict):
    """`unwatched` counts folders that cannot be watched."""

    watch: int
    unwatched: int


class FileChange(TypedDict):
    path: str
    change: Literal["created", "changed", "removed"]


class FilesChanged(TypedDict):
    """`overflow` means that changes were missed; `ended` says why the watch has ended."""

    watch: int
    changes: list[FileChange]
    overflow: bool
    ended: NotRequired[str]


class Turn(TypedDict):
    """One commit of a tenant's history. `title` is the agent's prompt, `at` is in seconds since the epoch."""

    turn: str
    kind: TurnKind
    agent: str
    by: str
    title: str
    at: int
    files: int
    added: int
    removed: int
    leftOut: list[str]


class TurnBegun(TypedDict):
    before: Turn | None


class TurnEnded(TypedDict):
    turn: Turn | None


class Undone(TypedDict):
    """`turn` is null if nothing changes; nothing does if there are `conflicts`."""

    turn: Turn | None
    conflicts: list[str]


class Turns(TypedDict):
    turns: list[Turn]
    more: bool


class ChangedFile(TypedDict):
    path: str
    added: int
    removed: int
    binary: bool


class TurnChanges(Turn):
    """`diff` is a patch, cut off if `truncated`."""

    changed: list[ChangedFile]
    diff: str
    truncated: bool


class Subscribed(TypedDict):
    """`position` is `lastEventId` with the member's name in a cluster, by which any of them goes on."""

    subscription: int
    lastEventId: int
    position: str


class CloudEvent(TypedDict):
    """CloudEvents 1.0. `subject` is the tenant. A `gap` means that events before `data.oldest` are gone."""

    specversion: Literal["1.0"]
    id: str
    source: str
    type: str
    subject: NotRequired[str]
    time: str
    data: dict[str, Any]


class ExecInput(TypedDict):
    """The number of bytes of this attachment's input that the command has taken."""

    exec: str
    channel: int
    consumed: int


class ExecLost(TypedDict):
    """The number of bytes that are skipped before the next output."""

    exec: str
    channel: int
    stream: Literal["stdout", "stderr"]
    bytes: int


class ExecDetached(TypedDict):
    exec: str
    channel: int
    reason: str


class EventsEnded(TypedDict):
    subscription: int
    reason: str


class Draining(TypedDict):
    retryAfterMs: int


RESULTS: Final[Mapping[str, Any]] = {
    "initialize": Initialized,
    "ping": Empty,
    "tools/list": Tools,
    "tools/call": ToolResult,
    "tools/cancel": Empty,
    "session/end": Empty,
    "session/renew": Renewed,
    "exec/start": ExecStarted,
    "exec/attach": ExecAttached,
    "exec/ack": Empty,
    "exec/detach": Empty,
    "exec/closeStdin": Empty,
    "exec/resize": Empty,
    "exec/signal": Empty,
    "exec/cancel": Killed,
    "exec/list": ExecList,
    "exec/wait": ExecExited,
    "files/stat": Entry,
    "files/list": Listing,
    "files/read": FileContent,
    "files/write": FileWritten,
    "files/move": Entry,
    "files/remove": Removed,
    "files/mkdir": Entry,
    "files/watch": Watching,
    "files/unwatch": Empty,
    "turn/begin": TurnBegun,
    "turn/end": TurnEnded,
    "history/list": Turns,
    "history/diff": TurnChanges,
    "history/restore": TurnEnded,
    "history/undo": Undone,
    "events/subscribe": Subscribed,
    "events/unsubscribe": Empty,
}

NOTIFICATIONS: Final[Mapping[str, Any]] = {
    "exec/exited": ExecExited,
    "exec/stdin": ExecInput,
    "exec/lost": ExecLost,
    "exec/detached": ExecDetached,
    "events/ended": EventsEnded,
    "files/changed": FilesChanged,
    "event": CloudEvent,
    "server/draining": Draining,
}


# --- the whole protocol as JSON Schema -----------------------------------------------------------------


_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


@cache
def wire_schema() -> dict[str, Any]:
    """Return the schema of `gateway.v1`.

    `methods` has `params` and `result` of each request, `notifications` the parameters of the server's, and
    `cancel` those of the client's cancel. `$defs` has the types that they refer to.
    """
    wanted: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = []
    for method, model in METHODS.items():
        wanted.append((f"{method} params", "validation", TypeAdapter(model)))
        wanted.append((f"{method} result", "serialization", TypeAdapter(RESULTS[method])))
    for name, shape in NOTIFICATIONS.items():
        wanted.append((f"{name} told", "serialization", TypeAdapter(shape)))
    wanted.append(("cancel", "validation", TypeAdapter(CancelRequest)))
    found, definitions = TypeAdapter.json_schemas(wanted)
    of = {key: value for (key, _), value in found.items()}
    return {
        "$schema": _DIALECT,
        "title": SUBPROTOCOL,
        "methods": {
            method: {"params": of[f"{method} params"], "result": of[f"{method} result"]} for method in METHODS
        },
        "notifications": {name: of[f"{name} told"] for name in NOTIFICATIONS},
        "cancel": of["cancel"],
        "$defs": definitions["$defs"],
    }
