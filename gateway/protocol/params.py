"""The parameters of every method, as models that validate what clients send."""

from __future__ import annotations

import re
from collections.abc import Mapping
from signal import Signals
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from typing_extensions import TypeAliasType

from gateway.errors import InvalidParams, TooLarge
from gateway.protocol.maxima import ARGUMENT_MAX, CONTENT_MAX, MCP_MAX, SHORT_MAX
from gateway.protocol.types import (
    Argv,
    CallId,
    Command,
    Content,
    Cwd,
    Etag,
    EventPosition,
    EventType,
    ExecId,
    ExecName,
    FileName,
    Label,
    Path,
    SessionName,
    Title,
    Token,
    ToolName,
    TurnId,
    User,
    Variables,
)


class Params(BaseModel):
    """Base of all parameters: camelCase on the wire, no coercion, unknown names are refused."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True, frozen=True)


P = TypeVar("P", bound=BaseModel)


class NoParams(Params):
    pass


class ClientInfo(Params):
    # clients may send other facts about themselves
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    name: Label = "unknown"
    version: Label = ""


class Initialize(Params):
    client: ClientInfo = ClientInfo()
    token: Token | None = None
    session: SessionName | None = None
    read_before_write: bool = False


class SessionRenew(Params):
    token: Token


NUMBER: Final = re.compile(r"[0-9]{1,18}")  # in a header or query: one that SQLite and JSON can hold


class ToolsCall(Params):
    name: ToolName
    # `tools.schemas` has the lengths of each tool's own
    arguments: Annotated[dict[str, Any], Field(max_length=64)] = Field(default_factory=dict)
    call_id: CallId | None = None
    linger_ms: Annotated[int, Field(ge=0)] | None = None


class ToolsCancel(Params):
    call_id: CallId


class PtySize(Params):
    cols: Annotated[int, Field(ge=1, le=65535)] = 80
    rows: Annotated[int, Field(ge=1, le=65535)] = 24


Encoding = Literal["binary", "utf-8"]


class Reader(Params):
    """How a reader wants the output. With a `window` it acknowledges, and is sent no more than that ahead."""

    acks: bool = False
    window: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    encoding: Encoding = "binary"


class ExecStart(Reader):
    """Exactly one of `argv`, a program, and `command`, a line for bash."""

    argv: Argv | None = None
    command: Command | None = None
    cwd: Cwd | None = None
    env: Variables = Field(default_factory=dict)
    user: User | None = None
    pty: PtySize | None = None
    stdin: bool = False
    helper: bool = False
    timeout_ms: Annotated[int, Field(gt=0, le=7 * 86_400_000)] | None = None
    linger_ms: Annotated[int, Field(ge=-1, le=7 * 86_400_000)] | None = None
    exec_id: ExecId | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ExecStart:
        if (self.argv is None) == (self.command is None):
            raise ValueError("give either argv or command")
        return self


class Offsets(Params):
    stdout: Annotated[int, Field(ge=0)] = 0
    stderr: Annotated[int, Field(ge=0)] = 0


class ExecAttach(Reader):
    exec: ExecName
    from_: Offsets = Field(default_factory=Offsets, alias="from")
    resume: SessionName | None = None


class ExecAck(Offsets):
    exec: ExecName


class ExecRef(Params):
    exec: ExecName


class ExecResize(ExecRef):
    cols: Annotated[int, Field(ge=1, le=65535)]
    rows: Annotated[int, Field(ge=1, le=65535)]


_SIGNAL_MAX: Final = 16  # characters of a name


def _signal_number(named: object) -> int:
    """Return the number of a signal given as `INT`, `SIGINT` or 2."""
    if isinstance(named, str) and len(named) <= _SIGNAL_MAX:
        name = "SIG" + named.upper().removeprefix("SIG")
        if name in Signals.__members__:
            return Signals[name].value
    if isinstance(named, int) and not isinstance(named, bool) and 1 <= named <= 64:
        return named
    raise ValueError("there is no such signal; name one, such as INT, or give its number")


_SIGNAL: Final = {
    "anyOf": [
        {"type": "string", "maxLength": _SIGNAL_MAX},
        {"type": "integer", "minimum": 1, "maximum": 64},
    ]
}


class ExecSignal(ExecRef):
    signal: Annotated[int, PlainValidator(_signal_number), WithJsonSchema(_SIGNAL)]
    tree: bool = False


class ExecCancel(ExecRef):
    grace_ms: Annotated[int, Field(ge=0, le=60_000)] | None = None


class EventsSubscribe(Params):
    types: Annotated[list[EventType], Field(max_length=64)] | None = None
    last_event_id: Annotated[int, Field(ge=0, lt=1 << 63)] | EventPosition | None = None


class EventsUnsubscribe(Params):
    subscription: int


class FilesPath(Params):
    path: Path


class FilesList(Params):
    path: Path = "."
    depth: Annotated[int, Field(ge=1, le=64)] = 1


class FilesWrite(Params):
    """Exactly one of `text`, written as UTF-8, and `data`, in base64."""

    path: Path
    text: Content | None = None
    data: Content | None = None
    if_match: Etag | None = None
    if_none_match: Etag | None = None
    create_dirs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> FilesWrite:
        if (self.text is None) == (self.data is None):
            raise ValueError("give either text or data")
        return self


class FilesMove(Params):
    from_: Path = Field(alias="from")
    to: Path
    overwrite: bool = False
    create_dirs: bool = False


class FilesRemove(Params):
    path: Path
    recursive: bool = False
    if_match: Etag | None = None


class FilesWatch(Params):
    """`ignore` has names, ignored at any depth; None selects the gateway's own list."""

    paths: Annotated[list[Path], Field(min_length=1, max_length=64)]
    ignore: Annotated[list[FileName], Field(max_length=64)] | None = None


class FilesUnwatch(Params):
    watch: int


class FilesMkdir(Params):
    path: Path
    create_dirs: bool = True


class TurnBegin(Params):
    """`title` is the agent's prompt, `agent` its name, by default the token's subject."""

    title: Title = ""
    agent: Annotated[Label, Field(min_length=1)] | None = None


class HistoryList(Params):
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    before: TurnId | None = None


class HistoryTurn(Params):
    turn: TurnId


class HistoryRestore(HistoryTurn):
    """`to` selects the state: right `after` the turn, or `before` it."""

    to: Literal["after", "before"] = "after"


class UndoBody(Params):
    """`force` names paths in conflict that are to be as they were before the turn."""

    force: Annotated[list[Path], Field(max_length=1000)] = Field(default_factory=list)


class HistoryUndo(HistoryTurn, UndoBody):
    """An undo of one turn."""


class CancelRequest(Params):
    id: Annotated[str, Field(max_length=SHORT_MAX)] | int


METHODS: Final[Mapping[str, type[Params]]] = {
    "initialize": Initialize,
    "ping": NoParams,
    "tools/list": NoParams,
    "tools/call": ToolsCall,
    "tools/cancel": ToolsCancel,
    "session/end": NoParams,
    "session/renew": SessionRenew,
    "exec/start": ExecStart,
    "exec/attach": ExecAttach,
    "exec/ack": ExecAck,
    "exec/detach": ExecRef,
    "exec/closeStdin": ExecRef,
    "exec/resize": ExecResize,
    "exec/signal": ExecSignal,
    "exec/cancel": ExecCancel,
    "exec/list": NoParams,
    "exec/wait": ExecRef,
    "files/stat": FilesPath,
    "files/list": FilesList,
    "files/read": FilesPath,
    "files/write": FilesWrite,
    "files/move": FilesMove,
    "files/remove": FilesRemove,
    "files/mkdir": FilesMkdir,
    "files/watch": FilesWatch,
    "files/unwatch": FilesUnwatch,
    "turn/begin": TurnBegin,
    "turn/end": NoParams,
    "history/list": HistoryList,
    "history/diff": HistoryTurn,
    "history/restore": HistoryRestore,
    "history/undo": HistoryUndo,
    "events/subscribe": EventsSubscribe,
    "events/unsubscribe": EventsUnsubscribe,
}


McpName: TypeAlias = Annotated[str, Field(max_length=SHORT_MAX)]
McpText: TypeAlias = Annotated[str, Field(max_length=MCP_MAX)]
McpList: TypeAlias = Annotated["list[McpValue]", Field(max_length=256)]
McpObject: TypeAlias = Annotated["dict[McpName, McpValue]", Field(max_length=64)]
McpValue = TypeAliasType(
    "McpValue",
    Annotated[
        Annotated[McpText, Tag("str")]
        | Annotated[McpList, Tag("list")]
        | Annotated[McpObject, Tag("dict")]
        | Annotated[bool | int | float | None, Tag("other")],
        # by the kind of a value, or each of a deep one would be compared with all kinds
        Discriminator(lambda value: kind if (kind := type(value).__name__) in _NESTED else "other"),
    ],
)
_NESTED: Final = ("str", "list", "dict")


class McpMessage(BaseModel):
    """What the package `mcp` gets to see of a message: all but the arguments of a tool.

    Only their greatest lengths are checked here, and `MCP_MAX` for all together; the package checks the rest.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    jsonrpc: McpName = ""
    id: McpName | int | None = None
    method: McpName = ""
    params: McpObject | None = None
    result: McpObject | None = None
    error: McpObject | None = None


_SHOWN: Final = 100  # characters of a name that a client made up
_MESSAGE_MAX: Final = 500


def validate(model: type[P], params: object) -> P:
    """Return `params` as `model`. Raises `InvalidParams` that names the first wrong field."""
    try:
        return model.model_validate(params)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # for a union pydantic appends the type that it tried last; a name may be a client's own
        where = ".".join(str(part)[:_SHOWN] for part in first["loc"] if part not in ("str", "int"))[
            :_MESSAGE_MAX
        ]
        message = first["msg"].removeprefix("Value error, ")[:_MESSAGE_MAX]
        limit = first.get("ctx", {}).get("max_length")
        if first["type"] == "string_too_long" and limit in (ARGUMENT_MAX, CONTENT_MAX):
            raise TooLarge(f"{where} exceeds {limit} characters", field=where, limit=limit) from None
        if first["type"] == "model_type":
            message = "this must be an object" if where else "params must be an object"
        raise InvalidParams(f"{where}: {message}" if where else message, field=where) from None


def switch(given: Mapping[str, str], name: str) -> bool:
    """Return whether a header or query member turns something on; a missing one means off.

    Raises `InvalidParams` for other words: a client that asks for a check must not silently go without.
    """
    match given.get(name, "").strip().lower():
        case "1" | "true":
            return True
        case "" | "0" | "false":
            return False
        case _:
            raise InvalidParams(f"{name} must be 1 or 0", field=name)
