"""Publish a tenant's site: pack its files, with a manifest that builds and serves it for production."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import orjson

from gateway.admission import Admission
from gateway.bounds import Flood, first, run_in_thread
from gateway.deployments.entries import Entry, packed, read_archive, too_large
from gateway.deployments.manifest import MANIFEST, read_manifest
from gateway.deployments.queue import Owner
from gateway.errors import ExecFailed, Timeout
from gateway.execs import Execs
from gateway.runtime import ExecSpec, TenantRuntime
from gateway.settings import Settings

_SCRIPT: Final = (Path(__file__).with_name("pack_workspace.sh")).read_text()
_AT_ONCE: Final = 4  # sites read at a time
_WAITING: Final = 32
_SECONDS: Final = 60.0  # for packing, and again for reading the tar
_SILENCE: Final = 15.0  # seconds without a byte of the tar; a git that lists a large tree takes some
_SAID: Final = 8 << 10  # bytes of the script's messages beside the tar
# what a published site has of these is its own; a source file such as `schema.sqlite.ts` is none
_DATABASES: Final = ("*.{db,sqlite,sqlite3}", "*.{db,sqlite,sqlite3}-*")
_HEADERS: Final = 2048  # bytes of a tar entry besides its content


class Sources:
    """The files of tenants' sites, packed a few at a time, as each archive is held in memory."""

    def __init__(self, runtime: TenantRuntime, execs: Execs, settings: Settings) -> None:
        self._runtime, self._execs, self._settings = runtime, execs, settings
        self._publishes = Admission[Owner](
            "publishes",
            each=1,
            total=_AT_ONCE,
            waiting=_WAITING,
            patience=2 * _SECONDS,
            name="this token",
            retry_after=_SILENCE,
        )

    async def of(self, tenant: str, owner: Owner) -> bytes:
        """Return an archive of a tenant's site, with a manifest for production.

        One is made at a time for each owner. Raises `ExecFailed`, `InvalidParams`, `RateLimited`, `Timeout`
        and `TooLarge`.
        """
        async with self._publishes.slot(owner):
            archive = await _packed(self._runtime, self._execs, tenant, self._settings)
            return await run_in_thread(tenant, _SECONDS, for_production, archive, self._settings)


def for_production(archive: bytes, settings: Settings) -> bytes:
    """Return an archive with its manifest changed to production. Raises `InvalidParams` and `TooLarge`.

    Settings of the manifest for development, such as how it starts, are dropped; those for both stay. One
    that is for production already keeps all. Databases are kept as if the manifest named them.
    """
    entries = read_archive(archive, settings)
    said = read_manifest(entries.get(MANIFEST))
    facts = said.model_dump(exclude_defaults=True)
    if said.mode != "production":
        facts = {name: facts[name] for name in ("port", "health", "spa") if name in facts}
    facts |= {"mode": "production", "keep": [*_DATABASES, *said.keep]}
    # JSON's numbers, strings and lists are TOML's, too
    lines = [f"{name} = {orjson.dumps(value).decode()}\n" for name, value in facts.items()]
    entries[MANIFEST] = Entry("".join(lines).encode())
    return packed(entries)


async def _packed(runtime: TenantRuntime, execs: Execs, tenant: str, settings: Settings) -> bytes:
    root = await runtime.filesystem(tenant)
    most = settings.template_bytes + settings.template_files * _HEADERS
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
        raise too_large(settings) from None
    if len(archive) > most:
        raise too_large(settings)
    if code != 0 or not archive:
        last = said.decode("utf-8", "replace").strip()[-500:]
        raise ExecFailed(f"cannot pack the files of {tenant}: {last}", reason="script_failed")
    return archive
