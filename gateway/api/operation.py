"""Routes that declare their inputs and answers by models, which check requests and describe the API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from gateway.protocol.maxima import ID_MAX

ANY: Final = "any"
"""Any token that covers the tenant."""
OPEN: Final = ""
"""No token at all."""
OF_TOOL: Final = "the tool's"

_KEY: Final = "gateway.operation"


@dataclass(frozen=True, slots=True)
class Media:
    """A body other than JSON."""

    type: str
    text: bool = False


class Operation(Route):
    """A route of one method. Its endpoint's docstring is the description.

    `answers` has a type for each success status: one, a tuple of several, or None for no body. `takes` is the
    model of the JSON body, which may be omitted if `optional`; `query` is the model of the query. `access`
    checks requests against nothing else.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        method: str = "GET",
        *,
        scope: str,
        answers: Mapping[int, Any],
        takes: Any = None,
        optional: bool = False,
        query: Any = None,
        headers: tuple[str, ...] = (),
        errors: Media | None = None,
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.method, self.required, self.answers = method, scope, answers
        self.takes, self.optional, self.query, self.headers = takes, optional, query, headers
        self.errors = errors

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        names = child.get("path_params", {}).items()
        if any(len(name) > ID_MAX for kind, name in names if kind != "path"):
            return Match.NONE, {}  # no such thing has so long a name
        return match, {**child, _KEY: self} if match is Match.FULL else child

    def check_scope(self, scope: str | None) -> None:
        """Raise `AssertionError` if a scope is checked that is not the declared one."""
        wanted = self.required
        assert wanted in (scope or ANY, OF_TOOL), f"{self.path} declares {wanted!r}, and checks {scope!r}"

    def check_body(self, model: type) -> None:
        """Raise `AssertionError` if a body is checked by a model that is not the declared one."""
        assert model is self.takes or model in get_args(self.takes), f"{self.path} does not take {model}"

    def check_query(self, model: type) -> None:
        assert model is self.query, f"{self.path} does not declare the query {model}"


def operation(request: HTTPConnection) -> Operation:
    """Return a request's operation."""
    found: Operation = request.scope[_KEY]
    return found
