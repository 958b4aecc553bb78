"""`python -m gateway` by a fork of a process that has imported the gateway already.

To start Python and import the gateway's modules takes half a second of CPU, more than most tests. So this is
what `multiprocessing.forkserver` does for functions, for the gateway's command line: one server for all tests
of a process, started with the first fork. The fork has the words, environment, folder and standard files that
it is given, and no others; `tests/unit/test_forks.py` compares it with a process that is started as usual.

As a server this module is run by itself, with the number of the socket on which it is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import io
import json
import mmap
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TextIO

from tests import constants

PROGRAM: Final = (sys.executable, "-m", "gateway")
_ROOT: Final = Path(__file__).parents[1]
_REQUEST_MAX: Final = 1 << 16
# what Python and its libraries read while they are imported is the server's: only in these may a fork differ
_READ_LATER: Final = frozenset({"PATH", "HOME", "USER", "LOGNAME"})
_OURS: Final = "GATEWAY_"
# linux/prctl.h
_PR_SET_MM, _PR_SET_MM_MAP, _NO_FILE = 35, 14, (1 << 32) - 1


class Forked:
    """A process that was forked for us, with what tests use of `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, pidfd: int, told: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(told, self._end)

    def _end(self) -> None:
        code = self._told.recv(_REQUEST_MAX)
        self._loop.remove_reader(self._told)
        self._told.close()
        os.close(self._pidfd)
        if code:
            self.returncode = int(code)
            self._ended.set_result(self.returncode)
        else:
            self._ended.set_exception(ChildProcessError("who forked it has ended"))

    async def wait(self) -> int:
        """Wait for its end and return its exit code; of a signal, the negative number."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int) -> None:
        """Send a signal. Raises `ProcessLookupError` if it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Server:
    """The process that forks, and our socket to it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # with an environment as empty as a gateway's, of which Python chooses the encodings
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env={"PATH": os.environ["PATH"]},
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )

    def close(self) -> None:
        self.socket.close()
        self._process.wait()


_server: _Server | None = None
enabled = True  # by `conftest`: whether the test may do with a fork
_shown: list[mmap.mmap] = []  # what the kernel shows must stay where it is


def can_start(environment: Mapping[str, str]) -> bool:
    """Return whether a fork may be used, and does as a process that is started with this environment."""
    return (
        enabled
        and sys.platform == "linux"
        and all(name in _READ_LATER or name.startswith(_OURS) for name in environment)
    )


async def start(
    *words: str, environment: Mapping[str, str], stdin: int = 0, stdout: int = 1, stderr: int = 2
) -> Forked:
    """Start `python -m gateway` with these words. The files are descriptors, by default our own."""
    global _server
    if _server is None:
        _server = _Server()
    asked = {"words": words, "environment": dict(environment), "folder": os.getcwd()}
    told, theirs = socket.socketpair()
    try:
        with theirs:
            files = (stdin, stdout, stderr, theirs.fileno())
            socket.send_fds(_server.socket, [json.dumps(asked).encode()], files)
        # its first fork waits for all imports
        pid, (pidfd,), _, _ = await asyncio.to_thread(socket.recv_fds, told, _REQUEST_MAX, 1)
        os.set_inheritable(pidfd, False)
        return Forked(int(pid), pidfd, told)
    except BaseException:
        told.close()
        raise


async def run(*words: str, environment: Mapping[str, str], stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run `python -m gateway` with these words; return its exit code, output and errors."""
    with contextlib.ExitStack() as stack:

        def pipe() -> tuple[BinaryIO, BinaryIO]:
            reading, writing = os.pipe()
            return stack.enter_context(open(reading, "rb")), stack.enter_context(open(writing, "wb"))

        (given, giving), (getting, got), (hearing, heard) = pipe(), pipe(), pipe()

        def give() -> None:
            with contextlib.suppress(BrokenPipeError), giving:
                giving.write(stdin)

        ends = {"stdin": given, "stdout": got, "stderr": heard}
        numbers = {name: end.fileno() for name, end in ends.items()}
        process = await start(*words, environment=environment, **numbers)
        for end in ends.values():
            end.close()
        try:
            _, out, err = await asyncio.gather(
                asyncio.to_thread(give), asyncio.to_thread(getting.read), asyncio.to_thread(hearing.read)
            )
            return await process.wait(), out, err
        finally:
            if process.returncode is None:
                process.kill()


def end() -> None:
    """End the server, if there is one. What it forked goes on."""
    global _server
    if _server is not None:
        _server.close()
        _server = None


# --- the server ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Start:
    words: list[str]
    environment: dict[str, str]
    folder: str


def _serve(asking: socket.socket) -> _Start | None:
    """Fork whenever asked, and tell how each fork ends. Return in a fork, or once nobody can ask any more."""
    forks: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the process
    poll = select.poll()
    poll.register(asking, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != asking.fileno():
                poll.unregister(ready)
                pid, asker = forks.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with asker, contextlib.suppress(OSError):
                    asker.send(str(code).encode())
                os.close(ready)
                continue
            message, files, _, _ = socket.recv_fds(asking, _REQUEST_MAX, 4)
            if not message:
                return None
            asker = socket.socket(fileno=files.pop())
            if (pid := os.fork()) == 0:
                for descriptor in (asking, asker, *(other for _, other in forks.values())):
                    descriptor.close()
                for other in forks:
                    os.close(other)
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
                return _Start(**json.loads(message))
            for file in files:
                os.close(file)
            pidfd = os.pidfd_open(pid)
            forks[pidfd] = (pid, asker)
            poll.register(pidfd, select.POLLIN)
            with contextlib.suppress(OSError):
                socket.send_fds(asker, [str(pid).encode()], [pidfd])


def _become(start: _Start) -> None:
    """Make this process what `PROGRAM` with these words, environment and folder would be."""
    os.chdir(start.folder)
    words = [*PROGRAM, *start.words]
    _show(words, start.environment)
    # what Python itself adds, where no locale is set
    coerced = {name: value for name, value in os.environ.items() if name == "LC_CTYPE"}
    os.environ.clear()
    os.environ.update(coerced | start.environment)
    sys.orig_argv[:] = words
    sys.argv[1:] = start.words
    sys.path[0] = start.folder
    sys.stdin = sys.__stdin__ = _opened(0, sys.stdin)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _opened(1, sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _opened(2, sys.stderr)  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _opened(number: int, like: TextIO) -> io.TextIOWrapper:
    """Return a standard file as Python opens it when it starts."""
    return open(
        number,
        "r" if number == 0 else "w",
        buffering=1 if number == 2 or os.isatty(number) else -1,
        encoding=like.encoding,
        errors=like.errors,
        closefd=False,
    )


class _Map(ctypes.Structure):
    """`struct prctl_mm_map` of linux/prctl.h: where the kernel finds the parts of a process's memory."""

    _fields_ = [
        *((f"{end}_{part}", ctypes.c_uint64) for part in ("code", "data") for end in ("start", "end")),
        *((name, ctypes.c_uint64) for name in ("start_brk", "brk", "start_stack")),
        *((f"{part}_{end}", ctypes.c_uint64) for part in ("arg", "env") for end in ("start", "end")),
        ("auxv", ctypes.c_void_p),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    ]


def _show(words: list[str], environment: Mapping[str, str]) -> None:
    """Have the kernel show these as command line and environment of this process: PR_SET_MM of prctl(2)."""
    said = "".join(f"{word}\0" for word in words).encode()
    given = "".join(f"{name}={value}\0" for name, value in environment.items()).encode()
    memory = mmap.mmap(-1, len(said) + len(given), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(said + given)
    _shown.append(memory)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    # proc_pid_stat(5), from its fourth field on
    stat = [int(field) for field in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1:]]
    code, stack, data = stat[22:24], stat[24], stat[41:44]
    middle = at + len(said)
    parts = (*code, *data, libc.sbrk(0), stack, at, middle, middle, middle + len(given), None, 0, _NO_FILE)
    own = _Map(*parts)
    if libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.byref(own), ctypes.c_ulong(ctypes.sizeof(own)), 0):
        raise OSError(ctypes.get_errno(), "cannot set what the kernel shows")


def _modules() -> Iterator[str]:
    """Yield the modules of all commands, and those of a gateway, which `serve` imports when it runs."""
    from gateway.cli.main import COMMANDS, CommandGroup, CommandTable, LazyCommand

    def of(table: CommandTable) -> Iterator[str]:
        for entry in table.values():
            match entry:
                case CommandGroup(_, commands):
                    yield from of(commands)
                case LazyCommand(function) | str(function):
                    yield function.partition(":")[0]

    yield from of(COMMANDS)
    yield "gateway.server"


def _main(number: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the tests, which ^C ends
    for module in _modules():
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # stays shared with the forks as long as nobody writes to it
    if (start := _serve(socket.socket(fileno=int(number)))) is not None:
        _become(start)
        constants.apply()
        runpy.run_module(PROGRAM[-1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1])
