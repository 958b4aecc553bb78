"""Copies files and folders between this machine and a tenant."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

import typer

from gateway.cli.asking import client_of, run_to_end
from gateway.cli.confirming import Failed
from gateway.cli.options import TokenOption, Url
from gateway.cli.showing import size
from gateway.errors import NotFound
from gateway.terminal import err, line, out
from gateway_client.files import Entry, Files

# files copied at a time
_AT_ONCE: Final = 8


@dataclass
class _Copied:
    files: int = 0
    bytes: int = 0
    left: list[str] = field(default_factory=list)


def cp(
    source: Annotated[str, typer.Argument(metavar="FROM", help="TENANT:PATH, or a path on this machine")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The other one")],
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Copy a file or a folder from or to a tenant.

    PATH is relative to the workspace. If the target is a folder or ends with /, the copy goes into it and
    keeps its name. Links are left out. Executable files stay executable when copied out, but not in.
    """
    there, here = _split(source), _split(target)
    if (there is None) == (here is None):
        raise typer.BadParameter("one of FROM and TO must be TENANT:PATH, the other a path on this machine")
    tenant, path = there or here or ("", "")
    copied = _Copied()

    async def run() -> str:
        async with client_of(url, token) as client:
            files = client.tenant(tenant).files
            if there is not None:
                try:
                    return str(await _download(files, path, target, copied))
                except NotFound as missing:
                    if missing.facts.get("reason") != "missing":
                        raise
                    raise Failed(f"there is no {line(path)} in {tenant}") from None
            return f"{tenant}:{await _upload(files, Path(source), path, copied)}"

    where = run_to_end(run())
    for name in copied.left:
        err.say(f"left out: {line(name)}")
    count = f"{copied.files} file{'' if copied.files == 1 else 's'}"
    out.say(f"{line(where)}: {count}, {size(copied.bytes)}")


def _split(given: str) -> tuple[str, str] | None:
    """Return tenant and path of `TENANT:PATH`; None for a path on this machine."""
    tenant, colon, path = given.partition(":")
    return (tenant, path or ".") if colon and tenant and "/" not in tenant and tenant[0] != "." else None


async def _all(work: list[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(what: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with slots:
            await what()

    try:
        async with asyncio.TaskGroup() as group:
            for what in work:
                group.create_task(one(what))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


# --- out of a tenant ---------------------------------------------------------------------------------


async def _download(files: Files, path: str, target: str, copied: _Copied) -> Path:
    entry = await files.stat(path)
    there = Path(target)
    if target.endswith("/") or there.is_dir():
        there /= PurePosixPath(path).name or "workspace"
    work: list[Callable[[], Coroutine[Any, Any, None]]] = []
    await _plan_download(files, entry, path, there, copied, work)
    if not work and entry.type not in ("file", "directory"):
        raise Failed(f"{path} is neither a file nor a folder, but a {entry.type}")
    await _all(work)
    return there


async def _plan_download(
    files: Files,
    entry: Entry,
    path: str,
    there: Path,
    copied: _Copied,
    work: list[Callable[[], Coroutine[Any, Any, None]]],
) -> None:
    if entry.type == "file":

        async def fetch() -> None:
            await _fetch(files, path, there, copied, executable=bool(entry.mode & 0o100))

        work.append(fetch)
    elif entry.type == "directory":
        there.mkdir(parents=True, exist_ok=True)
        inside, cut = await files.list(path)
        if cut:
            raise Failed(f"{path} has too many entries to list; pack it: exec … tar -cz {path}")
        for one in inside:
            name = PurePosixPath(one.path).name
            # no name chosen by a tenant may lead outside the target folder
            if one.escaped or not name or name in (".", "..") or "/" in name or "\0" in name:
                copied.left.append(f"{one.path}, whose name cannot be copied")
            else:
                await _plan_download(files, one, f"{path}/{name}", there / name, copied, work)
    else:
        copied.left.append(f"{path}, a {entry.type}")


async def _fetch(files: Files, path: str, there: Path, copied: _Copied, *, executable: bool) -> None:
    """Download one file. An existing file is replaced only when the new one is complete."""
    descriptor, part = tempfile.mkstemp(prefix=".incus-gateway-", dir=there.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            async for chunk in files.download(path):
                file.write(chunk)
                copied.bytes += len(chunk)
        os.umask(umask := os.umask(0o077))
        Path(part).chmod((0o777 if executable else 0o666) & ~umask)
        Path(part).replace(there)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    copied.files += 1


# --- into a tenant -----------------------------------------------------------------------------------


async def _upload(files: Files, source: Path, path: str, copied: _Copied) -> str:
    source.stat()  # raises where there is nothing
    name = source.resolve().name
    try:
        inside = path.endswith("/") or (await files.stat(path)).type == "directory"
    except NotFound:
        inside = False
    there = f"{path.rstrip('/')}/{name}" if inside else path
    folders, found = [], []
    if source.is_dir():
        for folder, names, leaves in os.walk(source):
            at = PurePosixPath(there, Path(folder).relative_to(source).as_posix())
            folders.append(str(at))
            found += [(Path(folder, leaf), str(at / leaf)) for leaf in leaves]
            copied.left += [f"{Path(folder, one)}, a link" for one in names if Path(folder, one).is_symlink()]
    else:
        found = [(source, there)]
    for one in folders:
        await files.mkdir(one)

    def sending(local: Path, remote: str) -> Callable[[], Coroutine[Any, Any, None]]:
        async def send() -> None:
            count = local.stat().st_size
            with local.open("rb") as file:
                await files.upload(remote, file)
            copied.files += 1
            copied.bytes += count

        return send

    regular = [(local, remote) for local, remote in found if local == source or _is_plain(local)]
    left = {local for local, _ in found} - {local for local, _ in regular}
    copied.left += [f"{local}, not a regular file" for local in sorted(left)]
    await _all([sending(local, remote) for local, remote in regular])
    return there


def _is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)
