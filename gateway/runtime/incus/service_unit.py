"""The systemd unit of a site (`site.service`) and its environment file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, Field, ValidationError

from gateway.runtime.sites import ALLOWED, Recipe, Side
from gateway.runtime.sizes import SITE_SHARE
from gateway.settings import Settings


def script(name: str) -> str:
    """Return the text of a script in this folder."""
    return Path(__file__).with_name(f"{name}.sh").read_text()


def systemd_script(name: str) -> str:
    """Return the text of a script that uses the container's systemd, which it waits for: up to 20 s."""
    return f"{script('wait_for_systemd')}\n{script(name)}"


NAMES: Final[Mapping[Side, str]] = {"live": "site.service", "next": "site-next.service"}

_FOLDERS: Final[Mapping[Side, str]] = {"live": "/etc/systemd/system", "next": "/run/systemd/system"}
_ENVIRONMENTS: Final[Mapping[Side, str]] = {"live": "/etc/site.env", "next": "/etc/site-next.env"}
# of an EnvironmentFile, empty lines and comments, and then an assignment; possessive, so that it is linear
_ENTRY: Final = re.compile(
    r"""(?:[ \t]*+(?:[#;][^\n]*+)?(?:\n|\Z))*+(?:[ \t]*+
        (?P<name>[A-Za-z_][A-Za-z0-9_]*+)=(?:
            "(?P<quoted>(?:[^"\\]++|\\["\\`$])*+)" | '(?P<literal>[^']*+)' | (?P<plain>[^"'\\\n]*+)
        )[ \t]*+(?:\n|\Z)
    )?""",
    re.VERBOSE,
)
_ESCAPED: Final = re.compile(r'\\(["\\`$])')
_RECIPE: Final = re.compile(rb"^X-Recipe=([^\n]*)", re.MULTILINE)
_VARIABLES: Final = 4096  # of a site; more than `deployments.request` accepts
_WORDS: Final = 64
_UNIT: Final = Path(__file__).with_name("site.service").read_text()
_APART: Final = script("apart")


class _Said(BaseModel):
    """The recipe as stored in a unit, in a section that systemd ignores (systemd.unit(5), `X-`)."""

    start: Annotated[
        tuple[Annotated[str, Field(max_length=4096)], ...], Field(min_length=1, max_length=_WORDS)
    ]
    port: Annotated[int, Field(ge=1024, le=65535)]
    health: Annotated[str, Field(pattern=r"^/[!-~]*$", max_length=1024)]
    keep: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=_WORDS)] = ()
    template: Annotated[str, Field(max_length=63)] = ""


def unit_path(side: Side) -> str:
    """Return the path of a side's unit in the container; that of `next` is gone after a restart."""
    return f"{_FOLDERS[side]}/{NAMES[side]}"


def environment_path(side: Side) -> str:
    """Return the path of a side's environment file in the container."""
    return _ENVIRONMENTS[side]


def beside(settings: Settings, what: str) -> str:
    """Return a path beside the workspace, in a folder of root, where the tenant's user cannot put a link."""
    folder, _, name = settings.workspace.rpartition("/")
    return f"{folder}/.{name}-{what}"


def unit(settings: Settings, recipe: Recipe, side: Side) -> str:
    """Return the text of a side's unit."""
    workspace, port = settings.workspace, recipe.listens(side)
    # overrides a PORT in the site's environment: the gateway expects it here
    command = unit_words(("/usr/bin/env", f"PORT={port}", *recipe.command(port)))
    # sides that never run at the same time share an environment
    environment, more = _ENVIRONMENTS["live" if recipe.alone else side], ""
    if side == "next":
        # its folder appears at the live one's path, so that absolute paths stay valid when it becomes live
        more = f"BindPaths={beside(settings, 'next')}:{workspace}\nPrivatePIDs=yes\nCPUWeight=20\n"
        command = f"!{unit_words(('/bin/sh', '-c', _APART, 'sh', settings.workspace_user))} {command}"
    return _UNIT.format(
        allowed=ALLOWED,
        share=SITE_SHARE,
        user=settings.workspace_user,
        workspace=workspace,
        port=port,
        environment=environment,
        command=command,
        more=more,
        recipe=_written(recipe),
    )


def recipe_of(text: bytes) -> Recipe | None:
    """Return the recipe stored in a unit, None if there is no valid one. The tenant controls the text."""
    found = _RECIPE.search(text)
    try:
        said = None if found is None else _Said.model_validate_json(found[1])
    except ValidationError:
        return None
    if said is None:
        return None
    return Recipe(b"", said.start, said.port, said.health, keep=said.keep, template=said.template)


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
    """Format variables for systemd's EnvironmentFile (systemd.exec(5)): quoted, one per line."""
    lines = []
    for name, value in env.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def environment_of(text: str) -> dict[str, str]:
    """Parse a systemd EnvironmentFile. Raises `ValueError`.

    Unlike systemd, it does not accept values that are only partly quoted.
    """
    found, at, entries = dict[str, str](), 0, 0
    while at < len(text):
        entry = _ENTRY.match(text, at)
        entries += 1
        if entry is None or entry.end() == at or entries > _VARIABLES:
            raise ValueError("not an environment file of a site")
        at = entry.end()
        if entry["name"] is not None:
            quoted, literal, plain = entry["quoted"], entry["literal"], entry["plain"]
            if quoted is not None:
                found[entry["name"]] = _ESCAPED.sub(r"\1", quoted)
            else:
                found[entry["name"]] = literal if literal is not None else plain.strip(" \t")
    return found


def unit_words(argv: Sequence[str]) -> str:
    """Format a command for ExecStart= (systemd.service(5)): quoted, so that nothing is expanded."""
    words = []
    for word in argv:
        escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        words.append('"' + escaped.replace("\n", "\\n") + '"')
    return " ".join(words)
