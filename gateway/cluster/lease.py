"""The right of a member to serve tenants that another one could bring back from a copy.

A member renews it for `GATEWAY_LEASE` seconds by asking the others: it succeeds if most members answer that
they hear it, or if the cluster's keys, which need a quorum, hold no suspicion against it. The seconds count
from the question. A member that wants to bring back its tenants waits until most members have not heard it
for longer than that, and until a suspicion has stood as long. So two members never have the right to serve
one tenant at the same time, whoever hears whom.

Once a lease has run out, only the keys can give it back: its tenants may belong to another member by then.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.cluster.listener import Question
from gateway.cluster.peers import Peer, Peers
from gateway.cluster.shared_keys import Keys
from gateway.errors import Unavailable

ASK_LEASE: Final = "lease"
"""What a peer is asked by to note that it hears us."""
ASK_SILENCE: Final = "silence"
"""What a peer is asked by since when it has not heard another one."""
_SUSPECT: Final = "lost."
_PARTS: Final = 5  # attempts to renew a lease before it runs out
_TRIES: Final = 10
_LONGEST: Final = 3600.0  # seconds of a lease that somebody may ask for


def now() -> float:
    """Return the time of a clock that keeps running while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Silence:
    """For how many seconds most members have not heard a member, and how long its lease lasts.

    `lease` is None if no member that answered knows of one: then the member must not be considered dead.
    """

    seconds: float
    lease: float | None


class Lease:
    """The lease of the member `own`, which lasts `seconds`, and what it knows of the others' leases."""

    def __init__(
        self, own: str, peers: Peers, keys: Keys, seconds: float, clock: Callable[[], float] = now
    ) -> None:
        self._own, self._peers, self._keys = own, peers, keys
        self._seconds, self._clock = seconds, clock
        self._until = -math.inf
        self._began = clock()  # what an earlier process heard is not known
        self._suspected: set[str] = set()  # members against which a suspicion stood when we looked
        self._heard: dict[str, tuple[float, float]] = {}  # by member: when it asked last, its lease's length

    @property
    def held(self) -> bool:
        return self._clock() < self._until

    @property
    def left(self) -> float:
        """Seconds left until the lease ends, unless it is renewed."""
        return max(0.0, self._until - self._clock())

    @property
    def pause(self) -> float:
        """Seconds between two renewals."""
        return self._seconds / _PARTS

    async def renew(self) -> str | None:
        """Renew it; return the suspicion that stands against this member, None if it has its lease.

        Raises `Unavailable` if neither most members nor the cluster's keys answer.
        """
        began = self._clock()
        found, _ = await self._peers.ask_all(f"/peer/ask/{ASK_LEASE}", {"seconds": self._seconds})
        answers = [answer for answer in found.values() if isinstance(answer, dict)]
        lasts = self._is_majority(1 + len(answers)) and self.held
        if not lasts or any(answer.get("suspected") for answer in answers):
            try:
                suspicion = await self._keys.get(_key(self._own))
            except Unavailable:
                if not lasts:
                    raise
            else:
                if suspicion is not None:
                    return suspicion
        self._until = max(self._until, began + self._seconds)
        return None

    async def clear(self, suspicion: str) -> None:
        """Lift the suspicion against this member, which has found out which tenants it still has."""
        await self._keys.swap(_key(self._own), suspicion, None)

    # --- of others ----------------------------------------------------------------------------------

    @property
    def questions(self) -> Mapping[str, Question]:
        """The questions that peers may ask, by name."""
        return {ASK_LEASE: self.hear, ASK_SILENCE: self.tell}

    async def hear(self, peer: Peer, what: Any) -> Mapping[str, Any]:
        """Answer `ASK_LEASE`."""
        length = min(float(what["seconds"]), _LONGEST)
        self._heard[peer.name] = self._clock(), length
        return {"suspected": peer.name in self._suspected}

    async def tell(self, _: Peer, what: Any) -> Mapping[str, Any]:
        """Answer `ASK_SILENCE`."""
        seconds, lease = self._silence(str(what["member"]))
        return {"seconds": seconds, "lease": lease}

    def _silence(self, member: str) -> tuple[float, float | None]:
        at, lease = self._heard.get(member, (self._began, None))
        return self._clock() - at, lease

    async def silence(self, member: str) -> Silence:
        """Ask all members how long they have not heard a given one."""
        found, _ = await self._peers.ask_all(f"/peer/ask/{ASK_SILENCE}", {"member": member})
        told = [self._silence(member)]
        for name, answer in found.items():
            match answer:
                case {"seconds": float() | int() as seconds, "lease": float() | int() | None as lease}:
                    if name != member:
                        told.append((seconds, lease))
        lengths = [lease for _, lease in told if lease is not None]
        least = self._members // 2 + 1
        longest = sorted((seconds for seconds, _ in told), reverse=True)
        seconds = longest[least - 1] if len(longest) >= least else 0.0
        return Silence(seconds, max(lengths, default=None))

    async def suspect(self, member: str, token: str) -> str:
        """Raise a suspicion against a member; return it. It is `token`, unless there was one already.

        From then on its lease lasts no longer than for its length. Raises `Unavailable`.
        """
        for _ in range(_TRIES):
            found = await self.suspicion(member)
            if found is not None:
                return found
            if await self._keys.swap(_key(member), None, token):
                self._suspected.add(member)
                return token
        raise Unavailable(f"{member} keeps leaving and returning; try again", reason="contended")

    async def suspicion(self, member: str) -> str | None:
        """Return the suspicion that stands against a member. Raises `Unavailable`."""
        found = await self._keys.get(_key(member))
        (self._suspected.discard if found is None else self._suspected.add)(member)
        return found

    # --- most of the members ------------------------------------------------------------------------

    @property
    def _members(self) -> int:
        return len(self._peers.all) + 1

    def _is_majority(self, count: int) -> bool:
        return 2 * count > self._members


def _key(member: str) -> str:
    """Return the key of a suspicion; a member's name may have letters that a key may not."""
    return _SUSPECT + re.sub(r"[^a-z0-9.-]", lambda found: f"_{ord(found[0]):x}_", member)
