"""What is changed without a turn: what people save, and what commands change that no tool runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway.execs.exec import Exec
from gateway.history import recorder
from gateway.history.recorder import COARSE, OpenTurn, OpenTurns, Recorder, without
from gateway.history.repository import TITLE_MAX, clean_text, name
from gateway.runtime import ExecSpec

_SAVED: Final = 2.0  # seconds after a person's last save in which it is recorded
_LOOK: Final = 5.0  # seconds between looks at what commands print; after as many without a word they rest
PATIENCE: Final = 10.0  # seconds for which a call waits at most; what changes later is mixed up
_LABELS: Final = 16  # commands of one record whose names are kept
_COMMAND: Final = 80  # characters of a command in a title


@dataclass(eq=False, slots=True)
class _OutsideChange:
    """Changes to record as one commit: of the paths of `turn` or, if that is wide, of any path."""

    turn: OpenTurn
    since: float = 0.0  # of the loop's clock
    verbs: set[str] = field(default_factory=set)
    labels: dict[str, str] = field(default_factory=dict)  # of commands, each with whose it is


@dataclass(eq=False, slots=True)
class _WorkspaceChanges:
    """The changes under way in one workspace outside of turns."""

    saves: dict[str, _OutsideChange] = field(default_factory=dict)  # by subject
    commands: _OutsideChange | None = None
    printed: dict[str, int] = field(default_factory=dict)  # bytes, by command, at the last look
    ran: dict[str, tuple[Exec, str]] = field(default_factory=dict)  # commands, each with whose it is
    looked: float = 0.0  # seconds since the epoch of the last look
    saving: asyncio.TimerHandle | None = None
    looking: asyncio.TimerHandle | None = None
    under_way: dict[asyncio.Task[None], OpenTurn] = field(default_factory=dict)


class OutsideChanges:
    """Changes of all tenants outside of turns, each recorded once it rests. Used from the event loop only.

    Only the commands of clients count: a tool's command belongs to its turn, and changes by helpers such as
    language servers stay unattributed. A command may change anything at any time. So the workspace is
    examined once commands have printed nothing for some seconds and, if they go on printing, every
    `TURN_REST` seconds. A change made while one of them ran, or printed something, is ascribed to it. Other
    changes stay unattributed, and those of a deployment are the deployment's.
    """

    def __init__(self, execs: Callable[[str], Sequence[Exec]], open_: OpenTurns, recorder: Recorder) -> None:
        self._execs = execs
        self._open = open_
        self._recorder = recorder
        self._of: dict[str, _WorkspaceChanges] = {}

    def close(self) -> None:
        for tenant in list(self._of):
            self.forget(tenant)

    def forget(self, tenant: str) -> None:
        """Forget a tenant that is gone."""
        if (place := self._of.pop(tenant, None)) is not None:
            for timer in (place.saving, place.looking):
                if timer is not None:
                    timer.cancel()

    # --- what is noted ----------------------------------------------------------------------------------

    def saved(self, tenant: str, path: str, by: str, verb: str = "Saved") -> None:
        """Note a file that somebody saved, so that it is on record before a turn changes it."""
        place = self._of.setdefault(tenant, _WorkspaceChanges())
        save = place.saves.setdefault(by, _OutsideChange(OpenTurn(by, name(by), name(by))))
        save.turn.wrote(path)
        save.verbs.add(verb)
        self._open.wait(tenant, save.turn)
        if place.saving is not None:
            place.saving.cancel()
        place.saving = asyncio.get_running_loop().call_later(_SAVED, self._record_saves, tenant, place)

    def ran(self, tenant: str, exec_id: str, by: str) -> None:
        """Note that a command has started."""
        exec_ = next((one for one in self._execs(tenant) if one.id == exec_id), None)
        if exec_ is None or exec_.spec.work != "client":  # a tool's, which its turn records, or a helper's
            return
        place = self._of.setdefault(tenant, _WorkspaceChanges())
        place.ran[exec_id] = (exec_, by)
        self._look_later(tenant, place)

    def _worked(self, place: _WorkspaceChanges, exec_: Exec, by: str, since: float, until: float) -> None:
        """Note that somebody's command may have changed something in a span of time."""
        if (change := place.commands) is None:
            change = _OutsideChange(OpenTurn(place, "", "", wide=True), asyncio.get_running_loop().time())
            place.commands = change
        change.turn.worked(max(since, exec_.process.started_at) - COARSE, until)
        if len(change.labels) < _LABELS:
            change.labels[_words(exec_.spec)] = by

    # --- when it is recorded ----------------------------------------------------------------------------

    def _look_later(self, tenant: str, place: _WorkspaceChanges) -> None:
        if place.looking is None:
            place.looking = asyncio.get_running_loop().call_later(_LOOK, self._look, tenant, place)

    def _look(self, tenant: str, place: _WorkspaceChanges) -> None:
        """See what commands have done since the last look; record it once they rest."""
        place.looking = None
        busy = self._notice(tenant, place)
        if (change := place.commands) is not None:
            long = asyncio.get_running_loop().time() - change.since >= recorder.TURN_REST
            if long or not busy:
                self._record_commands(tenant, place)
        if place.ran or place.commands is not None:
            self._look_later(tenant, place)
        else:
            self._tidy(tenant, place)

    def _notice(self, tenant: str, place: _WorkspaceChanges) -> bool:
        """Note which commands have printed anything, or ended, since the last look; say whether one has."""
        last, place.looked = place.looked, time.time()
        busy = False
        for one, (exec_, by) in list(place.ran.items()):
            so_far, running = exec_.streams.printed, exec_.state == "running"
            if running and so_far == place.printed.get(one):
                continue
            busy = True
            until = place.looked
            if not running:
                del place.ran[one]
                place.printed.pop(one, None)
                if exec_.ended.done():
                    until = min(until, exec_.process.started_at + exec_.over.duration_ms / 1000 + COARSE)
            else:
                place.printed[one] = so_far
            self._worked(place, exec_, by, last if exec_.spec.pty else 0.0, until)
        return busy

    def record(self, tenant: str) -> list[asyncio.Task[None]]:
        """Record what has changed until now; return the records under way, earlier ones included."""
        if (place := self._of.get(tenant)) is None:
            return []
        self._notice(tenant, place)
        self._record_saves(tenant, place)
        self._record_commands(tenant, place)
        return list(place.under_way)

    def record_all(self) -> list[asyncio.Task[None]]:
        return [task for tenant in list(self._of) for task in self.record(tenant)]

    def others(self, tenant: str, path: str, by: str) -> Sequence[asyncio.Task[None]]:
        """Record what others than `by` have saved at a path, and return these records."""
        if (place := self._of.get(tenant)) is None:
            return ()
        if any(who != by and save.turn.touches(path) for who, save in place.saves.items()):
            self._record_saves(tenant, place)
        return [task for task, turn in place.under_way.items() if turn.key != by and turn.touches(path)]

    async def before(self, tenant: str, path: str | None, *, first: bool) -> None:
        """Record what is outside of a turn that is about to change `path`; None is any.

        A call that changes a file waits only for a save of that file, at most for a moment. One that may
        change any file waits for all that was saved or ran in the last seconds.
        """
        if (place := self._of.get(tenant)) is None:
            return
        if first:
            self.record(tenant)  # begins before the call, and leaves out the file that it changes
        elif any(path is None or save.turn.touches(path) for save in place.saves.values()):
            self._record_saves(tenant, place)
        waited = [task for task, turn in place.under_way.items() if path is None or turn.touches(path)]
        if waited:
            await asyncio.wait(waited, timeout=PATIENCE)

    def _record_saves(self, tenant: str, place: _WorkspaceChanges) -> None:
        """Record what people have saved."""
        if place.saving is not None:
            place.saving.cancel()
            place.saving = None
        saves, place.saves = place.saves, {}
        for save in saves.values():
            paths = sorted(save.turn.paths)
            what = paths[0] if len(paths) == 1 else f"{len(paths)} files"
            verb = next(iter(save.verbs)) if len(save.verbs) == 1 else "Changed"
            self._record(tenant, place, save.turn, f"{verb} {what}")
        self._tidy(tenant, place)

    def _record_commands(self, tenant: str, place: _WorkspaceChanges) -> None:
        """Record what commands have changed; while a turn runs a command too, what changes is that turn's."""
        change = place.commands
        if change is None or tenant in self._recorder.deploying:
            return
        place.commands = None
        change.turn.times = without(change.turn.times, self._open.others_at_work(tenant, change.turn))
        if not change.turn.times:
            self._tidy(tenant, place)
            return
        labels = change.labels
        by = name(next(iter(labels.values())) if len(set(labels.values())) == 1 else "several")
        change.turn.agent = change.turn.by = by
        words = next(iter(labels)) if len(labels) == 1 else f"by {len(labels)} commands"
        self._record(tenant, place, change.turn, f"Changed {words}")

    def _record(self, tenant: str, place: _WorkspaceChanges, turn: OpenTurn, title: str) -> None:
        turn.title = clean_text(title, TITLE_MAX)
        task = self._recorder.spawn(tenant, self._recorder.outside(tenant, turn))
        place.under_way[task] = turn
        task.add_done_callback(lambda done: self._recorded(tenant, place, done))

    def _recorded(self, tenant: str, place: _WorkspaceChanges, done: asyncio.Task[None]) -> None:
        place.under_way.pop(done, None)
        self._tidy(tenant, place)

    def _tidy(self, tenant: str, place: _WorkspaceChanges) -> None:
        """Forget a workspace in which nothing happens."""
        busy = place.saves or place.commands or place.ran or place.looking or place.under_way
        if not busy and self._of.get(tenant) is place:
            del self._of[tenant]


def _words(spec: ExecSpec) -> str:
    return "in a terminal" if spec.pty else f"by {' '.join(spec.argv)[:_COMMAND]}"
