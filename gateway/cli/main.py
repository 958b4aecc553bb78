"""The command line: reads arguments, calls the room that knows, prints for people or as JSON.

Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` ends with the command's own. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import termios
import traceback
import tty
from collections.abc import AsyncIterator, Coroutine, Iterator
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.table import Table

from gateway import __version__
from gateway import settings as settings_module
from gateway.auth import tokens
from gateway.auth.revocations import Revocations
from gateway.cli.progress import Progress, follow, template_argument
from gateway.errors import ExecFailed, GatewayError, InvalidParams, NotFound
from gateway.hostnames import DomainReserved, normalized, own_names, reserved
from gateway.runtime import TENANT_NAME
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from gateway.storage.store import Store
from gateway.terminal import Lines, copy, encoded, err, out, set_in
from gateway_client import Client, DeploymentRecord, Disconnected, Exec, Token

app = typer.Typer(
    name="incus-gateway",
    help="One websocket in front of Incus tenant containers: commands, file tools, deploys, events.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
image_app = typer.Typer(no_args_is_help=True, help="The tenants' base image.", rich_markup_mode=None)
app.add_typer(image_app, name="image")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="GATEWAY_URL", help="The gateway to ask; default: this machine's."),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="GATEWAY_TOKEN", help="A token; default: one made from this machine's secret."
    ),
]


class _Refused(Exception):
    """The person at the terminal did not say yes."""


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Step(StrEnum):
    ATTACH = "attach"
    COPY = "copy"
    SWITCH = "switch"
    FINISH = "finish"


TenantName = Annotated[str, typer.Argument(metavar="TENANT")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def main() -> NoReturn:
    """Run the command line; failures end as one line and exit code 1."""
    try:
        app()
    except Disconnected as error:
        _fail(
            f"{error.message}\nIs the gateway running? `incus-gateway serve` starts it; --url names another."
        )
    except ExecFailed as error:
        _fail(error.message, int(error.facts.get("exitCode", 1)))
    except GatewayError as error:
        _fail(error.message)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            err.say(f"setting GATEWAY_{name}: {problem['msg']}")
        sys.exit(1)
    except PermissionError as error:
        _fail(f"{error.strerror}: {error.filename}; run it as root")
    except _Refused as refused:
        _fail(str(refused))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # a fault of ours; what it names may be a tenant's
        err.say(set_in(traceback.format_exc()))
        sys.exit(1)
    sys.exit(0)


def _fail(message: str, code: int = 1) -> NoReturn:
    err.say(f"incus-gateway: {set_in(message)}")
    sys.exit(code)


def _version(show: bool) -> None:
    if show:
        out.say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def _settings_help() -> str:
    lines = ["Settings, as environment variables or in the TOML file that GATEWAY_CONFIG names:", ""]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f" [{field.default}]"
        lines.append(f"GATEWAY_{name.upper()}{default}: {field.description}\n")
    return "\n".join(lines)


# --- the gateway --------------------------------------------------------------------------------------


@app.command(epilog=_settings_help())
def serve(
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Serve until SIGTERM."""
    from gateway.server import serve as run  # uvicorn and uvloop are for this command alone

    run(settings_module.load(), log_level=log_level)


@app.command()
def broker() -> None:
    """Start file workers, end command trees and bind ports for a gateway without root, until SIGTERM.

    It listens at GATEWAY_BROKER_SOCKET, for root and the user GATEWAY_BROKER_USER.
    """
    from gateway.host.broker_service import run

    run(settings_module.load(), err.say)


@app.command()
def setup(
    as_json: Json = False,
) -> None:
    """Prepare this host: network, firewall, storage, tenant profile. Idempotent."""
    from gateway.host.setup import setup as run

    changes = run(settings_module.load(), _silent if as_json else out.say)
    if as_json:
        out.json([{"step": c.step, "changed": c.changed, "detail": c.detail} for c in changes], indent=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look whether the gateway has what it needs here, and runs; change nothing. Exit code 1 where not."""
    from gateway.host.doctor import doctor as run

    found = run(settings_module.load())
    if as_json:
        out.json(
            [{"what": f.what, "ok": f.ok, "detail": f.detail, "hint": f.hint} for f in found], indent=True
        )
    else:
        for finding in found:
            out.say(str(finding))
    if not all(finding.ok for finding in found):
        raise typer.Exit(1)


@app.command()
def capacity(as_json: Json = False) -> None:
    """Say how many more tenants of each size this host takes, and what is used up first."""
    from gateway.limits.capacity import host_memory, lines, look

    async def run() -> None:
        settings = settings_module.load()
        async with IncusRuntime(settings) as runtime:
            report = await look(runtime, settings, host_memory())
        if as_json:
            out.json(report.to_dict(), indent=True)
        else:
            for line in lines(report):
                out.say(line)

    _run(run())


@image_app.command("build")
def image_build(
    rebuild: Annotated[
        bool, typer.Option(help="Build it anew even if this definition was built before.")
    ] = False,
) -> None:
    """Build the base image and import it into Incus."""
    from gateway.host.image import build

    build(settings_module.load(), out.say, rebuild=rebuild)


@app.command()
def token(
    tenant: Annotated[
        list[str] | None, typer.Option(help="A tenant it covers; repeat for more; * for all.")
    ] = None,
    scope: Annotated[
        list[str], typer.Option(help="Space-separated or repeated: " + " ".join(sorted(tokens.SCOPES)))
    ] = ["files:read files:write exec events"],  # noqa: B006 - typer copies it
    ttl: Annotated[str, typer.Option(help="How long it is valid: 15m, 12h, 30d")] = "12h",
    subject: Annotated[str, typer.Option(help="Whom it is for; shows in events")] = "operator",
    domain: Annotated[
        list[str] | None,
        typer.Option(help="A domain its tenants may be given, or *.suffix; repeat for more."),
    ] = None,
    revoke: Annotated[
        str | None, typer.Option(metavar="ID", help="Take one back instead: its jti, or the token itself")
    ] = None,
    url: Url = None,
    own: TokenOption = None,
) -> None:
    """Print a token. The tenants need not exist."""
    if (tenant is None) == (revoke is None):
        raise typer.BadParameter("give --tenant, or --revoke")
    if revoke is not None:
        _run(_revoke(tokens.token_id(revoke), url, own))
        return
    secret = tokens.load_secret(settings_module.load())
    scopes = " ".join(scope).replace(",", " ").split()
    out.say(tokens.issue(secret, subject, tenant or (), scopes, tokens.parse_ttl(ttl), domain or None))


async def _revoke(id_: str, url: str | None, own: str | None) -> None:
    try:
        async with _client(url, own) as client:
            await client.revoke(id_)
    except Disconnected:
        if url is not None:
            raise
        # no gateway runs here: the next one will know
        async with Store(settings_module.load().state_dir) as store:
            await (await Revocations.opened(store)).add(id_, os.environ.get("USER", "operator"))


@app.command()
def audit(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant")] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, max=1000, help="How many")] = 50,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Show who did what, the latest last."""

    async def run() -> None:
        async with _client(url, token) as client:
            entries = (await client.audit(tenant, limit=lines))[::-1]
        if as_json:
            out.json(entries, indent=True)
            return
        table = Table("time", "who", "did", "tenant", "", box=None, pad_edge=False)
        for entry in entries:
            at = datetime.fromtimestamp(entry["time"]).isoformat(" ", "seconds")
            facts = " ".join(f"{key}={value}" for key, value in entry["facts"].items())
            table.add_row(at, entry["who"], entry["action"], entry["tenant"] or "-", facts)
        out.print(table)

    _run(run())


# --- tenants ------------------------------------------------------------------------------------------


@app.command()
def create(
    tenant: TenantName,
    domain: Annotated[str | None, typer.Option(help="The domain of its site")] = None,
) -> None:
    """Create a tenant from the base image and start it."""
    if not TENANT_NAME.fullmatch(tenant):
        raise InvalidParams(
            f"{tenant!r} is no tenant name: lower-case letters, digits and dashes, 63 at most"
        )
    settings = settings_module.load()
    given = None if domain is None else normalized(domain)
    if given is not None and reserved(given, own_names(settings)):
        raise DomainReserved(given)

    async def run() -> None:
        runtime_type = IncusRuntime if settings.runtime == "incus" else LocalRuntime
        async with runtime_type(settings) as runtime:
            made = await runtime.create(tenant, domain=given)
        out.say(f"{made.name} is {made.status}")

    asyncio.run(run())


@app.command()
def deploy(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="shop.example.com")],
    template: Annotated[str, typer.Option(help="A folder with a site.toml, or the name of a template")],
    size: Annotated[Size, typer.Option(help="Of a new tenant")] = Size.SMALL,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the site; may be repeated")] = None,
    tenant: Annotated[str | None, typer.Option(help="The tenant; default: made of the domain")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Bring a domain to a site that answers, or update it. Ctrl-C cancels and undoes it."""
    what = template_argument(template, settings_module.load())
    variables = dict(_assignment(entry) for entry in env) if env else None

    async def run() -> DeploymentRecord:
        async with _client(url, token) as client:
            begun = await client.deploy(domain, what, size=size.value, env=variables, tenant=tenant)
            if as_json:
                return await follow(begun, out.json)
            with Progress(out, domain) as progress:
                return await follow(begun, progress.told)

    record = _run(run())
    if record.error is not None:
        where = record.error.facts.get("phase", "deploy")
        _fail(f"{where}: {record.error.message}\nEverything that was done is undone.")
    if not as_json:
        out.say(f"{record.url} is up, after {(record.ms or 0) / 1000:.2f} s")


@app.command()
def migrate(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="shop.example.com")],
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="Where the site lives; to begin with")
    ] = None,
    unit: Annotated[str | None, typer.Option(help="The systemd unit that runs it")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done; change nothing")] = False,
    until: Annotated[Step, typer.Option(help="The step to stop after")] = Step.SWITCH,
    finish: Annotated[bool, typer.Option("--finish", help="As --until finish: no way back after it")] = False,
    back: Annotated[bool, typer.Option("--back", help="Undo the last step instead")] = False,
    port: Annotated[int | None, typer.Option(help="Where it listens, if at more than one")] = None,
    size: Annotated[Size, typer.Option(help="Of the tenant")] = Size.SMALL,
    start: Annotated[str | None, typer.Option(help="Its command in the tenant; default: as it runs")] = None,
    install: Annotated[
        str | None, typer.Option(help="A command that makes node_modules anew, such as 'bun install'")
    ] = None,
    health: Annotated[str, typer.Option(help="The path that must answer")] = "/",
    env: Annotated[list[str] | None, typer.Option(help="A variable to take over; without --unit")] = None,
    leave: Annotated[list[str] | None, typer.Option(help="A path in the folder that is not copied")] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Move a site from a folder of this host into a tenant: attach, copy, switch, finish. Root's."""
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
        raise typer.BadParameter("--plan takes --from FOLDER")

    async def run() -> None:
        async with opened(settings_module.load(), domain, _silent if as_json else out.say) as migration:
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
                out.say(f"{domain}: {state or ('nothing of it is left' if back else 'moved')}")

    _run(run())


@app.command("list")
def list_tenants(as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """List the tenants."""

    async def run() -> None:
        async with _client(url, token) as client:
            found = await client.tenants()
        if as_json:
            out.json([info.all for info in found], indent=True)
            return
        table = Table(box=None, pad_edge=False)
        for column in ("tenant", "status", "address", "domain", "memory", "created"):
            table.add_column(column)
        for info in found:
            memory, created = info.all["limits"].get("memory"), info.all["created"] or ""
            table.add_row(
                info.name,
                "asleep" if info.all["asleep"] else info.status,
                *(info.address or "-", info.domain or "-"),
                memory or "-",
                created[:19],
            )
        out.print(table)

    _run(run())


def _lifecycle(action: str, help_text: str) -> None:
    @app.command(action, help=help_text)
    def command(tenant: TenantName, url: Url = None, token: TokenOption = None) -> None:
        async def run() -> None:
            async with _client(url, token) as client:
                target = client.tenant(tenant)
                await getattr(target, action)()

        _run(run())


_lifecycle("start", "Start a tenant.")
_lifecycle("stop", "Stop a tenant.")
_lifecycle("restart", "Restart a tenant.")


@app.command()
def destroy(tenant: TenantName, yes: Yes = False, url: Url = None, token: TokenOption = None) -> None:
    """Destroy a tenant and everything of it. Asks first; where nobody can be asked it wants --yes."""
    if not yes and not _somebody_is_there():
        err.say(
            f"incus-gateway: nothing was destroyed: there is no terminal to ask at; to destroy {tenant} with "
            f"all its files and snapshots, say it: incus-gateway destroy {tenant} --yes"
        )
        raise typer.Exit(2)

    async def run() -> None:
        async with _client(url, token) as client:
            target = client.tenant(tenant)
            if not yes:
                domain = (await target.info())["domain"]
                kept = len(await target.snapshots())
                what = [*([domain] if domain else []), f"{kept} snapshot{'' if kept == 1 else 's'}"]
                question = f"Destroy {tenant} ({', '.join(what)})? Its files are gone for good."
                await asyncio.to_thread(_ask, question, "nothing was destroyed")
            await target.delete()

    _run(run())


SnapshotName = Annotated[str, typer.Argument(metavar="SNAPSHOT")]


@app.command()
def snapshot(
    tenant: TenantName,
    name: Annotated[str | None, typer.Argument(help="Its name; default: the time")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List what there is instead")] = False,
    delete: Annotated[str | None, typer.Option(metavar="SNAPSHOT", help="Delete one instead")] = None,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Keep a tenant's disk as it is now."""
    if (name is not None) + list_ + (delete is not None) > 1:
        raise typer.BadParameter("NAME, --list and --delete exclude one another")

    async def run() -> None:
        async with _client(url, token) as client:
            target = client.tenant(tenant)
            if delete is not None:
                await target.delete_snapshot(delete)
                return
            kept = await target.snapshots() if list_ else [await target.snapshot(name)]
        if as_json:
            out.json(kept if list_ else kept[0], indent=True)
        elif list_:
            table = Table("snapshot", "created", box=None, pad_edge=False)
            for entry in kept:
                table.add_row(entry["name"], (entry["created"] or "")[:19])
            out.print(table)
        else:
            out.say(kept[0]["name"])

    _run(run())


@app.command()
def restore(
    tenant: TenantName,
    snapshot: SnapshotName,
    yes: Yes = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Make a tenant's disk what it was; stops the tenant, and starts it again if it ran.

    At a terminal it asks first.
    """

    async def run() -> None:
        async with _client(url, token) as client:
            if not yes and _somebody_is_there():
                question = f"Make the disk of {tenant} what it was at {snapshot}? What it has since is gone."
                await asyncio.to_thread(_ask, question, "nothing was changed")
            await client.tenant(tenant).restore(snapshot)

    _run(run())


@app.command()
def clone(
    tenant: TenantName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new tenant's name")],
    snapshot: Annotated[str | None, typer.Option(help="Of this snapshot, not of the disk as it is")] = None,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Make a tenant whose disk is a copy of another's; it has no domain until it is given one."""

    async def run() -> None:
        async with _client(url, token) as client:
            await client.tenant(tenant).clone(new, snapshot)

    _run(run())


@app.command()
def rename(
    tenant: TenantName,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The new domain; - for none")],
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Give a tenant another domain; its name stays."""

    async def run() -> None:
        async with _client(url, token) as client:
            await client.tenant(tenant).rename(None if domain == "-" else domain)

    _run(run())


@app.command()
def resize(
    tenant: TenantName,
    size: Annotated[Size, typer.Argument(metavar="SIZE", help="small, medium or large")],
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Give a tenant the limits of another size, up or down, while it runs."""

    async def run() -> None:
        async with _client(url, token) as client:
            now = await client.tenant(tenant).resize(size.value)
        limits = " ".join(f"{name} {value}" for name, value in now["limits"].items() if value)
        out.say(f"{tenant} is {size.value}: {limits}")

    _run(run())


@app.command()
def logs(
    tenant: TenantName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines")] = 100,
    raw: Annotated[
        bool, typer.Option("--raw", help="Every byte as the site wrote it; not to a terminal")
    ] = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Print the log of a tenant's site, without what would steer a terminal."""
    if raw and sys.stdout.isatty():
        raise typer.BadParameter("--raw is for a pipe or a file: a log's bytes can steer a terminal")

    async def run() -> None:
        shown = Lines()
        # a stream that is followed goes by the token that it began with
        async with _client(url, token, 30 * 86400 if follow else 3600) as client:
            async for piece in client.tenant(tenant).logs(lines, follow):
                await asyncio.to_thread(copy, piece if raw else shown.cleaned(piece))
        copy(shown.cleaned(b"", last=True))

    _run(run())


@app.command()
def metrics(tenant: TenantName, as_json: Json = False, url: Url = None, token: TokenOption = None) -> None:
    """Show what a tenant uses."""

    async def run() -> None:
        async with _client(url, token) as client:
            answer = await client.tenant(tenant).metrics()
        if as_json:
            out.json(answer, indent=True)
            return
        for name, value in answer.items():
            out.say(f"{name:22} {value}")

    _run(run())


@app.command()
def events(
    tenant: Annotated[list[str] | None, typer.Option(help="Only of these tenants")] = None,
    type: Annotated[
        list[str] | None, typer.Option(help="Only of these types; * at the end is a prefix")
    ] = None,
    last_event_id: Annotated[int | None, typer.Option(help="Begin after this id")] = None,
    as_json: Json = False,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Follow what happens, until interrupted."""

    async def run() -> None:
        async with (
            _client(url, token) as client,
            client.events(tenant=tenant or None, types=type or None, last_event_id=last_event_id) as stream,
        ):
            async for event in stream:
                if as_json:
                    about = {"id": event.id, "type": event.type, "tenant": event.tenant}
                    out.json(about | {"time": event.time, "data": event.data})
                else:
                    who = event.tenant or "-"
                    out.say(f"{event.time}  {event.type:24} {who:20} {encoded(event.data)}")

    _run(run())


# --- commands in tenants ------------------------------------------------------------------------------


@app.command(context_settings={"allow_interspersed_args": False})
def exec(
    tenant: TenantName,
    command: Annotated[list[str], typer.Argument(metavar="[--] CMD…", help="The program and its arguments")],
    terminal: Annotated[bool, typer.Option("-t", "--tty", help="Run it on a terminal")] = False,
    cwd: Annotated[str | None, typer.Option(help="Folder; default: the workspace")] = None,
    user: Annotated[str | None, typer.Option(help="User; default: the workspace's owner")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be repeated")] = None,
    url: Url = None,
    token: TokenOption = None,
) -> None:
    """Run a command in a tenant: streams both ways, forwards signals, ends with its exit code."""
    argv = command[1:] if command and command[0] == "--" else command
    if not argv:
        raise typer.BadParameter("name a command after --")
    variables = dict(_assignment(entry) for entry in env or ())
    pty = _terminal_size() if terminal else None

    async def run() -> int:
        async with (
            _client(url, token) as client,
            client.tenant(tenant).exec(
                argv, cwd=cwd, user=user, env=variables, pty=pty, stdin=True
            ) as process,
        ):
            return await _attend(process, terminal)

    with _raw_terminal() if terminal else contextlib.nullcontext():
        code = _run(run())
    sys.exit(code)


async def _attend(process: Exec, terminal: bool) -> int:
    """Copy standard input, output and signals between us and the command; return its exit code."""
    loop = asyncio.get_running_loop()
    waiting: set[asyncio.Task[Any]] = set()

    def later(work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        waiting.add(task)
        task.add_done_callback(waiting.discard)

    interrupts = 0

    def interrupted(name: str) -> None:
        # the second Ctrl-C means it: the whole tree goes
        nonlocal interrupts
        interrupts += 1
        later(process.signal(name) if interrupts == 1 else process.cancel())

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupted, number.name.removeprefix("SIG"))
    if terminal and sys.stdin.isatty():

        def resized() -> None:
            later(process.resize(*_terminal_size()))

        loop.add_signal_handler(signal.SIGWINCH, resized)

    async def copy_output() -> None:
        async for name, chunk in process.output():
            # a pipe that nobody reads holds us back, and so the command
            await asyncio.to_thread(copy, chunk, to_stderr=name == "stderr")

    feeding = asyncio.create_task(_feed(process))
    try:
        await copy_output()
        exit_ = await process.wait()
    finally:
        for task in (feeding, *waiting):
            task.cancel()
        await asyncio.gather(feeding, *waiting, return_exceptions=True)
    if exit_.reason == "lost" or exit_.code is None:
        raise NotFound("the command's exit was lost: the tenant or Incus went away")
    return exit_.code


async def _feed(process: Exec) -> None:
    """Give the command our standard input until its end."""
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()
    while True:
        readable = asyncio.Event()
        try:
            loop.add_reader(descriptor, readable.set)
        except OSError:  # a plain file is always readable, and epoll refuses it
            readable.set()
        try:
            await readable.wait()
        finally:
            with contextlib.suppress(OSError):
                loop.remove_reader(descriptor)
        data = os.read(descriptor, 65536)
        if not data:
            await process.close_stdin()
            return
        await process.write(data)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin, termios.TCSADRAIN)  # what was typed ahead stays
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _terminal_size() -> tuple[int, int]:
    """Return our terminal's columns and rows; the usual ones where it has none."""
    try:
        columns, rows = os.get_terminal_size(sys.stdin.fileno())
    except OSError:
        return 80, 24
    return columns or 80, rows or 24


def _assignment(entry: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"--env takes NAME=VALUE, not {entry!r}")
    return name, value


# --- asking the gateway -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _client(url: str | None, token: str | None, life: int = 3600) -> AsyncIterator[Client]:
    """Open a client of the named gateway, or of this machine's with tokens of our own of so many seconds."""
    settings = settings_module.load()
    source: Token = partial(_own_token, tokens.load_secret(settings), life) if token is None else token
    async with Client(url or own_url(settings.listen), token=source) as client:
        yield client


def _own_token(secret: str, life: int) -> str:
    return tokens.issue(secret, os.environ.get("USER", "operator"), ["*"], sorted(tokens.SCOPES), life)


def own_url(listen: str) -> str:
    """Return the URL of a gateway of this machine that listens there."""
    return f"unix:{listen}" if "/" in listen else f"http://{listen}"


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    with contextlib.suppress(BrokenPipeError):
        return asyncio.run(work)


def _somebody_is_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _ask(question: str, otherwise: str) -> None:
    """Return once the person at the terminal says yes; end the program where they do not."""
    err.print(f"{question} [y/N]", end=" ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise _Refused(otherwise)


def _silent(line: str) -> None:
    pass
