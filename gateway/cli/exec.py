"""`exec`: a command in a tenant as if it ran here, with streams, signals, terminal size and exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Coroutine, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gateway.cli.invocation import TenantName, TokenOption, Url, assignment, client_of, tenant_of
from gateway.errors import NotFound
from gateway.terminal import copy
from gateway_client.execution import Exec


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
    """Run a command in a tenant, pass on streams and signals, and exit with its exit code.

    Options come before the command; everything after its name belongs to the command.
    """
    argv = command[1:] if command and command[0] == "--" else command
    if not argv:
        raise typer.BadParameter("name a command after --")
    variables = dict(assignment(entry) for entry in env or ())
    pty = _terminal_size() if terminal else None

    async def run() -> int:
        async with client_of(url, token) as client:
            inside = await tenant_of(client, tenant)
            async with inside.exec(argv, cwd=cwd, user=user, env=variables, pty=pty, stdin=True) as process:
                return await _attend(process, terminal)

    with _raw_terminal() if terminal else contextlib.nullcontext():
        code = asyncio.run(run())
    sys.exit(code)


class Words(TyperCommand):
    """Accepts options after the tenant too: `exec TENANT --cwd /x -- ls`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        parser = self.make_parser(ctx)
        found, _, _ = parser.parse_args(list(args))
        given = list(found.get("command") or ())
        before = args[: len(args) - len(given) - 1]
        if given and given[0].startswith("-") and given[0] != "--" and "--" not in before:
            after, _, _ = parser.parse_args(list(given))
            command = [
                word for word in (after.get("tenant"), *(after.get("command") or ())) if word is not None
            ]
            moved = given[: len(given) - len(command)]
            if moved[-1] == "--":
                moved, command = moved[:-1], ["--", *command]
            args = [*before, *moved, str(found["tenant"]), *command]
        return super().parse_args(ctx, args)


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
        # to all processes, as a terminal's Ctrl-C does; a second one ends those that ignore the first
        nonlocal interrupts
        interrupts += 1
        later(process.signal(name, tree=True) if interrupts == 1 else process.cancel())

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupted, number.name.removeprefix("SIG"))
    if terminal and sys.stdin.isatty():

        def resized() -> None:
            later(process.resize(*_terminal_size()))

        loop.add_signal_handler(signal.SIGWINCH, resized)

    async def copy_output() -> None:
        async for name, chunk in process.output():
            # if nobody reads our output we block here, which slows down the command
            await asyncio.to_thread(copy, chunk, to_stderr=name == "stderr")

    feeding = asyncio.create_task(feed(process))
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


async def feed(process: Exec) -> None:
    """Send our standard input to the command until it ends."""
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
    tty.setraw(sys.stdin, termios.TCSADRAIN)  # keep what was typed ahead
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _terminal_size() -> tuple[int, int]:
    """Return our terminal's columns and rows, or the usual ones if it reports none."""
    try:
        columns, rows = os.get_terminal_size(sys.stdin.fileno())
    except OSError:
        return 80, 24
    return columns or 80, rows or 24
