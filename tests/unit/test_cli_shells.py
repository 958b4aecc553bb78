"""Completion and manual page as a host gets them, in real shells that load them by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import thorough
from tests.live import LiveGateway
from tests.unit.command_line import served

CHECKOUT = Path(__file__).parents[2]


class Installed:
    """A host with the command, its completions and its manual page, below a folder."""

    def __init__(self, gateway: LiveGateway, place: Path) -> None:
        self.bin, self.share, self.fish = place / "bin", place / "share", place / "fish"
        self.environment = {
            **gateway.environment,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(place),
            "XDG_DATA_DIRS": f"{self.share}:/usr/share",
            "TERM": "dumb",
        }
        self.bin.mkdir()
        command = self.bin / "incus-gateway"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway "$@"\n')
        command.chmod(0o755)

    def install(self) -> str:
        words = f". {CHECKOUT}/deploy/prepare.sh; install_texts incus-gateway {self.share} {self.fish}"
        done = subprocess.run(
            ["bash", "-c", words], env=self.environment, cwd=CHECKOUT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout


@pytest.fixture(scope="module")
async def host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installed]:
    async with served(tmp_path_factory.mktemp("state")) as gateway:
        host = Installed(gateway, tmp_path_factory.mktemp("host"))
        said = await asyncio.to_thread(host.install)
        assert said == "bash, zsh, fish, man\n"
        yield host


def _needs(program: str) -> None:
    if shutil.which(program) is None and not os.environ.get("CI"):
        pytest.skip(f"there is no {program} here")


async def offered(host: Installed, shell: list[str], setup: str, line: str, *wanted: str) -> str:
    """Type a line, Tabs included, at an interactive shell; return its screen once all wanted is there."""
    leader, follower = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *shell,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=host.environment,
        cwd=CHECKOUT,
        start_new_session=True,
    )
    os.close(follower)
    loop = asyncio.get_running_loop()
    screen, grown = bytearray(), asyncio.Event()

    def read() -> None:
        with contextlib.suppress(OSError):
            screen.extend(os.read(leader, 65536))
        grown.set()

    async def shows(*words: str) -> str:
        while True:
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode(errors="replace"))
            if all(word in text for word in words):
                return text
            grown.clear()
            await grown.wait()

    loop.add_reader(leader, read)
    try:
        async with asyncio.timeout(60):
            os.write(leader, f"{setup}; echo rea''dy\n".encode())
            await shows("ready")
            screen.clear()
            os.write(leader, line.encode())
            return await shows(*wanted)
    except TimeoutError:
        raise AssertionError(f"{wanted} is not offered: {screen.decode(errors='replace')}") from None
    finally:
        loop.remove_reader(leader)
        process.kill()
        await process.wait()
        os.close(leader)


LINES = [
    ("incus-gateway st", ("start", "stop")),
    ("incus-gateway exec de", ("exec demo",)),
    ("incus-gateway resize demo --u", ("--url",)),
    ("incus-gateway deploy x.test README", ("README.md",)),
]
# what is completed is the same code for all shells: each is asked once in CI, and at night for everything
LINES_OF_OTHERS = LINES if thorough.ALL else LINES[1:2]


@pytest.mark.parametrize(("line", "wanted"), LINES_OF_OTHERS)
async def test_zsh_completes(host: Installed, line: str, wanted: tuple[str, ...]) -> None:
    """From the first Tab on, loaded from a folder of its path."""
    _needs("zsh")
    setup = f"fpath=({host.share}/zsh/site-functions $fpath); autoload -Uz compinit; compinit -u -D"
    await offered(host, ["zsh", "-f", "-i"], setup, f"{line}\t", *wanted)


@pytest.mark.parametrize(("line", "wanted"), LINES)
async def test_bash_completes(host: Installed, line: str, wanted: tuple[str, ...]) -> None:
    setup = f". {host.share}/bash-completion/completions/incus-gateway; bind 'set bell-style none'"
    await offered(host, ["bash", "--norc", "--noprofile", "-i"], setup, f"{line}\t\t", *wanted)


@pytest.mark.parametrize(("line", "wanted"), LINES_OF_OTHERS)
async def test_fish_completes(host: Installed, line: str, wanted: tuple[str, ...]) -> None:
    _needs("fish")
    script = f"set fish_complete_path {host.fish}; complete -C '{line}'"
    done = await asyncio.create_subprocess_exec(
        *("fish", "--no-config", "-c", script),
        env=host.environment,
        cwd=CHECKOUT,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await asyncio.wait_for(done.communicate(), 60)
    for word in wanted:
        assert word.removeprefix("exec ") in said.decode()


async def test_the_manual_page_is_one(host: Installed) -> None:
    """With every command, and without a warning of the formatter."""
    page = host.share / "man" / "man1" / "incus-gateway.1"
    assert ".SS rollback" in page.read_text()
    _needs("man")
    done = await asyncio.to_thread(
        subprocess.run,
        ["man", "--warnings", "-l", str(page)],
        env={**host.environment, "MANROFFSEQ": "", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "" and "rollback" in done.stdout


def test_what_cannot_be_written_is_not_said(host: Installed, tmp_path: Path) -> None:
    """A folder that is a file keeps nothing from the rest, and a command that fails leaves nothing."""
    (tmp_path / "zsh").write_text("in the way")
    words = f". {CHECKOUT}/deploy/prepare.sh; install_texts incus-gateway {tmp_path} {tmp_path}/fish"
    run = ["bash", "-c", words]
    done = subprocess.run(run, env=host.environment, cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("bash, fish, man\n", "")
    words = f". {CHECKOUT}/deploy/prepare.sh; install_texts false {tmp_path}/new {tmp_path}/new/fish"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert done.stdout == "\n" and not [one for one in (tmp_path / "new").rglob("*") if one.is_file()]
