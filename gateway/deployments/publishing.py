"""Publish a tenant's site: take what it is made of, and how it is built and served in production."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

import orjson

from gateway.bounds import Flood, aside, first
from gateway.deployments.entries import Entry, packed, read_archive, too_large
from gateway.deployments.manifest import MANIFEST, read_manifest
from gateway.errors import ExecFailed, GatewayError, Timeout
from gateway.runtime import ExecSpec, TenantRuntime
from gateway.settings import Settings

_SCRIPT: Final = (Path(__file__).with_name("pack_workspace.sh")).read_text()
_AT_ONCE: Final = 2  # sites that are read
_SECONDS: Final = 60.0  # of packing, and of reading what was packed
_SAID: Final = 8 << 10  # bytes of what the script says beside the tar
_HEADERS: Final = 2048  # bytes that a tar has of an entry beside its content


class Sources:
    """What tenants' sites are made of, a few at a time: each is held in memory while it is read."""

    def __init__(self, runtime: TenantRuntime, settings: Settings) -> None:
        self._runtime, self._settings = runtime, settings
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def of(self, tenant: str) -> bytes:
        """Return an archive of what a tenant's site is made of, which says that it is for production.

        Raises `ExecFailed`, `InvalidParams`, `Timeout` and `TooLarge`.
        """
        async with self._turns:
            archive = await _packed(self._runtime, tenant, self._settings)
            return await aside(tenant, _SECONDS, for_production, archive, self._settings)


def for_production(archive: bytes, settings: Settings) -> bytes:
    """Return an archive with its manifest made one for production. Raises `InvalidParams` and `TooLarge`.

    Of the manifest only what holds for both ways stays: how a site starts for development is not how it is
    served. One that is for production itself stays as it is.
    """
    entries = read_archive(archive, settings)
    said = read_manifest(entries.get(MANIFEST))
    if said.mode != "production":
        facts = {"mode": "production", "port": said.port, "health": said.health, "keep": list(said.keep)}
        # JSON's numbers, strings and lists are TOML's, too
        lines = [f"{name} = {orjson.dumps(value).decode()}\n" for name, value in facts.items()]
        entries[MANIFEST] = Entry("".join(lines).encode())
    return packed(entries)


async def _packed(runtime: TenantRuntime, tenant: str, settings: Settings) -> bytes:
    root = await runtime.filesystem(tenant)
    most = settings.template_bytes + settings.template_files * _HEADERS
    words = ("/bin/sh", "-c", _SCRIPT, "sh", root.prefix + root.workspace, str(most + 1))
    process = await runtime.exec(tenant, ExecSpec(words, shown=("tar",)))
    try:
        async with asyncio.timeout(_SECONDS):
            archive, said = await asyncio.gather(
                first(lambda: process.read("stdout"), most + 1, most=most + 1),
                first(lambda: process.read("stderr"), _SAID, most=1 << 20),
            )
            code = (await process.wait()).code
    except TimeoutError:
        await asyncio.shield(process.kill(0))
        raise Timeout(f"the files of {tenant} took over {_SECONDS:g} s to pack; leave some out") from None
    except Flood:
        await asyncio.shield(process.kill(0))
        raise too_large(settings) from None
    except BaseException:
        with contextlib.suppress(GatewayError, TimeoutError):
            await asyncio.shield(process.kill(0))
        raise
    finally:
        await asyncio.shield(process.aclose())
    if len(archive) > most:
        raise too_large(settings)
    if code != 0 or not archive:
        last = said.decode("utf-8", "replace").strip()[-500:]
        raise ExecFailed(f"the files of {tenant} cannot be packed: {last}", reason="script_failed")
    return archive
