"""Models of the HTTP routes' answers and queries, on which clients may rely.

The routes declare them, and the OpenAPI document is made from them. The tests check every answer of a live
gateway against that document. A later version may add members.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from typing_extensions import TypedDict

from gateway import protocol
from gateway.deployments.record import Kind, State
from gateway.errors import WIRE_CODES
from gateway.protocol import types

Code: TypeAlias = Annotated[str, WithJsonSchema({"type": "string", "enum": list(WIRE_CODES)})]
Status: TypeAlias = Literal["running", "stopped", "frozen", "starting", "stopping", "error"]


# --- queries ------------------------------------------------------------------------------------------


def _number(given: object) -> object:
    if isinstance(given, str):
        if not protocol.NUMBER.fullmatch(given):
            raise ValueError("must be a whole number")
        return int(given)
    return given


def _switch(given: object) -> object:
    if isinstance(given, str):
        return protocol.switch({"it": given}, "it")
    return given


Number: TypeAlias = Annotated[int, Field(ge=0), BeforeValidator(_number)]
Switch: TypeAlias = Annotated[
    bool, BeforeValidator(_switch), WithJsonSchema({"type": "string", "enum": ["0", "1", "false", "true"]})
]


class Query(BaseModel):
    """Base of all queries. Unknown members are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class TenantsQuery(Query):
    """`after` is the last name of the previous page."""

    limit: Annotated[int, Field(ge=1, le=1000), BeforeValidator(_number)] | None = None
    after: types.TenantName = ""


class HistoryQuery(Query):
    """`before` is a turn; older ones are returned."""

    limit: Annotated[int, Field(ge=1, le=200), BeforeValidator(_number)] = 50
    before: types.TurnId | None = None


class AuditQuery(Query):
    """`before` is the id of an entry; older ones are returned. In a cluster it is one of `member`."""

    tenant: types.TenantName | None = None
    member: types.MemberName | None = None
    limit: Annotated[int, Field(ge=1, le=1000), BeforeValidator(_number)] = 100
    before: Number | None = None


class EnvironmentQuery(Query):
    """`values` asks for the values too, which needs the scope `exec`."""

    values: Switch = False


class RemovalQuery(Query):
    """`recursive` removes a folder with everything in it."""

    recursive: Switch = False


class LogsQuery(Query):
    """`lines` is how many of the last lines to return; with `follow`, later ones are sent as they come."""

    lines: Number = 100
    follow: Switch = False


class EventsQuery(Query):
    """Each is a comma-separated list of at most 64 values. A type may end in `*`."""

    tenant: types.Choices | None = None
    deployment: types.Choices | None = None
    type: types.Choices | None = None
    lastEventId: types.EventPosition | None = None


class WakeQuery(Query):
    domain: types.DomainName = ""


# --- answers ------------------------------------------------------------------------------------------


class Problem(TypedDict):
    """RFC 9457. `code` is for programs, `detail` for people; the error's facts are further members."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    code: Code


class Alive(TypedDict):
    status: Literal["alive"]


class Ready(TypedDict):
    status: Literal["ready"]


class Session(TypedDict):
    """What a token grants; `id` is its `jti`, `expires` in seconds since the epoch."""

    subject: str
    scopes: list[str]
    tenants: list[str]
    expires: float
    id: str
    slot: str | None
    domains: list[str] | None


class Listening(TypedDict):
    """A listening port. `address` is 0.0.0.0 or :: if it accepts connections from anywhere."""

    port: int
    address: str


class Ports(TypedDict):
    """The ports on which a tenant's processes listen, in ascending order."""

    ports: list[Listening]


class PreviewKey(TypedDict):
    """A page whose address has `parameter=key` in its query is served with the console's script."""

    parameter: str
    key: str
    expires: float


class AgentToken(TypedDict):
    """A token for the agents' server; `expires` in seconds since the epoch."""

    token: str
    subject: str
    scopes: list[str]
    expires: float


class Traffic(TypedDict):
    received_bytes: int
    sent_bytes: int


class Usage(TypedDict):
    """What a tenant uses. The `local` runtime reports only `processes`."""

    cpu_seconds: NotRequired[float]
    memory_bytes: NotRequired[int]
    memory_peak_bytes: NotRequired[int | None]
    memory_limit_bytes: NotRequired[int | None]
    processes: int
    disk_bytes: NotRequired[int | None]
    disk_limit_bytes: NotRequired[int | None]
    network: NotRequired[dict[str, Traffic]]


class Tenant(TypedDict):
    """One tenant. If `asleep`, it is stopped until a request wakes it."""

    name: str
    domain: str | None
    status: Status
    asleep: bool
    address: str | None
    url: str | None
    port: int | None
    created: str | None
    limits: dict[str, Any]
    location: str | None
    reason: NotRequired[Literal["member_away"]]


class StandbyShown(TypedDict):
    """The copy of a tenant on another member of the cluster, as the tenant was at a time.

    `late` is true if it has not been up to date for three intervals.
    """

    member: str
    of: str
    late: bool


class TenantShown(Tenant):
    """In a cluster, `standby` is null if the tenant has no copy."""

    usage: Usage | None
    standby: NotRequired[StandbyShown | None]


class Tenants(TypedDict):
    """If there are more tenants, send `next` as `after` to get them.

    `unanswered` are the members of a cluster that gave no answer.
    """

    tenants: list[Tenant]
    next: NotRequired[str]
    unanswered: NotRequired[list[str]]


class Site(TypedDict):
    """`answers` is null if the tenant has no site, or is asleep."""

    answers: bool | None
    status: int | None
    reason: NotRequired[Literal["host_refused"]]
    said: NotRequired[str]


class Snapshot(TypedDict):
    """`size` counts the bytes that only this snapshot holds."""

    name: str
    created: str | None
    size: int | None


class Snapshots(TypedDict):
    snapshots: list[Snapshot]


class Ran(TypedDict):
    """How a command ended and what it printed. `truncated` if it printed more."""

    exec: str
    exit_code: int | None
    signal: str | None
    reason: Literal["exited", "timeout", "cancelled"]
    truncated: bool
    duration_ms: int
    left: int | None
    stdout: str
    stderr: str


class Template(TypedDict):
    name: str
    description: str
    port: NotRequired[int]
    error: NotRequired[str]


class Templates(TypedDict):
    templates: list[Template]


class DeploymentBegun(TypedDict):
    id: str
    tenant: str
    state: State


class Phase(TypedDict):
    name: str
    state: Literal["waiting", "running", "done", "failed", "undone"]
    ms: int | None


class Detected(TypedDict):
    """What was detected in a folder. `lines` tell people what was chosen and why."""

    name: str
    title: str
    install: str | None
    start: str | None
    static: str | None
    port: int | None
    lines: list[str]


class Deployment(DeploymentBegun):
    """One deployment. Times are in seconds since the epoch; `ms` is its duration."""

    domain: str
    url: str
    template: str
    kind: Kind
    port: int
    source: str | None
    rollback: str | None
    env: list[str] | None
    created: float
    ended: float | None
    ms: int | None
    error: dict[str, Any] | None
    warnings: list[str]
    detected: Detected | None
    phases: list[Phase]


class Deployments(TypedDict):
    """`unanswered` are the members of a cluster that said nothing."""

    deployments: list[Deployment]
    unanswered: NotRequired[list[str]]


class Kept(TypedDict):
    id: str
    replaced: float


class TenantDeployments(Deployments):
    """`live` is the deployment that is served; those in `kept` can be rolled back to."""

    live: str | None
    kept: list[Kept]


class Environment(TypedDict):
    names: list[str]
    env: NotRequired[dict[str, str]]


Moved = TypedDict(
    "Moved",
    {
        "id": str,
        "tenant": str,
        "from": str,
        "to": str,
        "state": Literal[
            "waiting", "copying", "switching", "decided", "arrived", "undoing", "moved", "failed"
        ],
        "began": float,
        "ended": float | None,
        "gap_ms": int | None,
        "error": dict[str, Any] | None,
        "drained": bool,
    },
)
Moved.__doc__ = (
    """A move of a tenant. Times are in seconds since the epoch, `gap_ms` is how long calls waited."""
)


class StandbyCopy(TypedDict):
    """The copy on `member` of a tenant of `home`, as it was at `of`.

    `lost_seconds` is the age of the copy when `home` was last heard. `lost` is set once that was removed.
    """

    tenant: str
    home: str
    member: str
    of: str
    lost_seconds: int
    lost: bool


class StandbyCopies(TypedDict):
    """`unanswered` names the members that did not answer."""

    copies: list[StandbyCopy]
    unanswered: list[str]


class Recovered(TypedDict):
    """The tenants that are back on the `member` of their copy, and why others are not, by name."""

    recovered: list[StandbyCopy]
    failed: dict[str, str]


class Revoked(TypedDict):
    """`closed` counts the websockets that were closed, in a cluster at all gateways that heard of it at once.

    There `unheard` names the members that did not, and `recorded` says whether they will know it.
    """

    id: str
    closed: int
    recorded: NotRequired[bool]
    unheard: NotRequired[list[str]]


class AuditEntry(TypedDict):
    """`time` is in seconds since the epoch."""

    id: int
    time: float
    who: str
    action: str
    tenant: str | None
    facts: dict[str, Any]
    member: NotRequired[str]


class Audit(TypedDict):
    """`unanswered` are the members of a cluster that said nothing."""

    entries: list[AuditEntry]
    unanswered: NotRequired[list[str]]
