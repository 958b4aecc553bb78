"""See whether a site that was just started works and goes on working.

`answering` waits for its first answer, and tells at once of a service that listens where nobody reaches it.
`settled` looks at the page as a browser does, and sees the site stay for a while. `seen` asks through Caddy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from gateway.caddy import Caddy, CaddyFailed
from gateway.deployments.causes import ended, last_words
from gateway.deployments.listeners import Misplaced
from gateway.deployments.page import Browser, Page
from gateway.errors import ExecFailed, GatewayError, Timeout
from gateway.runtime.probe import HostRefused, Silent, answer, ask
from gateway.runtime.sites import Exposure, Recipe, Service, Side, Sites
from gateway.settings import Settings

log = logging.getLogger(__name__)

_LOOK: Final = 0.75  # seconds between two looks at a service that does not answer yet
_COPIED: Final = 5.0  # seconds until the first of these, where it is a copy of what answered
_RESTARTS: Final = 4  # of a service by itself, within seconds: it will not come up
_ANSWER: Final = 10.0  # seconds of one answer through Caddy
_PART: Final = 15.0  # seconds of an answer that a page needs: a dev server may have to make it first
_AGAIN: Final = 0.25  # seconds until a page that is not whole is looked at again
_MISSING: Final = 3.0  # seconds after which what a page names and the site does not have will not come
_FOLLOWING: Final = 15.0  # seconds of asking for what scripts import
_AFTER: Final = 1.0  # seconds that a site must stay after a page's look, which makes it work hardest
_STEADY_LOOK: Final = 1.0  # seconds between two looks at a service that answers
_OVER_LOOK: Final = 3.0  # where nobody waits for it: each tells all that happened, and costs a command
_REFUSED: Final = 3  # such looks, one after another, at which nothing listened: more than a reload takes
_LAST: Final = 2.0  # seconds of a last answer, which may be just being prevented by a reload
_WATCHED: Final = 64  # sites that are watched after their deployment; one more is not
_KILLED: Final = "status=9/KILL"  # as systemd puts it
_SMALL: Final = "give it a larger `size`, or have it need less"
_LISTEN: Final = "it must listen on 0.0.0.0 and $PORT"


Way = Literal["caddy", "direct"]
"""As the world reaches a site, or at its own address, where the world is not led yet."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The side of a tenant's site that is looked at, and what it is to be."""

    tenant: str
    side: Side
    domain: str
    recipe: Recipe
    exposure: Exposure
    usual: frozenset[int] = frozenset()
    """Ports on which its framework serves where nobody says otherwise."""
    advice: str = ""
    """How it is told to listen where it must."""
    memory: int = 0
    """Bytes that its tenant has; 0 if nobody knows."""


class Unsteady(ExecFailed):
    """A site that answered did not stay up; `why` is the short of it."""

    def __init__(self, why: str, said: str) -> None:
        if _KILLED in said:
            why += f"; it was killed, as the kernel does for want of memory: {_SMALL}"
        self.why = why
        super().__init__(
            f"the site answered, and then did not stay up: {why}. {last_words(said)}",
            reason="unsteady",
        )


def host_refused(domain: str, error: HostRefused) -> ExecFailed:
    """Return the error of a site that answers, but not under its domain."""
    return ExecFailed(
        f"the site refuses visitors of {domain} (status {error.status}): {error.said}. Allow {domain} in its "
        "configuration, as by `server.allowedHosts` of Vite",
        reason="host_refused",
    )


class Verifier:
    """Looks at sites, and changes nothing in them. Close it at the end."""

    def __init__(self, sites: Sites, caddy: Caddy, settings: Settings) -> None:
        self._sites, self._caddy, self._settings = sites, caddy, settings
        self._watching: dict[str, asyncio.Task[None]] = {}

    async def aclose(self) -> None:
        """Watch nothing any more."""
        tasks = list(self._watching.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def answering(self, site: Subject, *, copied: bool = False) -> float:
        """Wait until a side answers at its own address; return when it did, by `time.monotonic()`.

        One that is `copied` from what answered is left alone for longer: a look would only hold it up.
        Raises `Timeout` (`never_healthy`) and `ExecFailed` (`wrong_address`, `host_refused`).
        """
        health, where = site.recipe.health, site.exposure
        limit = self._settings.verify_timeout

        async def first() -> float:
            await answer(where.address, where.port, health, limit, host=site.domain)
            return time.monotonic()

        answering = asyncio.create_task(first())
        misplaced, service = Misplaced(where.port, (where.address,), site.usual), None
        pause = _COPIED if copied else _LOOK
        try:
            while not (await asyncio.wait({answering}, timeout=pause))[0]:
                pause = _LOOK
                service = await self._sites.service(site.tenant, site.side)
                if service is None or answering.done():
                    continue
                if (wrong := misplaced.look(service, time.monotonic())) is not None:
                    raise ExecFailed(
                        f"it listens on {wrong}; it must listen on 0.0.0.0:$PORT, "
                        f"where PORT is {where.port}{site.advice and ': '}{site.advice}. "
                        f"{await self._said(site)}",
                        reason="wrong_address",
                    )
                if service.restarts >= _RESTARTS:
                    said = await self._sites.log(site.tenant, site.side)
                    why = ended(said, site.recipe.start, site.memory)
                    break
            else:
                with contextlib.suppress(TimeoutError, HostRefused):
                    return await answering
                if answering.done() and isinstance(refused := answering.exception(), HostRefused):
                    raise host_refused(site.domain, refused) from None
                if service is not None and misplaced.reached(service):
                    why = (
                        f"the site listens where it must, but does not answer {health} within {limit:g} s "
                        "(GATEWAY_VERIFY_TIMEOUT)"
                    )
                else:
                    found = misplaced.suspects(service) if service is not None else ()
                    there = f"; it listens on {', '.join(map(str, found[:5]))}" if found else ""
                    why = f"the site did not answer {health} on port {where.port}{there}; {_LISTEN}"
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        raise Timeout(f"{why}. {await self._said(site)}", reason="never_healthy")

    async def seen(self, site: Subject) -> None:
        """Wait until it answers through Caddy under its domain. Raises `Timeout`, `never_healthy`."""
        why = await self._asked(site, "caddy", self._settings.verify_timeout)
        if why:
            raise Timeout(f"{site.domain} does not answer through Caddy: {why}", reason="never_healthy")

    async def settled(
        self, site: Subject, way: Way, answered: float, seconds: float, *, follow: bool = True
    ) -> None:
        """See that the site's page is whole, and that it stays for `seconds` from when it `answered`.

        With `follow` it is asked for what its scripts import, too, so that a dev server has made it.
        Raises `Timeout` (`never_healthy`) where its page is not whole, and `Unsteady`.
        """
        before = asyncio.create_task(self._before(site, seconds))
        try:
            await self._while_up(site, answered, self._whole(site, way, follow=follow))
            if seconds > 0:
                await self._stays(site, way, await before, answered, seconds, _STEADY_LOOK)
        finally:
            before.cancel()
            await asyncio.gather(before, return_exceptions=True)

    async def _before(self, site: Subject, seconds: float) -> Service | None:
        return await self._sites.service(site.tenant, site.side) if seconds > 0 else None

    async def _while_up(self, site: Subject, answered: float, work: Coroutine[Any, Any, None]) -> None:
        """Do some work on a site that waits for it, as long as it is up. Raises `Unsteady`, too."""
        task, refused = asyncio.create_task(work), 0
        try:
            while not (await asyncio.wait({task}, timeout=_STEADY_LOOK))[0]:
                why = unsteady(None, await self._sites.service(site.tenant, site.side), answered)
                refused = refused + 1 if await self._refuses(site) else 0
                if not why and refused >= _REFUSED:
                    why = "nothing listens there any more"
                if why and not task.done():
                    raise await self._unsteady(site, why)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _refuses(self, site: Subject) -> bool:
        try:
            await ask(site.exposure.address, site.exposure.port, site.recipe.health, host=site.domain)
        except OSError as error:
            return not isinstance(error, TimeoutError)  # it may just work hard
        except ValueError:
            pass
        return False

    async def _whole(self, site: Subject, way: Way, *, follow: bool) -> None:
        """Have a site's page be whole, as a browser needs it. Raises `Timeout`, `never_healthy`."""
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
                        f"the page names {name[:200]}{more}, which does not come: {why}; "
                        f"add it, or take it out of the page. {await self._said(site)}",
                        reason="never_healthy",
                    )
                await asyncio.sleep(_AGAIN)
            if follow:
                await browser.follow(page.scripts, _FOLLOWING)

    def watch(self, site: Subject, seconds: float, tell: Callable[[str], Awaitable[None]]) -> None:
        """Go on looking at a site whose deployment is over, in the background; `tell` why it did not stay."""
        self.forget(site.tenant)
        if len(self._watching) >= _WATCHED or seconds <= 0:
            return
        task = asyncio.create_task(self._watch(site, seconds, tell), name=f"watch {site.tenant}")
        self._watching[site.tenant] = task
        task.add_done_callback(partial(self._watched, site.tenant))

    def forget(self, tenant: str) -> None:
        """Watch a tenant's site no more: it ends, or another one takes its place."""
        if (task := self._watching.pop(tenant, None)) is not None:
            task.cancel()

    def _watched(self, tenant: str, task: asyncio.Task[None]) -> None:
        if self._watching.get(tenant) is task:
            del self._watching[tenant]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the site of %s could not be watched", tenant, exc_info=error)

    async def _watch(self, site: Subject, seconds: float, tell: Callable[[str], Awaitable[None]]) -> None:
        began = time.monotonic()
        try:
            before = await self._sites.service(site.tenant, site.side)
            async with self._browser(site, "caddy") as browser:
                await browser.follow((await _look(browser)).scripts, _FOLLOWING)
            await self._stays(site, "caddy", before, began, seconds, _OVER_LOOK)
        except Unsteady as error:
            await tell(error.why)
        except GatewayError as error:
            log.info("the site of %s could not be watched: %s", site.tenant, error.message)

    async def _stays(
        self,
        site: Subject,
        way: Way,
        before: Service | None,
        answered: float,
        seconds: float,
        pause: float,
    ) -> None:
        until = max(answered + seconds, time.monotonic() + min(_AFTER, seconds))
        why, ended = "", False
        while not why and (ended or time.monotonic() < until):
            left = until - time.monotonic()
            await asyncio.sleep(min(pause, left) if left > 0 else _AGAIN)
            service = await self._sites.service(site.tenant, site.side)
            why = unsteady(before, service, answered)
            # once, and somebody may just be starting it again
            had, ended = ended, service is not None and service.state == "ended"
            why = why or ("its service ended" if had and ended else "")
        # its service may live on without what answered
        if not why and (silent := await self._asked(site, way, _LAST)):
            why = f"it no longer answers ({silent})"
        if why:
            raise await self._unsteady(site, why)

    async def _unsteady(self, site: Subject, why: str) -> Unsteady:
        return Unsteady(why, await self._sites.log(site.tenant, site.side))

    def _browser(self, site: Subject, way: Way) -> Browser:
        if way == "caddy":
            return Browser("127.0.0.1", self._settings.caddy_ask, site.domain)
        return Browser(site.exposure.address, site.exposure.port, site.domain)

    async def _asked(self, site: Subject, way: Way, seconds: float) -> str:
        """Ask until there is an answer; return why there was none for so long."""
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
                silent = isinstance(error.__cause__, Silent)
                last = f"no answer in {_ANSWER:g} s" if silent else error.message
                await self._caddy.ensure()
            await asyncio.sleep(0.05)  # nothing to wait on but the answer itself
        return last

    async def _said(self, site: Subject) -> str:
        return last_words(await self._sites.log(site.tenant, site.side))


def unsteady(before: Service | None, now: Service | None, answered: float) -> str:
    """Return what happened to a service since it answered that must not; empty for nothing.

    Who starts it again on purpose has its count begin anew.
    """
    if now is None:
        return ""
    if now.restarts and now.started > answered:
        times = "" if now.restarts == 1 else f", {now.restarts} times in all"
        return f"its service ended and was started again{times}"
    if before is not None and before.started == now.started and now.oom_kills > before.oom_kills:
        return f"for want of memory the kernel ended a process of it: {_SMALL}"
    return ""


async def _look(browser: Browser) -> Page:
    """Look at the front page; where that does not answer there is nothing to look at."""
    try:
        return await browser.look("/", _PART)
    except (OSError, ValueError):
        return Page(0)
