"""Commands that bring a site into a tenant from a folder or a template: deploy, publish and migrate."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import shlex
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from pydantic import ValidationError

from gateway import hostnames
from gateway.cli.deployments import Domain, ended, followed
from gateway.cli.invocation import (
    Json,
    Size,
    TokenOption,
    Url,
    Yes,
    assignment,
    client_of,
    tenant_of,
)
from gateway.deployments.archive import BYTES, FILES, LEFT_OUT, packed, read_folder
from gateway.deployments.template import MANIFEST, Overrides, SiteTemplate, checked, written
from gateway.errors import GatewayError, InvalidParams, TooLarge
from gateway.rootfs.paths import show
from gateway.settings import Settings, load
from gateway.terminal import line, out
from gateway.tools.globs import Rules, rules
from gateway_client import DeploymentRecord

_IGNORE_MAX: Final = 64 << 10  # bytes of an ignore file
_LOOKED_AT: Final = 200_000  # files and folders; a larger folder is not counted to its end


def names_template(given: str) -> bool:
    """Return whether `--template` gives the name of a template, not a folder."""
    return "/" not in given and not given.startswith(".") and not Path(given).is_dir()


class IgnoredFiles:
    """Whether the .gitignore files of a folder and its subfolders leave out a path; called for each.

    `named` lists what was left out, without the contents of folders; folders end with a slash.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rules: dict[str, Rules] = {}
        self.named: list[str] = []

    def __call__(self, path: str, is_folder: bool) -> bool:
        above = path
        while above:  # the innermost file decides
            above = above.rpartition("/")[0]
            inner = path[len(above) + 1 :] if above else path
            decided = self._of(above).decide(inner, folder=is_folder)
            if decided is not None:
                if decided and (name := f"{path}/" if is_folder else path) not in self.named:
                    self.named.append(name)
                return decided
        return False

    def _of(self, folder: str) -> Rules:
        if folder not in self._rules:
            text = b""
            with contextlib.suppress(OSError):
                descriptor = os.open(self._folder / folder / ".gitignore", os.O_RDONLY | os.O_NOFOLLOW)
                with os.fdopen(descriptor, "rb") as file:
                    text = file.read(_IGNORE_MAX)
            self._rules[folder] = rules(text.decode("utf-8", "replace"))
        return self._rules[folder]


def _measure(folder: Path, ignored: IgnoredFiles) -> None:
    """Raise `TooLarge` for a folder beyond the limits of a site, before any file is read."""
    sizes, files, pending = Counter[str](), 0, [""]
    while pending and files < _LOOKED_AT:
        at = pending.pop()
        with os.scandir(folder / at) as listed:
            for found in listed:
                path = f"{at}/{found.name}" if at else found.name
                is_folder = found.is_dir(follow_symlinks=False)
                if found.name in LEFT_OUT or ignored(path, is_folder):
                    continue
                files += 1
                top, below, _ = path.partition("/")
                if is_folder:
                    pending.append(path)
                    sizes[f"{top}/"] += 0
                else:
                    sizes[f"{top}/" if below else top] += found.stat(follow_symlinks=False).st_size
    size = sum(sizes.values())
    if size <= BYTES and files <= FILES:
        return
    largest = ", ".join(f"{show(name)} ({_size(has)})" for name, has in sizes.most_common(3))
    raise TooLarge(
        f"{folder} has {'' if files < _LOOKED_AT else 'over '}{_size(size)} in {files} files, and a site "
        f"may have at most {_size(BYTES)} in "
        f"{FILES} files. The largest are {largest}: list what the site "
        "does not need in .gitignore, and keep large files elsewhere",
        limit=BYTES,
    )


def _size(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def read_site(folder: Path, settings: Settings, overrides: Overrides) -> tuple[SiteTemplate, list[str]]:
    """Read a folder as the gateway will, so that mistakes show before anything is sent.

    Returns it, and the paths that .gitignore leaves out.
    """
    if not folder.is_dir():
        raise InvalidParams(f"{folder} is not a folder")
    ignored = IgnoredFiles(folder)
    try:
        _measure(folder, ignored)
        entries = read_folder(folder, ignored)
    except OSError as error:
        raise InvalidParams(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    try:
        return checked(str(folder), entries, shared=False, overrides=overrides), ignored.named
    except InvalidParams as error:
        # the gateway's own message has no folder to name
        error.message = error.message.replace(" DOMAIN FOLDER/", f" DOMAIN {folder}/")
        raise


def packed_site(template: SiteTemplate) -> bytes:
    """Return the archive of a folder, as it is sent."""
    return gzip.compress(packed(template.entries), 6, mtime=0)


def write_manifest(folder: Path, template: SiteTemplate) -> Path:
    """Write what was detected to the folder's manifest. Raises `InvalidParams` if it has one already."""
    path = folder / MANIFEST
    if template.detected is None or path.exists():
        raise InvalidParams(f"{path} exists already and says how the site is started; leave out --write")
    path.write_text(written(template.detected, template.manifest.port))
    return path


# --- commands -----------------------------------------------------------------------------------------------


_NAMED: Final = 6  # of what is left out


class Step(StrEnum):
    ATTACH = "attach"
    COPY = "copy"
    SWITCH = "switch"
    FINISH = "finish"


def deploy(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="shop.example.com")],
    folder: Annotated[
        str | None, typer.Argument(metavar="[FOLDER]", help="The site's folder; default: this one")
    ] = None,
    template: Annotated[str | None, typer.Option(help="The name of a template, or a folder")] = None,
    start: Annotated[
        str | None, typer.Option(help="Its command, such as 'node server.js'; default: detected")
    ] = None,
    install: Annotated[
        str | None, typer.Option(help="The command that installs it; '' for none; default: detected")
    ] = None,
    port: Annotated[int | None, typer.Option(help="The port it listens on; default: 3000")] = None,
    production: Annotated[
        bool,
        typer.Option("--production", help="Build it and serve the result, not its dev server."),
    ] = False,
    clean: Annotated[
        bool,
        typer.Option("--clean", help="Remove what the site has written into its folder, too."),
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Write what was detected to site.toml.")] = False,
    size: Annotated[Size, typer.Option(help="The size of a new tenant")] = Size.SMALL,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the site; may be repeated")] = None,
    tenant: Annotated[str | None, typer.Option(help="The tenant; default: derived from the domain")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Deploy a site at a domain, or update it, and wait until it answers. Ctrl-C cancels and undoes it.

    How the folder is installed and started is detected, unless its site.toml says so.
    """
    try:
        hostnames.normalized(domain)
    except GatewayError as error:
        if folder is None and template is None and Path(domain).is_dir():
            here = shlex.quote(domain)
            raise typer.BadParameter(f"the domain comes first: incus-gateway deploy DOMAIN {here}") from None
        raise typer.BadParameter(error.message) from None
    if folder is not None and template is not None:
        raise typer.BadParameter("give FOLDER or --template, not both")
    given = folder or template or "."
    mode: Literal["production"] | None = "production" if production else None
    overrides = _overrides(start, install, port, mode)
    if template is not None and names_template(template):
        if overrides.given or write:
            raise typer.BadParameter("--start, --install, --port, --production and --write are for a folder")
        what: str | bytes = template
    else:
        read, left = read_site(Path(given), load(), overrides)
        if left and not as_json:
            more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            out.say(f"left out, as .gitignore says: {', '.join(map(line, left[:_NAMED]))}{more}")
        if write:
            where = write_manifest(Path(given), read)
            if not as_json:
                out.say(f"wrote {where}")
        what = packed_site(read)
    variables = dict(assignment(entry) for entry in env) if env else None

    async def run() -> DeploymentRecord:
        async with client_of(url, token) as client:
            begun = await client.deploy(
                *(domain, what),
                size=size.value,
                env=variables,
                tenant=tenant,
                start=start,
                install=install,
                port=port,
                mode=mode,
                clean=clean,
            )
            return await followed(begun, domain, as_json=as_json)

    record = ended(run())
    if not as_json:
        out.say(f"{record.url} is up, after {(record.ms or 0) / 1000:.2f} s")


def publish(
    domain: Domain,
    at: Annotated[str, typer.Argument(metavar="AT", help="The domain to publish it at")],
    size: Annotated[Size, typer.Option(help="The size of a new tenant")] = Size.SMALL,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the published site; may be repeated")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Its tenant; default: derived from AT")] = None,
    start: Annotated[
        str | None, typer.Option(help="What serves it, such as 'node server.js'; default: detected")
    ] = None,
    install: Annotated[
        str | None, typer.Option(help="What installs and builds it; default: detected")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Build a site for production and serve the result at another domain. The site itself is unchanged.

    The published site has its own tenant and environment. Publish again to update it.
    """
    variables = dict(assignment(entry) for entry in env) if env else None
    _overrides(start, install, None, None)

    async def run() -> DeploymentRecord:
        async with client_of(url, token) as client:
            source = await tenant_of(client, domain)
            begun = await source.publish(
                at, size=size.value, env=variables, tenant=tenant, start=start, install=install
            )
            return await followed(begun, at, as_json=as_json)

    record = ended(run())
    if not as_json:
        out.say(f"{record.url} is published, after {(record.ms or 0) / 1000:.2f} s")


def _overrides(start: str | None, install: str | None, port: int | None, mode: str | None) -> Overrides:
    try:
        return Overrides.model_validate({"start": start, "install": install, "port": port, "mode": mode})
    except ValidationError as error:
        problem = error.errors()[0]
        raise typer.BadParameter(f"--{problem['loc'][0]}: {problem['msg']}") from None


def migrate(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="shop.example.com")],
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="The site's folder on this host; needed to begin"),
    ] = None,
    unit: Annotated[str | None, typer.Option(help="The systemd unit that runs it")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be done; change nothing")] = False,
    until: Annotated[Step, typer.Option(help="The step to stop after")] = Step.SWITCH,
    finish: Annotated[
        bool, typer.Option("--finish", help="Same as --until finish; it cannot be undone")
    ] = False,
    back: Annotated[bool, typer.Option("--back", help="Undo the last step instead")] = False,
    port: Annotated[int | None, typer.Option(help="The port of the site, if it listens on several")] = None,
    size: Annotated[Size, typer.Option(help="The tenant's size")] = Size.SMALL,
    start: Annotated[
        str | None, typer.Option(help="Its command in the tenant; default: the one it runs with now")
    ] = None,
    install: Annotated[
        str | None, typer.Option(help="A command that reinstalls node_modules, such as 'bun install'")
    ] = None,
    health: Annotated[str, typer.Option(help="The path that must answer")] = "/",
    env: Annotated[
        list[str] | None, typer.Option(help="A variable to take over, if there is no --unit")
    ] = None,
    leave: Annotated[list[str] | None, typer.Option(help="A path in the folder to leave out")] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Move a site from a folder of this host into a tenant: attach, copy, switch, finish. Needs root."""
    from gateway.migration import Wanted, opened

    def words(text: str | None) -> tuple[str, ...]:
        return tuple(shlex.split(text or ""))

    wanted = None
    if from_ is not None:
        wanted = Wanted(
            *(from_, unit, port, size.value, words(start), words(install), health),
            tuple(env or ()),
            tuple(path.strip("/") for path in leave or ()),
        )
    if plan and wanted is None:
        raise typer.BadParameter("--plan needs --from FOLDER")

    async def run() -> None:
        async with opened(load(), domain, _silent if as_json else out.say) as migration:
            if plan and wanted is not None:
                made = await migration.plan(domain, wanted)
                if as_json:
                    out.json(made.to_dict(), indent=True)
                else:
                    for line in made.lines():
                        out.say(line)
                return
            last = "finish" if finish else until.value
            state = await (
                migration.back(domain, sure=yes) if back else migration.forward(domain, wanted, last)
            )
            if as_json:
                out.json({"domain": domain, "state": state or None})
            else:
                out.say(f"{domain}: {state or ('everything is undone' if back else 'moved')}")

    asyncio.run(run())


def _silent(line: str) -> None:
    pass
