"""Verify that a site that was just started works, and keeps working.

`answering` waits for its first answer, and tells if the service listens in the wrong place. `settled`
loads the page as a browser does, and watches the site for a while. `seen` asks through Caddy.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from gateway.caddy import Caddy, CaddyFailed
from gateway.deployments.browser import Browser, LoadedPage
from gateway.errors import ExecFailed, GatewayError, Timeout
from gateway.limits.pressure import Pressure, larger
from gateway.rootfs.paths import show
from gateway.runtime.listening import ANYWHERE, ListeningSocket
from gateway.runtime.probe import HostRefused, NoAnswer, answer, ask
from gateway.runtime.sites import Exposure, Life, Recipe, Service, Side, SiteServices
from gateway.runtime.sizes import SIZES, size_of
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
class SiteUnderTest:
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
            f"the site answered but did not stay up: {why}. {last_output(said, finished=True)}",
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
        self, site: SiteUnderTest, say: Callable[[str], None] | None = None, *, copied: bool = False
    ) -> float:
        """Wait until a side answers at its own address; return when it did, by `time.monotonic()`.

        A site that listens elsewhere first has the whole time, since that may be a helper; `say` reports it
        at once. The next side fails at once: it cannot run while the live one does.
        A `copied` site is left alone for longer at first, since checks would only slow it down.
        Raises `Timeout` (`never_healthy`) and `ExecFailed` (`wrong_address`, `host_refused`).
        """
        health, where = site.recipe.health, site.exposure
        limit, began = self._settings.verify_timeout, time.monotonic()

        async def first() -> float:
            await answer(where.address, where.port, health, limit, host=site.domain)
            return time.monotonic()

        answering = asyncio.create_task(first())
        misplaced, service = WrongAddress(where.port, (where.address,), site.usual), None
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
                    why = why_it_ends(said, site.recipe.start, site.memory, short=short)
                    raise Timeout(f"{why}. {last_output(said, finished=True)}", reason="never_healthy")
            if answering.done() and not answering.exception():
                return await answering
            if answering.done() and isinstance(refused := answering.exception(), HostRefused):
                raise host_refused(site.domain, refused) from None
            if wrong is not None:
                raise ExecFailed(
                    f"it listens on {wrong}; it must listen on 0.0.0.0:$PORT, "
                    f"where PORT is {where.port}{site.advice and ': '}{site.advice}. "
                    f"{await self._last_output(site)}",
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
        raise Timeout(f"{why}. {await self._last_output(site)}", reason="never_healthy")

    async def _kept_out(self, site: SiteUnderTest, began: float, wrong: ListeningSocket | None) -> bool:
        """Return whether the live side keeps the next one from answering, which may run on (`tsx watch`)."""
        if wrong is not None or time.monotonic() - began < _KEPT_OUT:
            return wrong is not None
        return in_the_way(await self._last_output(site))

    async def seen(self, site: SiteUnderTest) -> None:
        """Wait until it answers through Caddy under its domain. Raises `Timeout`, `never_healthy`."""
        why = await self._last_answer(site, "caddy", self._settings.verify_timeout)
        if why:
            raise Timeout(f"{site.domain} does not answer through Caddy: {why}", reason="never_healthy")

    async def settled(
        self, site: SiteUnderTest, way: Way, answered: float, seconds: float, *, follow: bool = True
    ) -> bool:
        """Verify that the site's page is complete, and that it stays up for `seconds` after it `answered`.

        With `follow`, request what its scripts import too, so that a dev server has built it. Returns whether
        the site was still at work by then, and was watched on until it rested.
        Raises `Timeout` (`never_healthy`) if its page is incomplete, and `Unsteady`.
        """
        steady = UptimeCheck(self._services, site.tenant, site.side, answered)
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

    async def _while_up(
        self, site: SiteUnderTest, steady: UptimeCheck, work: Coroutine[Any, Any, None]
    ) -> None:
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

    async def _refuses(self, site: SiteUnderTest) -> bool:
        try:
            await ask(site.exposure.address, site.exposure.port, site.recipe.health, host=site.domain)
        except OSError as error:
            return not isinstance(error, TimeoutError)  # it may just be busy
        except ValueError:
            pass
        return False

    async def _whole(self, site: SiteUnderTest, way: Way, *, follow: bool) -> None:
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
                        f"add it, or take it out of the page. {await self._last_output(site)}",
                        reason="never_healthy",
                    )
                await asyncio.sleep(_AGAIN)
            if follow:
                await browser.follow(page.scripts, _FOLLOWING)

    def watch(self, site: SiteUnderTest, seconds: float, tell: Callable[[str], Awaitable[None]]) -> None:
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

    async def _watch(
        self, site: SiteUnderTest, seconds: float, tell: Callable[[str], Awaitable[None]]
    ) -> None:
        began = time.monotonic()
        steady = UptimeCheck(self._services, site.tenant, site.side, began)
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
        site: SiteUnderTest,
        way: Way,
        steady: UptimeCheck,
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
        if not why and (silent := await self._last_answer(site, way, _LAST)):
            why = f"it no longer answers ({silent})"
        if why:
            raise await self._unsteady(site, why, answered)
        return until > soonest

    async def _unsteady(self, site: SiteUnderTest, why: str, since: float) -> Unsteady:
        said = await self._services.log(site.tenant, site.side)
        if KILLED.search(said) is not None:
            short = await self._short(site, since)
            why += f"; the kernel killed it because memory ran out: {SMALL}" if short else f"; {SIGKILL}"
        return Unsteady(why, said)

    async def _short(self, site: SiteUnderTest, since: float) -> bool:
        return self._pressure is not None and await self._pressure.has_killed(site.tenant, since)

    def _browser(self, site: SiteUnderTest, way: Way) -> Browser:
        if way == "caddy":
            return Browser("127.0.0.1", self._settings.caddy_ask, site.domain)
        return Browser(site.exposure.address, site.exposure.port, site.domain)

    async def _last_answer(self, site: SiteUnderTest, way: Way, seconds: float) -> str:
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

    async def _last_output(self, site: SiteUnderTest) -> str:
        return last_output(await self._services.log(site.tenant, site.side))


async def _look(browser: Browser) -> LoadedPage:
    """Load the front page; if it does not answer, nothing is loaded."""
    try:
        return await browser.look("/", _PART)
    except (OSError, ValueError):
        return LoadedPage(0)


SMALL: Final = "give it a larger `size`, or reduce what it needs"
_BUSY: Final = 0.3  # share of time above which a service is still at work, as a compiler beside its server
_SPAN: Final = 0.5  # seconds over which that share is taken at least
_OOM_KILLED: Final = f"the kernel killed one of its processes because memory ran out: {SMALL}"


class UptimeCheck:
    """The checks of one side of a tenant's site since it `answered`, by `time.monotonic()`.

    The service is queried inside the container only if the host does not see the same life of it as before.
    """

    def __init__(self, services: SiteServices, tenant: str, side: Side, answered: float) -> None:
        self._services, self._of, self._answered = services, (tenant, side), answered
        self._life: Life | None = None
        self._before: Service | None = None
        self._ended = False
        self._worked: tuple[float, float] | None = None  # seconds, and when
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether the service was at work between the last two checks: it may be about to restart itself."""
        return self._busy

    @property
    def doubtful(self) -> bool:
        """Whether the last check found the service ended, which the next one must confirm."""
        return self._ended

    async def begin(self) -> None:
        """Note the state that is to last."""
        found = await self._services.life(*self._of)
        if found is not None and found.started <= self._answered:
            self._life = found
            self._measure(found.worked)
        else:
            self._before = await self._services.state(*self._of)

    async def failure(self) -> str:
        """Return what went wrong with the service; empty if nothing did."""
        now = await self._services.life(*self._of)
        if self._life is not None and now is not None and now.first == self._life.first:
            self._ended = False
            self._measure(now.worked)
            return _OOM_KILLED if now.oom_kills > self._life.oom_kills else ""
        service = await self._services.state(*self._of)
        why = why_unsteady(self._before, service, self._answered)
        # once only, and it may just be restarting on purpose
        had, self._ended = self._ended, service is not None and service.state == "ended"
        return why or ("its service ended" if had and self._ended else "")

    def _measure(self, worked: float) -> None:
        now = time.monotonic()
        if self._worked is not None:
            before, at = self._worked
            if now - at < _SPAN:
                return
            self._busy = worked - before > _BUSY * (now - at)
        self._worked = worked, now


def why_unsteady(before: Service | None, now: Service | None, answered: float) -> str:
    """Return what went wrong with a service since it answered; empty if nothing did.

    A restart on purpose resets systemd's count.
    """
    if now is None:
        return ""
    if now.restarts and now.started > answered:
        times = "" if now.restarts == 1 else f", {now.restarts} times in total"
        return f"its service ended and was restarted{times}"
    if before is not None and before.started == now.started and now.oom_kills > before.oom_kills:
        return _OOM_KILLED
    return ""


_GRACE: Final = 3.0  # seconds in which it may still begin to listen on the right port too
# Not for visitors: debuggers (Node, Bun, JVM), Vite's live reload, databases
_OWN: Final = frozenset(
    {9229, 9230, 6499, 5005, 24678, 1433, 3306, 5432, 5672, 6379, 9200, 11211, 27017, 2019, 53, 22}
)
_CHOSEN: Final = 32_768  # ephemeral ports, which programs use among themselves


class WrongAddress:
    """Watches one service that does not answer yet.

    `usual` are the ports of its framework. What it finds may be a helper that starts before the site itself.
    """

    def __init__(self, port: int, addresses: Collection[str], usual: Collection[int] = ()) -> None:
        self._port, self._usual = port, frozenset(usual)
        self._right = ANYWHERE | frozenset(addresses)
        self._since: dict[ListeningSocket, float] = {}

    def look(self, service: Service, now: float) -> ListeningSocket | None:
        """Take what was found at `now`, a monotonic time; return where it has listened wrongly."""
        self._since = {one: self._since.get(one, now) for one in service.listens}
        if self.reached(service):
            return None
        return next((one for one in self.suspects(service) if now - self._since[one] >= _GRACE), None)

    def reached(self, service: Service) -> bool:
        """Return whether it listens where it must."""
        return any(one.port == self._port and one.address in self._right for one in service.listens)

    def suspects(self, service: Service) -> list[ListeningSocket]:
        """Return where it listens and might serve the site, most likely first."""
        sure = {self._port, *self._usual}
        found = [
            one
            for one in service.listens
            if one.port in sure or (one.port not in _OWN and one.port < _CHOSEN)
        ]
        return sorted(found, key=lambda one: (one.port != self._port, one.port not in self._usual, one))


_IN_THE_WAY: Final = re.compile(
    r"(?i)eaddrinuse|addrinuse|in use|already|another|\block|\bbusy\b|only one|single instance"
)
LAST_OUTPUT: Final = "Its last output: "
# as systemd words it, of a site's process, or of a shell that started it
KILLED: Final = re.compile(r"status=(?:9/KILL|137/)")
SIGKILL: Final = "it was killed (SIGKILL), and the kernel reports no lack of memory"
_SAID: Final = 1000  # characters of a site's last output
_SHOWN: Final = 200  # characters of a command
# a lockfile, the command that updates it, and the command that installs without it, if there is one
_LOCKFILES: Final = {
    "bun": ("bun.lock", "bun install", "bun install"),
    "npm": ("package-lock.json", "npm install", "npm install"),
    "pnpm": ("pnpm-lock.yaml", "pnpm install", "pnpm install"),
    "yarn": ("yarn.lock", "yarn install", "yarn install"),
    "uv": ("uv.lock", "uv lock", "uv sync"),
    "poetry": ("poetry.lock", "poetry lock", ""),
}
# systemd's own messages between the program's
_SYSTEMD: Final = re.compile(r"(?:site(?:-next)?\.service: |(?:Started|Starting|Stopped|Stopping) site)")
# a call inside a package or inside Node, of which an error's stack may have more than is kept
_INNER: Final = re.compile(r"\s+at .*(?:/node_modules/|\(?node:)")
_BEGUN: Final = re.compile(r"^Started site.*$", re.MULTILINE)
_EXITED: Final = re.compile(
    r"Main process exited, code=\w+, status=(\d+)/(\w+)|site\S*\.service: (Deactivated successfully)"
)
_NO_PROGRAM: Final = re.compile(
    r"^(?:/usr/bin/)?env: \W{0,3}([\w./@+-]{1,60})\W{0,3}: No such file", re.MULTILINE
)
_IMAGE: Final = (
    "the gateway's operator can add it with `incus-gateway image build`, or give other commands with "
    "`start` and `install`"
)


def command_text(command: Sequence[str]) -> str:
    """Return a command for people, without the programs of ours that stand before it (`Manifest.command`)."""
    words = list(command)
    own = next((at for at, word in enumerate(words) if "\n" in word), None)
    if own is not None and words[own + 1 : own + 2] == ["--"]:  # it starts what follows
        words = words[own + 2 :]
    elif own is not None:
        del words[own - 1 : own + 1]
    return show(" ".join(words)[:_SHOWN])


def more_memory(memory: int) -> str:
    """Return advice: the next size with more than this many bytes of memory, and how to get it."""
    size = larger(memory)
    if size is None:
        return "there is no larger size: reduce what it needs"
    has = size_of(SIZES[size]["memory"]) >> 20
    return (
        f"the size {size} has {has} MiB: deploy with --size {size}, or resize an existing tenant with "
        f"`incus-gateway resize TENANT {size}`"
    )


def install_failed(error: ExecFailed, install: Sequence[str], memory: int) -> ExecFailed:
    """Return the error of an install command, with the reason and the next step if they are known.

    `memory` is the tenant's, in bytes; 0 if unknown.
    """
    command = show(" ".join(install)[:_SHOWN])
    if error.facts.get("reason") == "not_found":
        program = show(install[0][:_SHOWN])
        return ExecFailed(
            f"the tenant's image has no {program}, which `{command}` needs: {_IMAGE}", **error.facts
        )
    match error.facts.get("cause"):
        case "lockfile":
            lockfile, update, without = _LOCKFILES[error.facts["of"]]
            why = f"{lockfile} does not match what the folder requires: run `{update}` there and deploy again"
            if without:
                why += f", or install without it by --install '{without}'"
        case "memory":
            has = f"{memory >> 20} MiB" if memory else "its share of the machine's"
            why = f"`{command}` needs more memory than the tenant has ({has}): {more_memory(memory)}"
        case "killed":
            why = f"`{command}` was killed (SIGKILL), and the kernel reports no lack of memory"
        case "registry":
            why = f"{error.facts['of']} could not be reached; try again when it answers"
        case "program":
            program = show(error.facts["of"])
            why = f"the tenant's image has no {program}, which `{command}` needs: {_IMAGE}"
        case _:
            return error
    return ExecFailed(f"{why}. {error.message}", **error.facts)


def why_it_ends(said: str, command: Sequence[str], memory: int, *, short: bool) -> str:
    """Explain why a site keeps ending, from the journal of its unit.

    `short` is whether one of its processes was killed because its `memory` ran out.
    """
    line = command_text(command)
    if (missing := _NO_PROGRAM.search(said)) is not None:
        return f"the tenant's image has no {missing[1]}, which `{line}` needs: {_IMAGE}"
    status, kind, clean = (_EXITED.findall(said) or [("", "", "")])[-1]
    if clean:
        how = "it ends by itself, without an error; a site's command must keep running"
    elif KILLED.search(f"status={status}/{kind}"):
        how = f"the kernel kills it because memory runs out: {more_memory(memory)}" if short else SIGKILL
    else:
        how = f"it ends with code {status}" if status else "it ends"
    return f"the site keeps ending: {how}"


def in_the_way(said: str) -> bool:
    """Return whether a program says that it cannot run twice: that a port or a lock is taken.

    Where this is too generous, visitors wait for a broken update; where too strict, a good one fails.
    """
    return _IN_THE_WAY.search(said) is not None


def last_output(said: str, *, finished: bool = False) -> str:
    """Return the last output of a site's program: of its last run, if there is any.

    If it has `finished` and is being restarted, that is the last run that ended.
    """
    runs = _BEGUN.split(said)
    over = [run for run in runs if _EXITED.search(run) is not None] if finished else []
    words = next((own for run in (*reversed(over), *reversed(runs)) if (own := _own_lines(run))), "")
    return f"{LAST_OUTPUT}{words[-_SAID:] or 'nothing'}"


def _own_lines(said: str) -> str:
    lines = (line for line in said.splitlines() if line.strip())
    return "\n".join(line for line in lines if not (_SYSTEMD.match(line) or _INNER.match(line))).strip()
