"""Write the systemd unit of a site (`site.service`) and its environment, as systemd reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, Field, ValidationError

from gateway.runtime.sites import ALLOWED, Recipe, Side
from gateway.runtime.sizes import SITE_SHARE
from gateway.settings import Settings

NAMES: Final[Mapping[Side, str]] = {"live": "site.service", "next": "site-next.service"}

_FOLDERS: Final[Mapping[Side, str]] = {"live": "/etc/systemd/system", "next": "/run/systemd/system"}
_ENVIRONMENTS: Final[Mapping[Side, str]] = {"live": "/etc/site.env", "next": "/etc/site-next.env"}
# It starts as soon as /tmp is there, beside the rest of the container's boot and not after it: so a new
# tenant's site answers a good deal earlier.
_ENTRY: Final = re.compile(
    r"""[ \t]*(?:
        (?:[#;][^\n]*)?
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?:
            "(?P<quoted>(?:[^"\\]|\\["\\`$])*)" | '(?P<literal>[^']*)' | (?P<plain>[^"'\\\n]*)
        )
    )[ \t]*(?:\n|\Z)""",
    re.VERBOSE,
)
_ESCAPED: Final = re.compile(r'\\(["\\`$])')
_RECIPE: Final = b"X-Recipe="
_WORDS: Final = 64
_UNIT: Final = Path(__file__).with_name("site.service").read_text()


class _Said(BaseModel):
    """What a unit says of its recipe, in a section that systemd passes over (systemd.unit(5), `X-`)."""

    start: Annotated[tuple[str, ...], Field(min_length=1, max_length=_WORDS)]
    port: Annotated[int, Field(ge=1024, le=65535)]
    health: Annotated[str, Field(pattern=r"^/[!-~]*$", max_length=1024)]
    keep: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=_WORDS)] = ()
    template: Annotated[str, Field(max_length=63)] = ""


def unit_path(side: Side) -> str:
    """Return where a side's unit lies in the container; the next one is gone after a restart."""
    return f"{_FOLDERS[side]}/{NAMES[side]}"


def environment_path(side: Side) -> str:
    """Return where a side's own environment lies in the container."""
    return _ENVIRONMENTS[side]


def beside(settings: Settings, what: str) -> str:
    """Return a path beside the workspace, in root's folder: the tenant can put no link in its place."""
    folder, _, name = settings.workspace.rpartition("/")
    return f"{folder}/.{name}-{what}"


def unit(settings: Settings, recipe: Recipe, side: Side) -> str:
    """Return the unit of a side."""
    workspace, port = settings.workspace, recipe.listens(side)
    # that of one whose sides never run at the same time is the same for both
    environment, more = _ENVIRONMENTS["live" if recipe.alone else side], ""
    if side == "next":
        # it sees its folder where the live one's is: absolute paths stay true when it becomes that
        more = f"BindPaths={beside(settings, 'next')}:{workspace}\n"
    return _UNIT.format(
        allowed=ALLOWED,
        share=SITE_SHARE,
        user=settings.workspace_user,
        workspace=workspace,
        port=port,
        environment=environment,
        # over whatever the site's own environment says of it: this is where it is looked for
        command=unit_words(("/usr/bin/env", f"PORT={port}", *recipe.command(port))),
        more=more,
        recipe=_written(recipe),
    )


def recipe_of(text: bytes) -> Recipe | None:
    """Return how the site of a unit is started; None if that does not say so. It is the tenant's."""
    for line in text.split(b"\n"):
        if line.startswith(_RECIPE):
            try:
                said = _Said.model_validate_json(line[len(_RECIPE) :])
            except ValidationError:
                return None
            return Recipe(b"", said.start, said.port, said.health, keep=said.keep, template=said.template)
    return None


def _written(recipe: Recipe) -> str:
    said = _Said(
        start=recipe.start,
        port=recipe.port,
        health=recipe.health,
        keep=recipe.keep,
        template=recipe.template,
    )
    return said.model_dump_json()


def environment_file(env: Mapping[str, str]) -> str:
    """Write variables as systemd's EnvironmentFile wants them (systemd.exec(5)): quoted, one a line."""
    lines = []
    for name, value in env.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def environment_of(text: str) -> dict[str, str]:
    """Return the variables of what systemd takes for an EnvironmentFile. Raises `ValueError`.

    Values that are neither quoted as a whole nor plain are not understood, although systemd takes them.
    """
    found, at = dict[str, str](), 0
    while at < len(text):
        entry = _ENTRY.match(text, at)
        if entry is None:
            raise ValueError("no environment")
        at = entry.end()
        if entry["name"] is not None:
            quoted, literal, plain = entry["quoted"], entry["literal"], entry["plain"]
            if quoted is not None:
                found[entry["name"]] = _ESCAPED.sub(r"\1", quoted)
            else:
                found[entry["name"]] = literal if literal is not None else plain.strip(" \t")
    return found


def unit_words(argv: Sequence[str]) -> str:
    """Write a command as ExecStart= takes it (systemd.service(5)): quoted, nothing of it expanded."""
    words = []
    for word in argv:
        escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        words.append('"' + escaped.replace("\n", "\\n") + '"')
    return " ".join(words)
