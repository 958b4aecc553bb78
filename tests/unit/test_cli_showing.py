"""Commands that show and copy, as a person meets them; against a live local gateway."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import shutil
import stat
import tarfile
import typing
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from typer.testing import CliRunner

from gateway.auth import tokens
from gateway.cli import copying
from gateway.cli import main as cli
from gateway.cli.deployments import followed
from gateway.cli.main import CommandGroup
from gateway.errors import ExecFailed
from tests.live import SECRET, LiveGateway
from tests.unit.command_line import run, served, start
from tests.unit.test_cli_commands import ALL

WAYS_OUT = ("..", "../..", "/etc", "here/..", "here/../..", "../there/..", "folder/../..")


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    async with served(tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


async def test_one_tenant_is_shown(gateway: LiveGateway) -> None:
    await run(gateway, "rename", "demo", "shown.example.com")
    code, out, _ = await run(gateway, "info", "demo")
    said = dict(row.split(maxsplit=1) for row in out.decode().splitlines())
    assert code == 0 and said["status"] == "running" and said["snapshots"] == "0"
    assert said["url"].endswith("://shown.example.com") or "://shown.example.com:" in said["url"]
    found = orjson.loads((await run(gateway, "info", "demo", "--json"))[1])
    assert found["url"] == said["url"] and found["site"]["answers"] is None
    for name in ("demo", "shown.example.com"):  # into a pipe it is printed alone
        assert await run(gateway, "open", name) == (0, f"{said['url']}\n".encode(), "")
    measured = (await run(gateway, "metrics", "demo"))[1].decode()
    assert "{" not in measured and "processes" in measured
    await run(gateway, "rename", "demo", "-")
    code, _, err = await run(gateway, "open", "demo")
    assert code == 1 and "incus-gateway rename demo DOMAIN" in err
    code, _, err = await run(gateway, "open", "nobody")
    assert code == 1 and "`incus-gateway list` shows all" in err
    assert (await run(gateway, "info", "nobody"))[0] == 1
    assert "no tenant has the domain a..b" in (await run(gateway, "info", "a..b"))[2], "which demo has not"


def taking(of: str) -> Iterator[tuple[str, ...]]:
    """Every command that is about a tenant that is there, each with `of` for it."""
    yield ("cp", f"{of}:a", "b")
    yield ("cp", "-", f"{of}:a")
    for words, place in ALL.items():
        module, _, name = place.partition(":")
        function = getattr(import_module(module), name)
        hints = typing.get_type_hints(function, include_extras=True)
        named = next((name for name in hints if name in ("tenant", "domain")), None)
        if named is None or words[0] in ("create", "deploy", "migrate"):  # whose domain may be new
            continue
        needed = [
            name for name, one in inspect.signature(function).parameters.items() if one.default is one.empty
        ]
        given = [of if name == named else "small" for name in needed]
        if named not in needed:
            given += ["--tenant", of]
        yield (*words, *(["--yes"] if "yes" in hints else []), *given)


@pytest.mark.parametrize("words", [*taking("other.example.com")], ids=" ".join)
async def test_every_command_looks_a_domain_up(gateway: LiveGateway, words: tuple[str, ...]) -> None:
    said = "incus-gateway: no tenant has the domain other.example.com; `incus-gateway list` shows all\n"
    assert await run(gateway, *words) == (1, b"", said)


@pytest.mark.parametrize("domain", ["bücher.example.com", "XN--bcher-KVA.example.com."])
async def test_a_domain_may_be_spelt_as_it_is_deployed(gateway: LiveGateway, domain: str) -> None:
    await run(gateway, "rename", "demo", "bücher.example.com")
    assert (await run(gateway, "exec", domain, "--", "echo", "here"))[:2] == (0, b"here\n")
    _, out, _ = await run(gateway, "token", "--tenant", domain)
    assert tokens.verify(SECRET, out.decode().strip()).tenants == {"demo"}
    await run(gateway, "rename", "demo", "-")


async def test_a_tenant_is_put_to_sleep_and_woken_by_a_command(tmp_path: Path) -> None:
    """Without a history, whose commands count too."""
    async with served(tmp_path, GATEWAY_HISTORY="false") as gateway:
        await sleeps_and_wakes(gateway)


async def sleeps_and_wakes(gateway: LiveGateway) -> None:
    said = b"demo sleeps; the next visitor or command wakes it\n"
    running = await start(gateway, "exec", "demo", "--", "cat")
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write(b"here\n")
    assert await asyncio.wait_for(running.stdout.readline(), 30) == b"here\n"
    code, out, err = await run(gateway, "sleep", "demo")
    assert (code, out) == (1, b"") and "demo stays awake (commands that run in it: 1, " in err
    running.stdin.close()
    assert await asyncio.wait_for(running.wait(), 30) == 0
    for _ in range(2):  # one that sleeps stays so
        assert await run(gateway, "sleep", "demo") == (0, said, "")
    assert b"asleep" in (await run(gateway, "info", "demo"))[1]
    assert (await run(gateway, "exec", "demo", "--", "echo", "awake"))[1] == b"awake\n"
    await run(gateway, "stop", "demo")
    code, _, err = await run(gateway, "sleep", "demo")
    assert code == 1 and "only a running tenant can be put to sleep" in err
    assert (await run(gateway, "start", "demo"))[0] == 0


async def test_the_templates_are_listed(gateway: LiveGateway) -> None:
    _, out, _ = await run(gateway, "templates")
    assert b"static" in out and b"vite-react" in out
    assert {"static", "vite-react"} <= {
        one["name"] for one in orjson.loads((await run(gateway, "templates", "--json"))[1])
    }


async def test_a_site_without_variables_says_so(gateway: LiveGateway) -> None:
    """To a person; a program reads nothing."""
    code, out, err = await run(gateway, "env", "demo")
    assert (code, out) == (0, b"") and err.startswith("demo has no variables; `incus-gateway env demo set")


async def test_files_and_folders_are_copied_both_ways(gateway: LiveGateway, tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "empty").mkdir()
    data = os.urandom(300_000)
    (source / "deep" / "er" / "a b ü%20.bin").write_bytes(data)
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o750)
    (source / "deep").chmod(0o700)
    (source / "link").symlink_to("deep/er")
    os.mkfifo(source / "pipe")
    code, out, err = await run(gateway, "cp", str(source), "demo:copy")
    assert (code, out) == (0, b"demo:copy: 3 files, 293.0 KiB\n")
    assert err == "left out: ./copy/pipe, not a regular file\n"
    made = "stat -c %a run deep; readlink link; ln -s /etc/passwd out; ln run again"
    words = ("exec", "--cwd", "copy", "demo", "--", "sh", "-c", made)
    assert (await run(gateway, *words))[1] == b"750\n700\ndeep/er\n"
    back = tmp_path / "back"
    code, out, err = await run(gateway, "cp", "demo:copy", str(back))
    assert (code, out) == (0, f"{back}: 4 files, 293.0 KiB\n".encode())
    assert err == "left out: out, a link to /etc/passwd\n"
    assert (back / "link" / "a b ü%20.bin").read_bytes() == data
    modes = {name: stat.S_IMODE((back / name).stat().st_mode) for name in ("run", "again", "deep")}
    assert modes == {"run": 0o750, "again": 0o750, "deep": 0o700}
    assert (back / "empty").is_dir() and not os.path.lexists(back / "out")
    # a folder that is there takes it by its name
    assert (await run(gateway, "cp", "demo:copy/run", str(back / "empty")))[0] == 0
    assert (back / "empty" / "run").is_file()
    assert (await run(gateway, "cp", str(source / "run"), "demo:copy"))[1] == b"demo:copy/run: 1 file, 10 B\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("demo:none", "."), 1, "incus-gateway: there is no none in demo\n"),
        (("/nonexistent", "demo:"), 1, "incus-gateway: No such file or directory: /nonexistent\n"),
        (("demo:none", "-"), 1, "No such file or directory"),
        (("-", "demo:."), 1, "Is a directory"),
        (("a", "b"), 2, "one of FROM and TO must be TENANT:PATH"),
        (("demo:a", "demo:b"), 2, "one of FROM and TO must be TENANT:PATH"),
        (("./demo:a", "b"), 2, "one of FROM and TO must be TENANT:PATH"),
        (("t-none:a", "b"), 1, "no tenant"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_what_cannot_be_copied_is_told(
    gateway: LiveGateway, words: tuple[str, ...], code: int, says: str
) -> None:
    found, out, err = await run(gateway, "cp", *words)
    assert (found, out) == (code, b"") and says in err


async def test_an_error_repeats_no_output_that_was_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["npm error code E404", "npm error 404 Not Found"]
    error = ExecFailed("`npm ci` ended with code 1: npm error\n" + "\n".join(lines), phase="install")

    class Begun:
        async def events(self) -> AsyncIterator[Any]:
            yield SimpleNamespace(
                type="deployment.phase.log", time="", data={"phase": "install", "lines": lines}
            )

        async def record(self) -> Any:
            return SimpleNamespace(error=error)

    await followed(cast("Any", Begun()), "shop.example.com", as_json=False)
    assert error.message == "`npm ci` ended with code 1: npm error"
    assert capsys.readouterr().out.splitlines() == [f"    {line}" for line in lines]


async def test_a_copy_is_piped(gateway: LiveGateway) -> None:
    data = os.urandom(300_000)
    process = await start(gateway, "cp", "-", "demo:piped", stdin=asyncio.subprocess.PIPE)
    assert (await process.communicate(data))[0] == b"" and process.returncode == 0
    assert (await run(gateway, "cp", "demo:piped", "-"))[:2] == (0, data)


def test_nothing_of_a_tenants_tar_leads_out_of_the_copy(tmp_path: Path) -> None:
    """Whatever links it makes and writes through, in whatever order, and what was there before."""
    there = tmp_path / "a" / "b" / "there"
    there.mkdir(parents=True)
    (there / "old").symlink_to(tmp_path)
    entries: list[tuple[str, bytes, str]] = [
        ("./x", tarfile.DIRTYPE, ""),
        *((f"./x/up{number}", tarfile.SYMTYPE, way) for number, way in enumerate(WAYS_OUT)),
        ("./x/here", tarfile.SYMTYPE, "."),
        ("./x/here/../../../evil", tarfile.REGTYPE, ""),
        ("./x/folder/file", tarfile.REGTYPE, ""),
        ("./x/folder/link", tarfile.SYMTYPE, "../here/here/folder"),
        ("./x/here/evil", tarfile.SYMTYPE, ".."),
        ("./x/hard", tarfile.LNKTYPE, "./x/../../evil"),
        ("./x/old", tarfile.DIRTYPE, ""),
        ("./x/old/evil", tarfile.REGTYPE, ""),
        ("./y/evil", tarfile.REGTYPE, ""),
        ("/evil", tarfile.REGTYPE, ""),
        ("./x/device", tarfile.CHRTYPE, ""),
        ("./x/pipe", tarfile.FIFOTYPE, ""),
    ]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, kind, wanted in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = kind, wanted, 0o4777
            archive.addfile(entry)
        sparse = tarfile.TarInfo("./x/sparse")  # a few bytes that are many on the disk
        sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 28)}
        archive.addfile(sparse)
    reading, writing = os.pipe()
    os.write(writing, packed.getvalue())
    os.close(writing)
    before, copied = tmp_path.stat().st_mode, copying._Copied()
    copying._unpack(reading, there, copied)
    made = {path.relative_to(there).as_posix() for path in there.rglob("*")}
    assert made == {"old", "here", "folder", "folder/file", "folder/link"}
    assert {path.name for path in tmp_path.iterdir()} == {"a"} and tmp_path.stat().st_mode == before
    assert len(copied.left) == len(entries) + 1 - 4
    assert (there / "folder" / "file").stat().st_mode & 0o7777 == 0o777
    assert (there / "folder" / "link").resolve() == there / "folder"


async def test_the_manual_is_made_of_the_helps(gateway: LiveGateway) -> None:
    """Every command with its options; groff, where there is one, finds nothing to complain of."""
    _, page, _ = await run(gateway, "man")
    text = page.decode().replace("\\-", "-")
    for words in ("serve", "image build", "exec", "cp", "completion"):
        assert f"\n.SS {words} " in text
    assert "--cwd" in text and "GATEWAY_URL" in text and "Ctrl-C cancels and undoes it." in text
    if shutil.which("groff"):
        groff = ("groff", "-man", "-ww", "-Tutf8", "-Kutf8", "-rLL=100n")
        pipe = asyncio.subprocess.PIPE
        shown = await asyncio.create_subprocess_exec(*groff, stdin=pipe, stdout=pipe, stderr=pipe)
        out, complaints = await shown.communicate(page)
        assert complaints == b"" and b"EXIT STATUS" in out


COMMANDS = [
    (name, *inner)
    for name, entry in cli.COMMANDS.items()
    for inner in ([(one,) for one in entry.commands] if isinstance(entry, CommandGroup) else [()])
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_helps(words: tuple[str, ...]) -> None:
    """By -h as by --help, and no wider than a terminal."""
    short, long = (CliRunner().invoke(cli.app, [*words, option]) for option in ("-h", "--help"))
    assert (short.exit_code, short.output) == (0, long.output) and "Usage: " in short.output
    assert not [one for one in short.output.splitlines() if len(one) > 84]
