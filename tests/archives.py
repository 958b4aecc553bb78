"""Templates as they are uploaded, the hostile ones too."""

from __future__ import annotations

import io
import tarfile

MANIFEST = b'start = ["bun", "serve.ts"]\n'
SERVE = b'Bun.serve({port: process.env.PORT, hostname: "0.0.0.0", fetch: () => new Response("mine")})'

# a tar's member: a name with its content, or a header of its own
Member = tuple[str, bytes] | tarfile.TarInfo


def archive(*members: Member, manifest: bytes | None = MANIFEST, form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar of these, with a manifest unless there is to be none."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as tar:
        for member in (*members, *((("site.toml", manifest),) if manifest is not None else ())):
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))
    return buffer.getvalue()


def header(name: str, kind: bytes, target: str = "", **pax: str) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.pax_headers = kind, target, pax
    return made


def link(name: str, target: str) -> tarfile.TarInfo:
    return header(name, tarfile.SYMTYPE, target)


def sparse(size: int) -> bytes:
    """Return a tar with a file of `size` bytes of which none is kept, as GNU tar writes it."""
    made = header("big", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT)
    block = bytearray(made)
    block[483:495] = b"\x80" + size.to_bytes(11)  # the real size, in base 256
    block[386:410] = b"%011o\0%011o\0" % (0, 0)  # one piece: at 0, of no bytes
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + archive()


def folder(manifest: str, *more: Member) -> bytes:
    """Return a template that serves "mine" if its manifest starts it."""
    return archive(("serve.ts", SERVE), *more, manifest=manifest.encode())
