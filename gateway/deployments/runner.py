"""Run one deployment: phase after phase or, after a failure, the undos in reverse.

Once the site has been seen to work nothing is undone: what fails after that is finished later.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final

from gateway.caddy import CaddyFailed
from gateway.deployments.context import Context
from gateway.deployments.phases import Step, phases_of, template_of
from gateway.deployments.queue import DeploymentQueue, Warming
from gateway.deployments.record import PHASES, RunningDeployment, milliseconds, phase_position
from gateway.errors import GatewayError, Timeout, Unavailable
from gateway.storage.store import StoreFailed

log = logging.getLogger(__name__)

_UNDO_TIMEOUT: Final = 120.0
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# Caddy's own messages may name folders of this host; they are in the log only
_CADDY: Final = {
    "caddy_down": "Caddy does not answer; the operator must start it (incus-gateway doctor says how)",
    "caddy_foreign": "the Caddy on this host serves something else; incus-gateway doctor says what to do",
    "caddy_refused": "Caddy refuses the gateway's configuration; the gateway's log says why",
}


class DeploymentRunner:
    """Runs deployments, each in its turn and once `recovered` is set."""

    def __init__(
        self, context: Context, turns: DeploymentQueue, warming: Warming, recovered: asyncio.Event
    ) -> None:
        self._context, self._register = context, context.register
        self._turns, self._warming, self._recovered = turns, warming, recovered
        self._unprepared: set[str] = set()  # names of templates

    async def run(self, running: RunningDeployment) -> None:
        """Run one to its end. If it breaks off without one, recovery takes over."""
        record, progress, began = running.record, running.progress, time.monotonic()
        try:
            async with self._turns.turn(running.owner):
                await self._recovered.wait()
                record.enter("running")
                progress.tell("started", {"domain": record.domain, "template": record.template})
                async with contextlib.AsyncExitStack() as held:
                    await self._attempt(running, held)
            await _whatever_comes(self._register.end(record, progress, began))
            if record.error is None:
                await self._prepare(running)
        except asyncio.CancelledError:
            if record.state == "waiting":  # it had not begun
                record.error = {"code": "cancelled", "message": "the deployment was cancelled"}
                progress.tell("cancelled", {**phase_position(PHASES[0]), "error": record.error})
                await _whatever_comes(self._register.end(record, progress, began))
        except Exception:
            log.exception("deployment %s failed unexpectedly; its recovery follows", record.id)
        finally:
            self._register.running.pop(record.id, None)

    async def _prepare(self, running: RunningDeployment) -> None:
        """Let the next deployment of a template that worked start from a copy."""
        request, record = running.request, running.record
        if isinstance(request.template, str):
            with contextlib.suppress(GatewayError):  # the template may have been removed
                template = await template_of(request, record.tenant, self._context.settings)
                recipe = await asyncio.to_thread(template.recipe)
                await self._context.admit()
                told = partial(self._prepared, template.name)
                self._context.sites.copies.prepare(recipe, told, request.size, self._turns.quiet)
        elif record.source == "image" and running.upload is not None:
            self._warming.want(running.upload, request.size)

    def _prepared(self, template: str, error: GatewayError | None) -> None:
        """Report that no golden copy of a template could be made, or that it could again."""
        if error is not None:
            log.warning("cannot prepare template %s: %s", template, error.message)
            self._unprepared.add(template)
            # no message: everybody sees this, and a template's output is for the operator
            facts = {"code": error.code, "reason": error.facts.get("reason")}
            self._context.bus.publish("gateway.template.failed", None, {"template": template, **facts})
        elif template in self._unprepared:
            self._unprepared.discard(template)
            self._context.bus.publish("gateway.template.ready", None, {"template": template})

    async def _attempt(self, running: RunningDeployment, held: contextlib.AsyncExitStack) -> None:
        """Go through the phases. On failure or cancellation undo them in reverse, and record that.

        `held` keeps the tenant awake until it is closed.
        """
        undo = contextlib.AsyncExitStack()
        current = PHASES[0]
        phases = phases_of(running.request)(self._context, running, undo, held)
        try:
            await held.enter_async_context(self._context.use(running.record.tenant))
            for index, (current, step) in enumerate(zip(PHASES, phases.steps, strict=True)):
                await self._phase(running, index, current, step)
        except (Exception, asyncio.CancelledError) as error:
            if running.record.settled:
                raise
            await _whatever_comes(self._undo(running, undo, current, error))

    async def _phase(self, running: RunningDeployment, index: int, name: str, step: Step) -> None:
        record, progress = running.record, running.progress
        phase = record.phases[index]
        phase.state = "running"
        progress.tell("phase.started", phase_position(name))
        began = time.monotonic()
        try:
            await self._register.save(record)
            facts = await step() or {}
        except BaseException:
            phase.state, phase.ms = "failed", milliseconds(began)
            raise
        phase.state, phase.ms = "done", milliseconds(began)
        progress.tell("phase.finished", {**phase_position(name), "ms": phase.ms, **facts})

    async def _undo(
        self, running: RunningDeployment, undo: contextlib.AsyncExitStack, phase: str, error: BaseException
    ) -> None:
        record, progress = running.record, running.progress
        if isinstance(error, asyncio.CancelledError):
            record.error = {"code": "cancelled", "message": "the deployment was cancelled", "phase": phase}
            if not running.cancelled:
                record.error["message"] = "the gateway was stopped"
            kind = "cancelled"
        else:
            record.failed(_as_gateway_error(error), phase)
            kind = "failed"
        record.enter("undoing")
        progress.flush()
        progress.tell(kind, {**phase_position(phase), "error": record.error})
        with contextlib.suppress(StoreFailed):  # a full disk: one more reason to undo
            await self._register.save(record)
        async with asyncio.timeout(_UNDO_TIMEOUT):
            await undo.aclose()
        for done in record.phases:
            if done.state == "done":
                done.state = "undone"


async def _whatever_comes(work: Coroutine[Any, Any, None]) -> None:
    """Finish `work` even if this task is cancelled; `work` bounds its own time."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _as_gateway_error(error: BaseException) -> GatewayError:
    """Return an error as a `GatewayError`. Unexpected ones are logged."""
    if isinstance(error, CaddyFailed) and error.facts.get("reason") in _CADDY:
        log.warning("a deployment failed: %s", error.message)
        return CaddyFailed(_CADDY[error.facts["reason"]], **error.facts)
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, TimeoutError):
        return Timeout("a step took too long; the gateway's log says more")
    if isinstance(error, OSError) and error.errno in _FULL:
        log.warning("a deployment failed: %s", error)
        return Unavailable("the disk of the state dir is full; free some space there", reason="disk_full")
    log.error("a deployment failed", exc_info=error)
    return Unavailable("the deployment failed; the gateway's log says why")
