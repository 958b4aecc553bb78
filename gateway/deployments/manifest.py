"""Read and write a site's manifest, `site.toml`: how it is installed, started and verified."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gateway.deployments.entries import SHOWN, Entry, refused
from gateway.detection import Detected
from gateway.detection.clues import line_of
from gateway.rootfs.paths import show
from gateway.tools.mirroring import understood

MANIFEST: Final = "site.toml"
_MANIFEST_MAX: Final = 64 << 10  # bytes
# of one line; of a key with n parts the parser keeps n² words: 64 KiB of dots took 4 GiB
_DOTS_MAX: Final = 128
_WORD_MAX: Final = 4096  # characters
_SERVER: Final = Path(__file__).with_name("serve.js").read_text()
_WATCHER: Final = Path(__file__).with_name("watch.js").read_text()
_DJANGO: Final = Path(__file__).with_name("serve_django.py").read_text()

# characters with a meaning to a shell; `$PORT` alone needs no shell
_SHELL: Final = re.compile(r"[|&;<>()`*?\[\]~#!]|\$(?!PORT(?![A-Za-z0-9_])|\{PORT\})|^\s*\w+=")
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ksh"})
_UNEXPANDED: Final = re.compile(r"\$\{PORT[^}]+\}")

Word = Annotated[str, StringConstraints(min_length=1, max_length=_WORD_MAX, pattern=r"^[^\x00-\x1f]*$")]
UrlPath = Annotated[str, StringConstraints(pattern=r"^/[!-~]*$", max_length=1024)]


Pattern = Annotated[
    str,
    StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]*$"),
    AfterValidator(understood),
]


def _words(said: Any) -> Any:
    """Return the words of a command given as one string: split as a shell would, or run by one if needed.

    Anything else is returned as it is, for the validation to refuse.
    """
    if isinstance(said, str):
        if len(said) > _WORD_MAX:
            raise PydanticCustomError("long", "it has over {most} characters", {"most": _WORD_MAX})
        if _SHELL.search(said):
            return ("sh", "-c", said)
        try:
            return tuple(shlex.split(said))
        except ValueError:
            raise PydanticCustomError("quotes", "it has an unclosed quote") from None
    if not isinstance(said, list | tuple):
        raise PydanticCustomError(
            "command", 'it must be a list of words, such as ["bun", "serve.ts"], or a string'
        )
    return said


def _expanded(command: tuple[str, ...]) -> tuple[str, ...]:
    if command[:1] and command[0].rpartition("/")[2] not in _SHELLS:
        for word in command:
            if (found := _UNEXPANDED.search(word)) is not None:
                raise PydanticCustomError(
                    "port", "{said} needs a shell; write $PORT", {"said": show(found[0][:SHOWN])}
                )
    return command


def _below(folder: str) -> str:
    if folder != "." and any(part in ("", ".", "..") for part in folder.split("/")):
        raise PydanticCustomError("below", 'it must be a folder of the site, such as "dist", or "."')
    return folder


Install = Annotated[tuple[Word, ...], Field(max_length=64), BeforeValidator(_words)]
Start = Annotated[
    tuple[Word, ...],
    Field(min_length=1, max_length=64),
    BeforeValidator(_words),
    AfterValidator(_expanded),
]
Mode = Literal["dev", "production"]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Overrides(BaseModel):
    """Options of a deployment that override the manifest and what is detected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    install: Install | None = None
    start: Start | None = None
    port: Port | None = None
    mode: Mode | None = None

    @property
    def said(self) -> dict[str, Any]:
        return {name: value for name, value in self if value is not None}


class Manifest(BaseModel):
    """The contents of `site.toml`. Without `start` and `static`, the kind of site is detected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: Annotated[str, Field(max_length=500)] = ""
    install: Install | None = None
    start: Start | None = None
    static: Annotated[Word, AfterValidator(_below)] | None = None
    port: Port = 3000
    mode: Mode = "dev"
    watch: bool = False
    spa: bool | None = None
    health: UrlPath = "/"
    warm: Annotated[tuple[UrlPath, ...], Field(max_length=16)] = ()
    keep: Annotated[tuple[Pattern, ...], Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.start is not None and self.static is not None:
            raise PydanticCustomError("both", "it has `start` and `static`; leave one out")
        return self

    @property
    def command(self) -> tuple[str, ...]:
        """The words that start the site; for static files, the server for them."""
        if self.static is not None:
            return ("bun", "-e", _SERVER, self.static, *(("spa",) if self.spa else ()))
        start = self.start or ()
        if start[1:3] == ("manage.py", "runserver"):
            start = (start[0], "-c", _DJANGO, *start[1:])
        return ("node", "-e", _WATCHER, "--", *start) if self.watch else start

    def but(self, overrides: Overrides) -> Manifest:
        """Return it with the overrides applied."""
        said = overrides.said
        return self.model_copy(update=({"static": None} if "start" in said else {}) | said)

    def completed(self, found: Detected) -> Manifest:
        """Return it, completed by what was detected."""
        more: dict[str, Any] = {}
        if self.install is None:
            more["install"] = found.install
        if self.start is None and self.static is None:
            more |= {"start": found.start or None, "static": found.static}
            more |= {"watch": self.watch or found.watch, "spa": found.spa if self.spa is None else self.spa}
            more["warm"] = self.warm or ("/",)
        try:
            # it was detected from files that a stranger wrote
            return Manifest.model_validate(self.model_dump() | more)
        except ValidationError as error:
            problem = error.errors()[0]
            raise refused(f"{problem['loc'][0]}, as detected: {problem['msg']}") from None


def read_manifest(said: Entry | None) -> Manifest:
    """Read a manifest; an absent one is empty. Raises `InvalidParams`."""
    if said is None:
        return Manifest()
    if said.content is None:
        raise refused(f"{MANIFEST} is a folder or a link; make it a file that says how the site is started")
    if len(said.content) > _MANIFEST_MAX:
        raise refused(f"{MANIFEST} has over {_MANIFEST_MAX >> 10} KiB")
    if any(line.count(b".") > _DOTS_MAX for line in said.content.split(b"\n")):
        raise refused(f"{MANIFEST} has a line with over {_DOTS_MAX} dots; split it")
    try:
        return Manifest.model_validate(tomllib.loads(said.content.decode()))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        where = f"{MANIFEST}: {show(field[:SHOWN])}" if field else MANIFEST
        raise refused(f"{where}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:  # TOML's own, text's, a number of 5000 digits, nesting
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise refused(f"{MANIFEST} is not TOML: {show(why[:SHOWN])}") from None


def written(found: Detected, port: int) -> str:
    """Return what was detected as a manifest, with the reason as a comment."""
    lines = [f"# {line}" for line in found.lines()]
    if found.install:
        lines.append(f"install = {_quoted(line_of(found.install))}")
    if found.static is not None:
        lines.append(f"static = {_quoted(found.static)}")
        lines += ["spa = true"] if found.spa else []
    else:
        lines.append(f"start = {_quoted(line_of(found.start))}")
    if found.watch:
        lines.append("watch = true")
    lines.append(f"port = {port}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # TOML's basic strings have JSON's escapes
    return json.dumps(text, ensure_ascii=False)
