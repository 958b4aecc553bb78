"""Publish a tenant's site: pack its files, with a manifest that builds and serves it for production."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import orjson

from gateway.admission import Admission
from gateway.bounds import Flood, first, run_in_thread
from gateway.deployments import archive as archive_limits
from gateway.deployments.archive import ArchiveEntry, packed, read_archive, too_large
from gateway.deployments.request import DeploymentOwner
from gateway.deployments.template import MANIFEST, read_manifest
from gateway.errors import ExecFailed, Timeout
from gateway.execs import Execs
from gateway.runtime import ExecSpec, TenantRuntime

_SCRIPT: Final = (Path(__file__).with_name("pack_workspace.sh")).read_text()
_AT_ONCE: Final = 4  # sites read at a time
_WAITING: Final = 32
_SECONDS: Final = 60.0  # for packing, and again for reading the tar
_SILENCE: Final = 15.0  # seconds without a byte of the tar; a git that lists a large tree takes some
_SAID: Final = 8 << 10  # bytes of the script's messages on standard error
# what a published site has of these is its own; a source file such as `schema.sqlite.ts` is none
_DATABASES: Final = ("*.{db,sqlite,sqlite3}", "*.{db,sqlite,sqlite3}-*")
_HEADERS: Final = 2048  # bytes of a tar entry besides its content


class Sources:
    """The files of tenants' sites, packed a few at a time, as each archive is held in memory."""

    def __init__(self, runtime: TenantRuntime, execs: Execs) -> None:
        self._runtime, self._execs = runtime, execs
        self._publishes = Admission[DeploymentOwner](
            "publishes",
            each=1,
            total=_AT_ONCE,
            waiting=_WAITING,
            patience=2 * _SECONDS,
            name="this token",
            retry_after=_SILENCE,
        )

    async def of(self, tenant: str, owner: DeploymentOwner) -> bytes:
        """Return an archive of a tenant's site, with a manifest for production.

        One is made at a time for each owner. Raises `ExecFailed`, `InvalidParams`, `RateLimited`, `Timeout`
        and `TooLarge`.
        """
        async with self._publishes.slot(owner):
            archive = await _packed(self._runtime, self._execs, tenant)
            return await run_in_thread(tenant, _SECONDS, for_production, archive)


def for_production(archive: bytes) -> bytes:
    """Return an archive with its manifest changed to production. Raises `InvalidParams` and `TooLarge`.

    Settings of the manifest for development, such as how it starts, are dropped; those for both stay. One
    that is for production already keeps all. Databases are kept as if the manifest named them.
    """
    entries = read_archive(archive)
    said = read_manifest(entries.get(MANIFEST))
    facts = said.model_dump(exclude_defaults=True)
    if said.mode != "production":
        facts = {name: facts[name] for name in ("port", "health", "spa") if name in facts}
    facts |= {"mode": "production", "keep": [*_DATABASES, *said.keep]}
    # JSON's numbers, strings and lists are TOML's, too
    lines = [f"{name} = {orjson.dumps(value).decode()}\n" for name, value in facts.items()]
    entries[MANIFEST] = ArchiveEntry("".join(lines).encode())
    return packed(entries)


async def _packed(runtime: TenantRuntime, execs: Execs, tenant: str) -> bytes:
    root = await runtime.filesystem(tenant)
    most = archive_limits.BYTES + archive_limits.FILES * _HEADERS
    words = ("/bin/sh", "-c", _SCRIPT, "sh", root.prefix + root.workspace, str(most + 1))
    try:
        async with (
            execs.script(tenant, ExecSpec(words, shown=("tar",))) as process,
            asyncio.timeout(_SECONDS),
        ):

            async def piece() -> bytes:
                async with asyncio.timeout(_SILENCE):
                    return await process.read("stdout")

            archive, said = await asyncio.gather(
                first(piece, most + 1, most=most + 1),
                first(lambda: process.read("stderr"), _SAID, most=1 << 20),
            )
            code = (await process.wait()).code
    except TimeoutError:
        raise Timeout(
            f"packing the files of {tenant} took over {_SECONDS:g} s, or stood still for {_SILENCE:g}; "
            "leave some out"
        ) from None
    except Flood:
        raise too_large() from None
    if len(archive) > most:
        raise too_large()
    if code != 0 or not archive:
        last = said.decode("utf-8", "replace").strip()[-500:]
        raise ExecFailed(f"cannot pack the files of {tenant}: {last}", reason="script_failed")
    return archive
