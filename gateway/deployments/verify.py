"""Verify that a site that was just started works, and keeps working.

`answering` waits for its first answer, and tells if the service listens in the wrong place. `settled`
loads the page as a browser does, and watches the site for a while. `seen` asks through Caddy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from gateway.caddy import Caddy, CaddyFailed
from gateway.deployments.causes import KILLED, SIGKILL, ended, in_the_way, last_words
from gateway.deployments.listeners import Misplaced
from gateway.deployments.page import Browser, Page
from gateway.deployments.steadiness import SMALL, Steadiness
from gateway.errors import ExecFailed, GatewayError, Timeout
from gateway.limits.pressure import Pressure
from gateway.runtime.listening import ListeningSocket
from gateway.runtime.probe import HostRefused, NoAnswer, answer, ask
from gateway.runtime.sites import Exposure, Recipe, Side, SiteServices
from gateway.settings import Settings

log = logging.getLogger(__name__)

_LOOK: Final = 0.75  # seconds between two checks of a service that does not answer yet
_COPIED: Final = 5.0  # seconds until the first of them, for a copy of a site that answered
_KEPT_OUT: Final = 3.0  # seconds until a next side is asked whether something keeps it from answering
_RESTARTS: Final = 4  # restarts of a service by itself, within seconds: it will not come up
_ANSWER: Final = 10.0  # seconds for one answer through Caddy
_PART: Final = 15.0  # seconds for a part of a page: a dev server may have to build it first
_AGAIN: Final = 0.25  # seconds until an incomplete page is loaded again
_MISSING: Final = 3.0  # seconds after which a missing part of a page counts as missing
_FOLLOWING: Final = 15.0  # seconds for requests of what scripts import
_AFTER: Final = 1.0  # seconds that a site must stay up after its page was loaded, which makes it work hardest
_WORKING: Final = 3.0  # times as long as it must stay up, while its service is still at work
_STEADY_LOOK: Final = 1.0  # seconds between two checks of a service that answers
_OVER_LOOK: Final = 3.0  # in the background: each covers all since the last
_REFUSED: Final = 3  # consecutive checks at which nothing listened: longer than a reload takes
_LAST: Final = 2.0  # seconds for a last answer, which a reload may delay
_WATCHED: Final = 64  # sites that are watched after their deployment, at most
_LISTEN: Final = "it must listen on 0.0.0.0 and $PORT"


Way = Literal["caddy", "direct"]
"""Through the public address of a site, or at its own address before visitors are routed there."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The side of a tenant's site to verify, and what is expected of it."""

    tenant: str
    side: Side
    domain: str
    recipe: Recipe
    exposure: Exposure
    usual: frozenset[int] = frozenset()
    """Ports on which its framework serves by default."""
    advice: str = ""
    """How to make it listen where it must."""
    memory: int = 0
    """Bytes of its tenant's memory; 0 if unknown."""


class Unsteady(ExecFailed):
    """A site that answered did not stay up; `why` is the reason in short."""

    def __init__(self, why: str, said: str) -> None:
        self.why = why
        super().__init__(
            f"the site answered but did not stay up: {why}. {last_words(said, finished=True)}",
            reason="unsteady",
        )


def host_refused(domain: str, error: HostRefused) -> ExecFailed:
    """Return the error for a site that answers, but not under its domain."""
    return ExecFailed(
        f"the site refuses visitors of {domain} (status {error.status}): {error.said}. Allow {domain} in its "
        "configuration, such as with `server.allowedHosts` of Vite",
        reason="host_refused",
    )


class Verifier:
    """Checks sites without changing anything in them. Close it at the end."""

    def __init__(
        self, services: SiteServices, caddy: Caddy, settings: Settings, pressure: Pressure | None = None
    ) -> None:
        self._services, self._caddy, self._settings = services, caddy, settings
        self._pressure = pressure
        self._watching: dict[str, asyncio.Task[None]] = {}

    async def aclose(self) -> None:
        """Stop watching."""
        tasks = list(self._watching.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def answering(
        self, site: Subject, say: Callable[[str], None] | None = None, *, copied: bool = False
    ) -> float:
        """Wait until a side answers at its own address; return when it did, by `time.monotonic()`.

        A site that listens elsewhere first has until the time is over, since that may be a helper; `say`
        tells it at once. The next side has not: it cannot be tried beside the live one.
        A `copied` site is left alone for longer at first, since checks would only slow it down.
        Raises `Timeout` (`never_healthy`) and `ExecFailed` (`wrong_address`, `host_refused`).
        """
        health, where = site.recipe.health, site.exposure
        limit, began = self._settings.verify_timeout, time.monotonic()

        async def first() -> float:
            await answer(where.address, where.port, health, limit, host=site.domain)
            return time.monotonic()

        answering = asyncio.create_task(first())
        misplaced, service = Misplaced(where.port, (where.address,), site.usual), None
        wrong: ListeningSocket | None = None
        pause = _COPIED if copied else _LOOK
        try:
            while not (await asyncio.wait({answering}, timeout=pause))[0]:
                pause = _LOOK
                service = await self._services.state(site.tenant, site.side)
                if service is None or answering.done():
                    continue
                before, wrong = wrong, misplaced.look(service, time.monotonic())
                if site.side == "next" and await self._kept_out(site, began, wrong):
                    break
                if wrong is not None and wrong != before and say is not None:
                    say(f"it listens on {wrong}, and not yet on 0.0.0.0:{where.port}")
                if service.restarts >= _RESTARTS:
                    said = await self._services.log(site.tenant, site.side)
                    short = KILLED.search(said) is not None and await self._short(site, began)
                    why = ended(said, site.recipe.start, site.memory, short=short)
                    raise Timeout(f"{why}. {last_words(said, finished=True)}", reason="never_healthy")
            if answering.done() and not answering.exception():
                return await answering
            if answering.done() and isinstance(refused := answering.exception(), HostRefused):
                raise host_refused(site.domain, refused) from None
            if wrong is not None:
                raise ExecFailed(
                    f"it listens on {wrong}; it must listen on 0.0.0.0:$PORT, "
                    f"where PORT is {where.port}{site.advice and ': '}{site.advice}. "
                    f"{await self._said(site)}",
                    reason="wrong_address",
                )
            if service is not None and misplaced.reached(service):
                why = (
                    f"the site listens on the right port but does not answer {health} in {limit:g} s "
                    "(GATEWAY_VERIFY_TIMEOUT)"
                )
            else:
                why = f"the site did not answer {health} on port {where.port}; {_LISTEN}"
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        raise Timeout(f"{why}. {await self._said(site)}", reason="never_healthy")

    async def _kept_out(self, site: Subject, began: float, wrong: ListeningSocket | None) -> bool:
        """Return whether a next side cannot answer beside the live one, but may live on (`tsx watch`)."""
        if wrong is not None or time.monotonic() - began < _KEPT_OUT:
            return wrong is not None
        return in_the_way(await self._said(site))

    async def seen(self, site: Subject) -> None:
        """Wait until it answers through Caddy under its domain. Raises `Timeout`, `never_healthy`."""
        why = await self._asked(site, "caddy", self._settings.verify_timeout)
        if why:
            raise Timeout(f"{site.domain} does not answer through Caddy: {why}", reason="never_healthy")

    async def settled(
        self, site: Subject, way: Way, answered: float, seconds: float, *, follow: bool = True
    ) -> bool:
        """Verify that the site's page is complete, and that it stays up for `seconds` after it `answered`.

        With `follow`, request what its scripts import too, so that a dev server has built it. Returns whether
        the site was still at work by then, and was watched on until it rested.
        Raises `Timeout` (`never_healthy`) if its page is incomplete, and `Unsteady`.
        """
        steady = Steadiness(self._services, site.tenant, site.side, answered)
        beginning = asyncio.create_task(steady.begin())
        try:
            await self._while_up(site, steady, self._whole(site, way, follow=follow))
            if seconds > 0:
                await beginning
                return await self._stays(site, way, steady, answered, seconds, _STEADY_LOOK)
            return False
        finally:
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)

    async def _while_up(self, site: Subject, steady: Steadiness, work: Coroutine[Any, Any, None]) -> None:
        """Wait for a check of a site while the site stays up. Also raises `Unsteady`."""
        task, refused, began = asyncio.create_task(work), 0, time.monotonic()
        try:
            while not (await asyncio.wait({task}, timeout=_STEADY_LOOK))[0]:
                why = await steady.failure()
                refused = refused + 1 if await self._refuses(site) else 0
                if not why and refused >= _REFUSED:
                    why = "nothing listens there any more"
                if why and not task.done():
                    raise await self._unsteady(site, why, began)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _refuses(self, site: Subject) -> bool:
        try:
            await ask(site.exposure.address, site.exposure.port, site.recipe.health, host=site.domain)
        except OSError as error:
            return not isinstance(error, TimeoutError)  # it may just be busy
        except ValueError:
            pass
        return False

    async def _whole(self, site: Subject, way: Way, *, follow: bool) -> None:
        """Wait until a site's page is complete. Raises `Timeout`, `never_healthy`."""
        if way == "caddy":
            await self.seen(site)
        began = time.monotonic()
        async with self._browser(site, way) as browser:
            while True:
                page = await _look(browser)
                if not page.missing:
                    break
                late = time.monotonic() - began
                gone = all(why.startswith("status 4") for why in page.missing.values())
                if late > (_MISSING if gone else self._settings.verify_timeout):
                    name, why = next(iter(page.missing.items()))
                    more = f" (and {len(page.missing) - 1} more)" if len(page.missing) > 1 else ""
                    raise Timeout(
                        f"the page refers to {name[:200]}{more}, which fails to load: {why}; "
                        f"add it, or take it out of the page. {await self._said(site)}",
                        reason="never_healthy",
                    )
                await asyncio.sleep(_AGAIN)
            if follow:
                await browser.follow(page.scripts, _FOLLOWING)

    def watch(self, site: Subject, seconds: float, tell: Callable[[str], Awaitable[None]]) -> None:
        """Watch a site after its deployment, in the background; call `tell` if it does not stay up."""
        self.forget(site.tenant)
        if len(self._watching) >= _WATCHED or seconds <= 0:
            return
        task = asyncio.create_task(self._watch(site, seconds, tell), name=f"watch {site.tenant}")
        self._watching[site.tenant] = task
        task.add_done_callback(partial(self._watched, site.tenant))

    def forget(self, tenant: str) -> None:
        """Stop watching a tenant's site, since it ends or is replaced."""
        if (task := self._watching.pop(tenant, None)) is not None:
            task.cancel()

    def _watched(self, tenant: str, task: asyncio.Task[None]) -> None:
        if self._watching.get(tenant) is task:
            del self._watching[tenant]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("cannot watch the site of %s", tenant, exc_info=error)

    async def _watch(self, site: Subject, seconds: float, tell: Callable[[str], Awaitable[None]]) -> None:
        began = time.monotonic()
        steady = Steadiness(self._services, site.tenant, site.side, began)
        try:
            await steady.begin()
            async with self._browser(site, "caddy") as browser:
                await browser.follow((await _look(browser)).scripts, _FOLLOWING)
            await self._stays(site, "caddy", steady, began, seconds, _OVER_LOOK)
        except Unsteady as error:
            await tell(error.why)
        except GatewayError as error:
            log.info("cannot watch the site of %s: %s", site.tenant, error.message)

    async def _stays(
        self,
        site: Subject,
        way: Way,
        steady: Steadiness,
        answered: float,
        seconds: float,
        pause: float,
    ) -> bool:
        soonest, why = max(answered + seconds, time.monotonic() + min(_AFTER, seconds)), ""
        until, latest = soonest, soonest + _WORKING * seconds
        while not why and (steady.doubtful or time.monotonic() < until):
            left = until - time.monotonic()
            await asyncio.sleep(min(pause, left) if left > 0 else _AGAIN)
            why = await steady.failure()
            if steady.busy:  # such as `tsc --watch`, which has the server restarted once it has compiled
                until = max(until, min(latest, time.monotonic() + pause))
        # its service may be running without the process that answered
        if not why and (silent := await self._asked(site, way, _LAST)):
            why = f"it no longer answers ({silent})"
        if why:
            raise await self._unsteady(site, why, answered)
        return until > soonest

    async def _unsteady(self, site: Subject, why: str, since: float) -> Unsteady:
        said = await self._services.log(site.tenant, site.side)
        if KILLED.search(said) is not None:
            short = await self._short(site, since)
            why += f"; the kernel killed it because memory ran out: {SMALL}" if short else f"; {SIGKILL}"
        return Unsteady(why, said)

    async def _short(self, site: Subject, since: float) -> bool:
        return self._pressure is not None and await self._pressure.has_killed(site.tenant, since)

    def _browser(self, site: Subject, way: Way) -> Browser:
        if way == "caddy":
            return Browser("127.0.0.1", self._settings.caddy_ask, site.domain)
        return Browser(site.exposure.address, site.exposure.port, site.domain)

    async def _asked(self, site: Subject, way: Way, seconds: float) -> str:
        """Ask until there is an answer; return why there was none in that time."""
        health, where = site.recipe.health, site.exposure
        last, deadline = "nothing", time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if way == "caddy":
                    status = await self._caddy.ask(site.domain, health, _ANSWER)
                else:
                    status = await ask(where.address, where.port, health, host=site.domain)
                if status < 400:
                    return ""
                last = f"status {status}"
            except (OSError, ValueError):
                last = "no answer"
            except CaddyFailed as error:
                silent = isinstance(error.__cause__, NoAnswer)
                last = f"no answer in {_ANSWER:g} s" if silent else error.message
                await self._caddy.ensure()
            await asyncio.sleep(0.05)  # there is no event to wait for but the answer itself
        return last

    async def _said(self, site: Subject) -> str:
        return last_words(await self._services.log(site.tenant, site.side))


async def _look(browser: Browser) -> Page:
    """Load the front page; if it does not answer, nothing is loaded."""
    try:
        return await browser.look("/", _PART)
    except (OSError, ValueError):
        return Page(0)
