"""`cp`: copies files and folders between this machine and a tenant.

A command in the tenant makes or unpacks a tar. One from a tenant is hostile: its links are made last, so that
nothing is written through them, and none leads out of the copied folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Final

import typer

from gateway.cli.exec import feed
from gateway.cli.invocation import Failed, TokenOption, Url, client_of, tenant_of
from gateway.cli.tenants import size
from gateway.terminal import copy, err, line, out
from gateway_client.execution import Exec
from gateway_client.tenant import Tenant

_PACK: Final = Path(__file__).with_name("pack.sh").read_text()
_UNPACK: Final = Path(__file__).with_name("unpack.sh").read_text()
_MISSING: Final = 44  # exit code of `pack.sh` where there is no such file
_PIECE: Final = 256 << 10
_SAID: Final = 64 << 10  # bytes of a command's stderr that are kept
_NAMED: Final = 1000  # most entries named as left out


@dataclass
class _Copied:
    files: int = 0
    bytes: int = 0
    left: list[str] = field(default_factory=list)

    def leave(self, what: object, why: str) -> None:
        if len(self.left) < _NAMED:
            self.left.append(f"{what}, {why}")


def cp(
    source: Annotated[
        str,
        typer.Argument(metavar="FROM", help="TENANT:PATH, a path on this machine, or - for standard input"),
    ],
    target: Annotated[str, typer.Argument(metavar="TO", help="The other one, or - for standard output")],
    user: Annotated[
        str | None, typer.Option(help="Who reads or writes in the tenant; default: the workspace's owner")
    ] = None,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Copy a file or a folder from or to a tenant, with modes and links.

    PATH is absolute, or relative to the workspace. If the target is a folder or ends with /, the copy goes
    into it and keeps its name. Links that lead out of the copied folder do not come to this machine.
    """
    there, here = _split(source), _split(target)
    if (there is None) == (here is None):
        raise typer.BadParameter("one of FROM and TO must be TENANT:PATH, the other a path on this machine")
    named, path = there or here or ("", "")
    copied = _Copied()

    async def run() -> str | None:
        async with client_of(url, token) as client:
            tenant = await tenant_of(client, named)
            if "-" in (source, target):
                await _pipe(tenant, path, user, inward=source == "-")
                return None
            if there is not None:
                return str(await _download(tenant, path, user, target, copied))
            return f"{named}:{await _upload(tenant, Path(source), path, user, copied)}"

    where = asyncio.run(run())
    for name in copied.left:
        err.say(f"left out: {line(name)}")
    if where is not None:
        count = f"{copied.files} file{'' if copied.files == 1 else 's'}"
        out.say(f"{line(where)}: {count}, {size(copied.bytes)}")


def _split(given: str) -> tuple[str, str] | None:
    """Return tenant and path of `TENANT:PATH`; None for a path on this machine."""
    tenant, colon, path = given.partition(":")
    return (tenant, path or ".") if colon and tenant and "/" not in tenant and tenant[0] != "." else None


async def _pipe(tenant: Tenant, path: str, user: str | None, *, inward: bool) -> None:
    """Copy standard input to a tenant's file, or such a file to standard output."""
    words = ["sh", "-c", 'cat >"$1"', "sh", path] if inward else ["cat", "--", path]
    async with tenant.exec(words, user=user, stdin=True) as process:
        feeding = asyncio.create_task(feed(process) if inward else process.close_stdin())
        said = b""
        try:
            async for stream, chunk in process.output():
                if stream == "stdout":
                    await asyncio.to_thread(copy, chunk)
                else:
                    said = (said + chunk)[:_SAID]
            await _check(process, said)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def _check(process: Exec, said: bytes) -> None:
    """Raise `Failed` with a command's last line of stderr unless it has succeeded."""
    ended = await process.wait()
    if ended.code != 0:
        lines = said.decode("utf-8", "replace").strip().splitlines()
        raise Failed(
            line(lines[-1]) if lines else f"the copy broke off: {ended.reason}, exit code {ended.code}"
        )


# --- out of a tenant ---------------------------------------------------------------------------------


async def _download(tenant: Tenant, path: str, user: str | None, target: str, copied: _Copied) -> Path:
    there = Path(target)
    if target.endswith("/") or there.is_dir():
        name = PurePosixPath(path).name
        there /= "workspace" if name in ("", "..") else name
    reading, writing = os.pipe()
    unpacking = asyncio.create_task(asyncio.to_thread(_unpack, reading, there, copied))
    said = b""
    try:
        async with tenant.exec(["sh", "-c", _PACK, "sh", path], user=user) as process:
            async for stream, chunk in process.output():
                if stream == "stdout":
                    await asyncio.to_thread(_write, writing, chunk)
                else:
                    said = (said + chunk)[:_SAID]
            if (await process.wait()).code == _MISSING:
                raise Failed(f"there is no {line(path)} in {tenant.name}")
            await _check(process, said)
    except BrokenPipeError:
        pass  # the reason is that of the unpacking
    finally:
        os.close(writing)
        await asyncio.gather(unpacking, return_exceptions=True)
    try:
        await unpacking
    except tarfile.TarError as error:
        raise Failed(f"the copy broke off: {error}") from None
    return there


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _unpack(reading: int, there: Path, copied: _Copied) -> None:
    """Unpack a tenant's tar as `there`: folders and files first, then the links."""
    links: list[tuple[PurePosixPath, str]] = []
    modes: list[tuple[Path, int]] = []
    with os.fdopen(reading, "rb") as pipe:
        if not pipe.peek(1):
            return  # the command has failed
        with tarfile.open(fileobj=pipe, mode="r|") as archive:
            root = None
            for entry in archive:
                parts = PurePosixPath(entry.name).parts
                if root is None:
                    root = parts[:1]
                    if not entry.isdir():
                        _unpack_one(archive, entry, there, copied)
                        break
                if parts[: len(root)] != root or ".." in parts or entry.name.startswith("/"):
                    copied.leave(entry.name, "as its name leads out of the folder")
                    continue
                name = PurePosixPath(*parts[len(root) :])
                to = there / name
                if (to if entry.isdir() else to.parent).resolve() != _within(there, to, entry.isdir()):
                    copied.leave(name, "as a link is in its way")
                elif entry.isdir():
                    to.mkdir(parents=True, exist_ok=True)
                    modes.append((to, entry.mode & 0o777))
                elif entry.issym():
                    links.append((name, entry.linkname))
                elif entry.islnk():
                    first = PurePosixPath(*PurePosixPath(entry.linkname).parts[len(root) :])
                    _link_again(there, first, to, copied)
                else:
                    _unpack_one(archive, entry, to, copied)
        while pipe.read(_PIECE):  # what follows the last entry
            pass
    for name, wanted in links:
        to = there / name
        if not _stays_inside(name, wanted) or to.parent.resolve() != _within(there, to, False) or to.is_dir():
            copied.leave(name, f"a link to {wanted}")
            continue
        to.unlink(missing_ok=True)
        to.symlink_to(wanted)
        copied.files += 1
    for folder, mode in reversed(modes):  # at last, as one may not be writable
        folder.chmod(mode)


def _within(there: Path, to: Path, itself: bool) -> Path:
    """Return where `to`, or its folder, is if no link is on the way."""
    return there.resolve() / (to if itself else to.parent).relative_to(there)


def _stays_inside(name: PurePosixPath, wanted: str) -> bool:
    """Return whether a link leads to a path of its folder, also by way of other such links."""
    parts = PurePosixPath(wanted).parts
    ups = len(list(itertools.takewhile(lambda part: part == "..", parts)))
    return not wanted.startswith("/") and ups < len(name.parts) and ".." not in parts[ups:]


def _unpack_one(archive: tarfile.TarFile, entry: tarfile.TarInfo, to: Path, copied: _Copied) -> None:
    """Write one file. An existing one is replaced only when the new one is complete."""
    if not entry.isreg() or entry.issparse():
        kind = f"a link to {entry.linkname}" if entry.issym() else "not a regular file"
        copied.leave(entry.name.removeprefix("./"), kind)
        return
    content = archive.extractfile(entry)
    assert content is not None
    to.parent.mkdir(parents=True, exist_ok=True)
    _replace(to, entry.mode & 0o777, lambda file: shutil.copyfileobj(content, file, _PIECE))
    copied.files += 1
    copied.bytes += entry.size


def _link_again(there: Path, first: PurePosixPath, to: Path, copied: _Copied) -> None:
    """Copy a file that the tenant has under two names."""
    source = there / first
    if ".." in first.parts or source.resolve() != there.resolve() / first or not source.is_file():
        copied.leave(to.relative_to(there), f"a link to {first}")
        return
    with source.open("rb") as content:
        mode = stat.S_IMODE(os.fstat(content.fileno()).st_mode) & 0o777
        _replace(to, mode, lambda file: shutil.copyfileobj(content, file, _PIECE))
    copied.files += 1
    copied.bytes += source.stat().st_size


def _replace(to: Path, mode: int, fill: Callable[[IO[bytes]], None]) -> None:
    descriptor, part = tempfile.mkstemp(prefix=".incus-gateway-", dir=to.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
        Path(part).chmod(mode)
        Path(part).replace(to)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


# --- into a tenant -----------------------------------------------------------------------------------


async def _upload(tenant: Tenant, source: Path, path: str, user: str | None, copied: _Copied) -> str:
    source.stat()  # raises where there is nothing
    async with tenant.exec(["sh", "-c", _UNPACK, "sh", path], user=user, stdin=True) as process:
        word, said = asyncio.Queue[bytes](1), b""

        async def listen() -> None:
            nonlocal said
            async for stream, chunk in process.output():
                if stream == "stdout" and not word.full():
                    word.put_nowait(chunk)
                elif stream == "stderr":
                    said = (said + chunk)[:_SAID]

        listening = asyncio.create_task(listen())
        asked = asyncio.create_task(word.get())
        try:
            await asyncio.wait([listening, asked], return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                name = source.resolve().name
                into = asked.result().startswith(b"into")
                await _send(process, source, name if into else PurePosixPath(path).name, copied)
                path = f"{path.rstrip('/')}/{name}" if into else path
            await listening
        finally:
            for task in (listening, asked):
                task.cancel()
            await asyncio.gather(listening, asked, return_exceptions=True)
        await _check(process, said)
    return path


async def _send(process: Exec, source: Path, name: str, copied: _Copied) -> None:
    """Send a tar of a file or a folder as a command's input."""
    reading, writing = os.pipe()
    packing = asyncio.create_task(asyncio.to_thread(_pack, writing, source, name, copied))
    try:
        while data := await asyncio.to_thread(os.read, reading, _PIECE):
            await process.write(data)
        await packing
        await process.close_stdin()
    finally:
        os.close(reading)
        await asyncio.gather(packing, return_exceptions=True)


def _pack(writing: int, source: Path, name: str, copied: _Copied) -> None:
    def counted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not (entry.isreg() or entry.isdir() or entry.issym() or entry.islnk()):
            copied.leave(entry.name, "not a regular file")
            return None
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        copied.files += not entry.isdir()
        copied.bytes += entry.size
        return entry

    with (
        contextlib.suppress(BrokenPipeError),  # the command has ended, and says why
        os.fdopen(writing, "wb") as pipe,
        tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        archive.add(source.resolve() if source.is_symlink() else source, arcname=f"./{name}", filter=counted)
