"""Routes that declare everything about them once: who may ask, what they take, and what they answer.

`ApiRoutes` has the decorator that makes a function an `ApiOperation`, which checks each request before it
calls the function, and the OpenAPI document describes it. The models that annotate the function's parameters
`query` and `body` check these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, get_type_hints

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from gateway import protocol
from gateway.api.access import (
    check_covered,
    check_origin,
    check_serving,
    json_body,
    keep_awake,
    optional_json,
    raw_token,
    sharer,
)
from gateway.api.http import as_json, ask
from gateway.api.services import Services, services
from gateway.auth.tokens import Token
from gateway.errors import Forbidden
from gateway.protocol.maxima import ID_MAX

ANY: Final = "any"
"""Any token that covers the tenant."""
OPEN: Final = ""
"""No token at all."""
OF_TOOL: Final = "the tool's"

_Answer = Response | Mapping[str, Any] | None
_Function = TypeVar("_Function", bound=Callable[..., Awaitable[_Answer]])


@dataclass(frozen=True, slots=True)
class Media:
    """A body other than JSON."""

    type: str
    text: bool = False


class ApiCall(Request):
    """A request whose caller was checked; an open route has no `token`, and only a tenant's a `tenant`."""

    tenant: str
    token: Token

    @property
    def gateway(self) -> Services:
        return services(self)


class ApiOperation(Route):
    """A route of one method, answered by `function`, whose docstring is the description.

    The token must allow `scope`. `answers` has a type for each success status: one, a tuple of several, or
    None for no body. The first status is that of a function that returns a mapping or None. `takes` is the
    type of a body that the function reads by itself. With `optional` the body may be left out.

    `awake` keeps the tenant awake until the answer has been sent, `serving` refuses the request while the
    gateway drains, and `operator` demands a token with the scope `admin` for every tenant.
    """

    def __init__(
        self,
        tag: str,
        method: str,
        path: str,
        function: Callable[..., Awaitable[_Answer]],
        *,
        scope: str,
        answers: Mapping[int, Any],
        takes: Any = None,
        optional: bool = False,
        headers: tuple[str, ...] = (),
        errors: Media | None = None,
        awake: bool = False,
        serving: bool = False,
        operator: bool = False,
    ) -> None:
        super().__init__(path, self._answer, methods=[method], name=function.__name__)
        models = get_type_hints(function)
        self._body = models.get("body")
        self.query = models.get("query")
        self.tag, self.method, self.function = tag, method, function
        self.required, self.answers, self.headers, self.errors = scope, answers, headers, errors
        self.takes, self.optional = takes or self._body, optional
        self._awake, self._serving, self._operator = awake, serving, operator

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        names = child.get("path_params", {}).items()
        if any(len(name) > ID_MAX for kind, name in names if kind != "path"):
            return Match.NONE, {}  # no such thing has so long a name
        return match, child

    async def _answer(self, request: Request) -> Response:
        call, given = ApiCall(request.scope, request.receive), dict[str, Any]()
        if self.required != OPEN:
            await self._check(call)
        if self.query is not None:
            given["query"] = protocol.validate(self.query, dict(call.query_params))
        if self._body is not None:
            read = optional_json if self.optional else json_body
            given["body"] = protocol.validate(self._body, await read(call, call.token))
        answer = await self.function(call, **given)
        if isinstance(answer, Response):
            return answer
        response = Response() if answer is None else as_json(answer)
        response.status_code = next(iter(self.answers))
        return response

    async def _check(self, call: ApiCall) -> None:
        """Check the caller, and count the request as its tenant's, or else as its caller's."""
        gateway, scope = call.gateway, self.required
        if scope == OF_TOOL:
            scope = gateway.toolbox.scope(call.path_params["tool"])
        check_origin(call)
        call.token = token = gateway.verify(raw_token(call))
        if (tenant := call.path_params.get("tenant")) is not None:
            check_covered(token, tenant)
            call.tenant = tenant
        if scope != ANY:
            token.require(scope)
        ask(call.scope, gateway.limits, sharer(token) if tenant is None else tenant)
        if self._operator and not token.operates:
            raise Forbidden("this needs a token with the scope admin for every tenant")
        if self._awake:
            await keep_awake(call, call.tenant)
        if self._serving:
            check_serving(call)


class ApiRoutes(list[ApiOperation]):
    """The operations of one family, which is their tag in the OpenAPI document."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self._tag = tag

    def __call__(
        self, method: str, path: str, *, scope: str, answers: Mapping[int, Any], **more: Any
    ) -> Callable[[_Function], _Function]:
        """Declare the function below as an operation; `more` are the other arguments of `ApiOperation`."""

        def declare(function: _Function) -> _Function:
            self.append(ApiOperation(self._tag, method, path, function, scope=scope, answers=answers, **more))
            return function

        return declare
