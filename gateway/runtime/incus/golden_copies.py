"""Golden copies: stopped instances from which the tenants of a template or an upload are created.

Marks in Incus tell which gateway an instance belongs to: see `marks`.

`user.gateway.role` is `golden` or `pool`, `user.gateway.owner` names the gateway that created the instance,
and `user.gateway.key` what it was made from.

They wait stopped, because Incus cannot rename a running instance, and stopping one (0.8 s) takes longer than
starting it (0.15 s, and 0.5 s until its network is up). They use no memory, and their disks are copied
already.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import uuid4

from gateway.errors import GatewayError, NotFound, Timeout, Unavailable
from gateway.incus import Incus
from gateway.incus.client import instance_path
from gateway.rootfs.instance_record import MANAGED, identity_of
from gateway.runtime.incus import service_unit
from gateway.runtime.incus.creation import Creation, is_ours
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.provisioning import (
    BASE,
    BYTES,
    CONTENT,
    UPLOADER,
    USED,
    UploadedSite,
    freeing,
    surplus,
    upload_of,
)
from gateway.runtime.incus.records import Instance
from gateway.runtime.sites import Prepared, Quiet, Recipe, at_once
from gateway.runtime.sizes import SIZES
from gateway.settings import Settings
from gateway.tasks import whole

ROLE: Final = "user.gateway.role"
OWNER: Final = "user.gateway.owner"
KEY: Final = "user.gateway.key"

Role = Literal["golden", "pool"]


def owner(settings: Settings, member: str) -> str:
    """Return an id that tells this gateway's instances from those of another on the same Incus.

    In a cluster each `member` has a gateway, whose state dir has the same path as the others'.
    """
    place = f"{member}:{settings.state_dir.absolute()}" if member else str(settings.state_dir.absolute())
    return hashlib.sha256(place.encode()).hexdigest()[:12]


class Marks:
    """The marks of one gateway."""

    def __init__(self, settings: Settings, incus: Incus) -> None:
        self._settings, self._incus = settings, incus

    @property
    def _owner(self) -> str:
        return owner(self._settings, self._incus.known_member)

    def of(self, role: Role, key: str) -> dict[str, str]:
        """Return the configuration that marks an instance."""
        return {MANAGED: "false", ROLE: role, OWNER: self._owner, KEY: key}

    def on(self, instance: Instance, *roles: Role) -> bool:
        """Return whether an instance is this gateway's in one of these roles, and not an operator's copy."""
        config = instance["config"]
        return bool(config.get(ROLE) in roles and config.get(OWNER) == self._owner and is_ours(instance))

    def among(self, instances: Sequence[Instance], *roles: Role) -> Sequence[Instance]:
        """Return this gateway's instances in one of these roles."""
        return [instance for instance in instances if self.on(instance, *roles)]


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _PooledInstance:
    """An instance of the pool."""

    name: str
    identity: str

    def is_it(self, instance: Mapping[str, Any]) -> bool:
        return identity_of(instance) == self.identity


class Pool:
    """The pool of one gateway: `GATEWAY_WARM_POOL` instances per key of a golden copy."""

    def __init__(self, settings: Settings, making: Creation, marks: Marks) -> None:
        self._settings, self._making, self._marks = settings, making, marks
        # Incus lists an instance that is still being copied; these are known to be complete
        self._members: dict[str, list[_PooledInstance]] = {}

    async def claim(self, tenant: str, key: str, config: Mapping[str, str], size: Mapping[str, str]) -> bool:
        """Turn an instance of the pool into the tenant; return False if there is none.

        Incus lists an instance that is still being copied, and breaks if it is changed or renamed then; so
        only instances known to be complete are used.
        """
        while members := self._members.get(key):
            member = members.pop()
            try:
                change: dict[str, Any] = {"config": {**config, OWNER: "", KEY: ""}}
                if devices := await self._making.devices(size):
                    change["devices"] = devices
                with translated(member.name):
                    # marked first: from now on it belongs to the deployment, whatever its name
                    await self._making.operate("PATCH", instance_path(member.name), change)
            except BaseException as error:
                removing = self._making.remove(member.is_it, "it could not be taken from the pool")
                await whole(removing)
                if not isinstance(error, GatewayError):
                    raise
                log.warning("cannot use %s of the pool: %s", member.name, error.message)
                continue
            with translated(tenant):
                await self._making.operate("POST", instance_path(member.name), {"name": tenant})
                if "devices" in change:
                    await self._making.limited(tenant)
                await self._making.begin(tenant)
            return True
        return False

    async def fill(self, key: str, source: Mapping[str, str], quiet: Quiet) -> None:
        """Copy `source` until the pool of a key is full, one copy at a time and only while it is `quiet`."""
        members = self._members.setdefault(key, [])
        while len(members) < self._settings.warm_pool:
            await quiet()
            name = f"gateway-pool-{secrets.token_hex(6)}"
            member = _PooledInstance(name, str(uuid4()))
            marks = self._marks.of("pool", key)
            await self._making.make(name, source, marks, {}, start=False, identity=member.identity)
            members.append(member)

    def adopt(self, instance: Instance) -> None:
        """Add a complete instance created by an earlier process."""
        member = _PooledInstance(instance["name"], identity_of(instance))
        self._members.setdefault(instance["config"][KEY], []).append(member)

    async def drain(self) -> None:
        """Destroy all instances of the pool."""
        self._members.clear()
        await self._making.remove(lambda one: self._marks.on(one, "pool"), "the gateway is shutting down")


GOLDEN_SNAPSHOT: Final = "ready"

UNMARKED: Final = dict.fromkeys((OWNER, KEY, BASE, BYTES, UPLOADER, USED), "")
"""Set on a tenant created as a copy, which inherits all keys that are not given."""

_GENERATION: Final = 5  # increased when golden copies are made in a different way
_NOTHING: Final = Recipe(b"", ("true",), 3000)
_LIMITS: Final = ("cpu", "memory")
_REFUSED: Final = 1000  # most remembered uploads that cannot be copied

Bake = Callable[[str, Recipe], Awaitable[int]]
"""Turns a running instance into what copies start from; returns the bytes of its files: `Baking.bake`."""


class GoldenCopies:
    """The golden copies of one gateway, from which its pool is filled."""

    def __init__(
        self, settings: Settings, incus: Incus, making: Creation, marks: Marks, pool: Pool, bake: Bake
    ) -> None:
        self._settings, self._incus, self._making = settings, incus, making
        self._marks, self._pool, self._bake = marks, pool, bake
        # Incus lists a snapshot that is still being created; these are known to be complete
        self._whole: set[str] = set()  # by name
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._copying: Counter[str] = Counter()  # golden copies, by name, that are being copied
        self._used: dict[str, float] = {}  # last use of uploads' copies, not written to Incus yet
        # keys of uploads whose copy failed or is too large: not tried again for each of their tenants
        self._refused: dict[str, None] = {}
        self._left = False

    def leave(self) -> None:
        """Leave the pool to the next process."""
        self._left = True

    async def aclose(self) -> None:
        """Stop preparing, and remove the pool unless it was left: it would have no owner."""
        preparing = list(self._preparing.values())
        for task in preparing:
            task.cancel()
        if preparing:  # the next process removes unfinished ones
            await asyncio.wait(preparing, timeout=self._settings.shutdown_timeout / 2)
        if self._left:
            return
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_timeout / 2):
                await self._pool.drain()

    # --- use ----------------------------------------------------------------------------------------

    async def key(self, recipe: Recipe) -> str:
        """Return the key of a recipe on the current image, empty if it must not be shared."""
        if not recipe.key or not self._settings.golden:
            return ""
        with translated(""):
            alias = await self._incus.get(f"/1.0/images/aliases/{self._settings.image}")
            member = await self._incus.member()
        return prepared_key(self._settings, recipe, alias["target"], member)

    @contextlib.asynccontextmanager
    async def source(self, key: str) -> AsyncIterator[Mapping[str, str] | None]:
        """Yield the source for copying a key's golden copy, or None if there is none.

        The golden copy is kept while the context is open.
        """
        name = golden_name(key)
        if not key or name not in self._whole:
            yield None
            return
        self._copying[name] += 1
        self._used[name] = time.time()
        try:
            yield _copy(name) if await self._golden_is_ready(name) else None
        finally:
            self._copying[name] -= 1

    # --- preparation --------------------------------------------------------------------------------

    def prepare(
        self, recipe: Recipe, prepared: Prepared, size: str = "small", quiet: Quiet = at_once
    ) -> None:
        """Make a golden copy of a recipe in the background, and for a template fill the pool.

        The pool is filled only while it is `quiet`, because that slows down other deployments.
        """
        key = recipe.key
        if not key or not self._settings.golden or key in self._preparing or key in self._refused:
            if recipe.owner:
                prepared(None)
            return
        task = asyncio.create_task(self._prepare(recipe, prepared, SIZES[size], quiet), name=f"prepare {key}")
        self._preparing[key] = task
        task.add_done_callback(lambda _: self._preparing.pop(key, None))

    async def _prepare(
        self, recipe: Recipe, prepared: Prepared, size: Mapping[str, str], quiet: Quiet
    ) -> None:
        """Make a golden copy and fill the pool. A failure costs only time: tenants come from the image."""
        try:
            key = await self.key(recipe)
            golden = golden_name(key)
            if recipe.owner:
                await self._prepare_upload(golden, key, recipe, size)
                prepared(None)
                return
            if not await self._golden_is_ready(golden):
                await self._make_golden(golden, key, recipe, size)
            await self._pool.fill(key, _copy(golden), quiet)
            prepared(None)
        except GatewayError as error:
            prepared(error)
        except TimeoutError:
            prepared(Timeout("the site did not answer in time", reason="never_healthy"))
        except Exception:
            log.exception("cannot prepare a template")
            prepared(Unavailable("see the gateway's log"))

    async def _make_golden(self, name: str, key: str, recipe: Recipe, size: Mapping[str, str]) -> None:
        await self._making.remove(
            lambda one: one["name"] == name and self._marks.on(one, "golden"),
            "a golden copy was not finished",
        )
        async with self._making.undone("the golden copy failed") as identity:
            source = {"type": "image", "alias": self._settings.image}
            limits = {f"limits.{what}": size[what] for what in _LIMITS if what in size}
            marks = self._marks.of("golden", key)
            if recipe.owner:
                marks |= {UPLOADER: recipe.owner, CONTENT: recipe.key, USED: f"{time.time():.0f}"}
                marks[BASE] = await self._base()
            await self._making.make(name, source, marks | limits, {}, start=True, identity=identity)
            held = await self._bake(name, recipe)
            with translated(name):
                body = {"action": "stop", "timeout": -1, "force": True}
                await self._making.operate("PUT", instance_path(name, "state"), body)
                measured = {}
                if recipe.owner:
                    disk = ((await self._incus.state(name)).get("disk") or {}).get("root") or {}
                    measured[BYTES] = str(disk.get("usage") or held)

                def unlimited(found: Mapping[str, Any]) -> Mapping[str, Any]:
                    """Limits are set on each copy."""
                    kept = {key: value for key, value in found["config"].items() if key not in limits}
                    return {"config": kept | measured}

                await self._making.edit(name, unlimited)
                await self._making.operate(
                    "POST", instance_path(name, "snapshots"), {"name": GOLDEN_SNAPSHOT}
                )
        self._whole.add(name)

    # --- uploads ------------------------------------------------------------------------------------

    async def _prepare_upload(self, name: str, key: str, recipe: Recipe, size: Mapping[str, str]) -> None:
        """Make a golden copy of an upload, if there is room for it among the others."""
        if self._settings.upload_copies < 1 or await self._golden_is_ready(name):
            return
        try:
            await self._remove_surplus(coming=recipe.owner)
            await self._make_golden(name, key, recipe, size)
            await self._remove_surplus()
        except (GatewayError, TimeoutError):
            self._refuse(recipe.key)
            raise
        if name not in self._whole:
            self._refuse(recipe.key)
            log.info("the golden copy of an upload was removed at once: too large, or its tenant is gone")

    def _refuse(self, key: str) -> None:
        self._refused[key] = None
        while len(self._refused) > _REFUSED:
            del self._refused[next(iter(self._refused))]

    async def tidy(self) -> None:
        """Remove the copies of uploads that are no longer needed, and record the last use of the others."""
        await self._remove_surplus()
        for copy in self._uploads(await self._making.instances()):
            if self._used.get(copy.name, 0.0) >= copy.used and not self._copying[copy.name]:
                change = {"config": {USED: f"{self._used.pop(copy.name):.0f}"}}
                with contextlib.suppress(GatewayError), translated(copy.name):
                    await self._making.operate("PATCH", instance_path(copy.name), change)

    async def spare(self, wanted: int) -> int:
        """Remove copies of uploads to free `wanted` bytes, or all copies; return the bytes freed."""
        copies = self._uploads(await self._making.instances())
        return await self._give_up(freeing(copies, wanted), "the storage pool is nearly full")

    async def _remove_surplus(self, coming: str | None = None) -> None:
        """Remove copies above the limits; `coming` is an owner for whom to make room for one more."""
        instances = await self._making.instances()
        copies = self._uploads(instances)
        if not copies:
            return
        held = {one["config"].get(CONTENT) for one in instances if one["config"].get(MANAGED) == "true"}
        gone = surplus(
            copies,
            self._settings,
            held=held,
            base=await self._base(),
            now=time.time(),
            coming=coming,
        )
        await self._give_up(gone, "a golden copy of an upload is no longer wanted")

    async def _give_up(self, copies: Collection[UploadedSite], why: str) -> int:
        """Remove copies, except those being copied for a tenant; return the bytes they held."""
        free = [copy for copy in copies if not self._copying[copy.name]]
        for copy in free:
            self._whole.discard(copy.name)
            self._used.pop(copy.name, None)
        if free:
            identities = {copy.identity for copy in free}
            await self._making.remove(
                lambda one: identity_of(one) in identities and self._marks.on(one, "golden"), why
            )
        return sum(copy.bytes for copy in free)

    def _uploads(self, instances: Sequence[Mapping[str, Any]]) -> list[UploadedSite]:
        """Return the complete copies of uploads."""
        golden = self._marks.among(instances, "golden")
        found = (upload_of(one, self._used) for one in golden if one["name"] in self._whole)
        return [upload for upload in found if upload is not None]

    async def _base(self) -> str:
        """Return the key of the base on which copies are currently made."""
        with translated(""):
            alias = await self._incus.get(f"/1.0/images/aliases/{self._settings.image}")
            member = await self._incus.member()
        return prepared_key(self._settings, _NOTHING, alias["target"], member)

    # --- completeness -------------------------------------------------------------------------------

    async def _golden_is_ready(self, name: str) -> bool:
        return name in self._whole and await self._has_snapshot(name)

    async def _has_snapshot(self, name: str) -> bool:
        try:
            with translated(name):
                # for a single snapshot Incus asks the pool for its size, which costs ten times as much
                found = await self._incus.get(instance_path(name, "snapshots"))
        except NotFound:
            return False
        return any(str(one).rpartition("/")[2] == GOLDEN_SNAPSHOT for one in found)

    # --- earlier processes --------------------------------------------------------------------------

    async def adopt(self, recipes: Sequence[Recipe]) -> None:
        """Keep what an earlier process prepared for these recipes; destroy everything else it left."""
        keys = {await self.key(recipe) for recipe in recipes if recipe.key}
        base = await self._base() if self._settings.golden else ""
        with translated(""):
            unfinished = await self._incus.busy()
        outdated = set()
        for instance in self._marks.among(await self._making.instances(), "golden", "pool"):
            name, key = instance["name"], instance["config"].get(KEY)
            pooled = self._marks.on(instance, "pool")
            ready = name not in unfinished and (pooled or await self._has_snapshot(name))
            upload = upload_of(instance, {})
            wanted = key in keys if upload is None else bool(base) and upload.base == base
            if not wanted or not ready or instance["status"] != "Stopped":
                outdated.add(identity_of(instance))
            elif pooled:
                self._pool.adopt(instance)
            else:
                self._whole.add(name)
        await self._making.remove(
            lambda one: identity_of(one) in outdated and self._marks.on(one, "golden", "pool"),
            "an earlier process prepared it for other templates",
        )


def prepared_key(settings: Settings, recipe: Recipe, image: str, member: str = "") -> str:
    """Return the key of a recipe on the image with that fingerprint, for one gateway: see `marks.owner`."""
    unit = service_unit.unit(settings, recipe, "live")
    facts = f"{_GENERATION} {recipe.key} {image} {owner(settings, member)} {unit}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def golden_name(key: str) -> str:
    """Return the name of a key's golden copy, complete once it has the snapshot `GOLDEN_SNAPSHOT`."""
    return f"gateway-golden-{key}"


def _copy(golden: str) -> Mapping[str, str]:
    return {"type": "copy", "source": f"{golden}/{GOLDEN_SNAPSHOT}"}
