"""The application's routes: one module for each family, and all of them in `ROUTES`."""

from __future__ import annotations

from typing import Final

from starlette.routing import BaseRoute

from gateway.api import editor
from gateway.api.routes import (
    deployments,
    events,
    files,
    history,
    lifecycle,
    operator,
    process,
    reference,
    session,
    tenants,
    tools,
    websocket,
)

ROUTES: Final[tuple[BaseRoute, ...]] = (
    *editor.ROUTES,
    *process.ROUTES,
    *reference.ROUTES,
    *session.ROUTES,
    *tenants.ROUTES,
    *lifecycle.ROUTES,
    *tools.ROUTES,
    *files.ROUTES,
    *history.ROUTES,
    *deployments.ROUTES,
    *events.ROUTES,
    *operator.ROUTES,
    *websocket.ROUTES,
)
