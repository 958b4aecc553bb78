"""Read and write a site's manifest, `site.toml`: how it is installed, started and seen to work."""

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
from gateway.detection.detected import line_of
from gateway.rootfs.paths import show
from gateway.tools.mirroring import understood

MANIFEST: Final = "site.toml"
_MANIFEST_MAX: Final = 64 << 10  # bytes
_WORD_MAX: Final = 4096  # characters
_SERVER: Final = Path(__file__).with_name("serve.js").read_text()

# what a shell takes for more than a letter, but for `$PORT`, which needs none
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
    """Return a command that is one string as its words: apart as a shell does, or by a shell if it needs one.

    What is no command is left to be refused.
    """
    if isinstance(said, str):
        if len(said) > _WORD_MAX:
            raise PydanticCustomError("long", "it has over {most} characters", {"most": _WORD_MAX})
        if _SHELL.search(said):
            return ("sh", "-c", said)
        try:
            return tuple(shlex.split(said))
        except ValueError:
            raise PydanticCustomError("quotes", "its quotes have no end") from None
    if not isinstance(said, list | tuple):
        raise PydanticCustomError(
            "command", 'it is a list of words, such as ["bun", "serve.ts"], or a string'
        )
    return said


def _expanded(command: tuple[str, ...]) -> tuple[str, ...]:
    if command[:1] and command[0].rpartition("/")[2] not in _SHELLS:
        for word in command:
            if (found := _UNEXPANDED.search(word)) is not None:
                raise PydanticCustomError(
                    "port", "{said} takes a shell; write $PORT", {"said": show(found[0][:SHOWN])}
                )
    return command


def _below(folder: str) -> str:
    if folder != "." and any(part in ("", ".", "..") for part in folder.split("/")):
        raise PydanticCustomError("below", 'it is a folder of the site, such as "dist", or "."')
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
    """What whoever deploys a folder says of it, in place of its manifest and of what is found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    install: Install | None = None
    start: Start | None = None
    port: Port | None = None
    mode: Mode | None = None

    @property
    def said(self) -> dict[str, Any]:
        return {name: value for name, value in self if value is not None}


class Manifest(BaseModel):
    """What `site.toml` says. Where neither `start` nor `static` is there, it is found what the site is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: Annotated[str, Field(max_length=500)] = ""
    install: Install | None = None
    start: Start | None = None
    static: Annotated[Word, AfterValidator(_below)] | None = None
    port: Port = 3000
    mode: Mode = "dev"
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
        """The words that start the site; of files, the server for them."""
        if self.static is not None:
            return ("bun", "-e", _SERVER, self.static)
        return self.start or ()

    def but(self, overrides: Overrides) -> Manifest:
        """Return it with what was said in its place."""
        said = overrides.said
        return self.model_copy(update=({"static": None} if "start" in said else {}) | said)

    def completed(self, found: Detected) -> Manifest:
        """Return it with what was found where it says nothing itself."""
        more: dict[str, Any] = {}
        if self.install is None:
            more["install"] = found.install
        if self.start is None and self.static is None:
            more |= {"start": found.start or None, "static": found.static}
            more["warm"] = self.warm or ("/",)
        try:
            # what was found comes from what a stranger wrote
            return Manifest.model_validate(self.model_dump() | more)
        except ValidationError as error:
            problem = error.errors()[0]
            raise refused(f"{problem['loc'][0]}, as it was found: {problem['msg']}") from None


def read_manifest(said: Entry | None) -> Manifest:
    """Read a manifest; where there is none it says nothing. Raises `InvalidParams`."""
    if said is None:
        return Manifest()
    if said.content is None:
        raise refused(f"{MANIFEST} is a folder or a link; a file says how the site is started")
    if len(said.content) > _MANIFEST_MAX:
        raise refused(f"{MANIFEST} has over {_MANIFEST_MAX >> 10} KiB")
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
    """Return what was found as a manifest, with a comment of why."""
    lines = [f"# {line}" for line in found.lines()]
    if found.install:
        lines.append(f"install = {_quoted(line_of(found.install))}")
    if found.static is not None:
        lines.append(f"static = {_quoted(found.static)}")
    else:
        lines.append(f"start = {_quoted(line_of(found.start))}")
    lines.append(f"port = {port}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # TOML's basic strings have JSON's escapes
    return json.dumps(text, ensure_ascii=False)
