"""The command line as a person meets it: outputs, exit codes, words; against a live local gateway."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from gateway.auth import tokens
from gateway.cli.invocation import Failed
from gateway.cli.tenants import _latest_turn
from tests.constants import constants
from tests.contracts.processes import alive, mark
from tests.live import SECRET, LiveGateway
from tests.unit.command_line import run, served, start
from tests.waits import until


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    async with served(tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


async def test_a_token_is_printed_alone(gateway: LiveGateway) -> None:
    words = ("token", "--tenant", "shop", "--scope", "exec", "--scope", "events", "--ttl", "5m")
    code, out, _ = await run(gateway, *words)
    token = tokens.verify(SECRET, out.decode().strip())
    assert code == 0
    assert (set(token.tenants), set(token.scopes)) == ({"shop"}, {"exec", "events"})
    assert token.subject == "tester", "who asks for it, unless it says whom it is for"
    _, out, _ = await run(gateway, *words, "--subject", "designer")
    assert tokens.verify(SECRET, out.decode().strip()).subject == "designer"


@pytest.mark.parametrize("words", [("token", "--tenant", "NO"), ("create", "No!"), ("create", "demo")])
async def test_what_cannot_be_done_is_one_line_and_1(gateway: LiveGateway, words: tuple[str, ...]) -> None:
    code, out, err = await run(gateway, *words)
    assert (code, out) == (1, b"")
    assert err.startswith("incus-gateway: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("nope",),
        ("exec", "demo"),
        ("token",),
        ("exec", "--env", "x", "demo", "true"),
        ("exec", "--json", "demo", "--", "true"),
    ],
)
async def test_wrong_usage_is_2(gateway: LiveGateway, words: tuple[str, ...]) -> None:
    assert (await run(gateway, *words))[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((".",), "the domain comes first: incus-gateway deploy DOMAIN ."),
        (("clients/web",), "the domain comes first: incus-gateway deploy DOMAIN clients/web"),
        (("shop",), "'shop' is not a domain such as shop.example.com"),
        (("10.0.0.1", "."), "'10.0.0.1' is an IP address; a site needs a domain"),
    ],
)
async def test_a_folder_in_the_place_of_the_domain_deploys_no_other(
    gateway: LiveGateway, words: tuple[str, ...], said: str
) -> None:
    """Least of all the one in which the command was typed, before a file of it is read."""
    code, out, err = await run(gateway, "deploy", *words)
    assert (code, out) == (2, b"") and said in " ".join(err.split())


async def test_tenants_are_listed_for_people_and_programs(gateway: LiveGateway) -> None:
    _, out, _ = await run(gateway, "list", "--json")
    assert [entry["name"] for entry in orjson.loads(out)] == ["demo"]
    _, out, _ = await run(gateway, "list")
    assert b"demo" in out and b"running" in out


async def test_exec_is_the_command_itself(gateway: LiveGateway) -> None:
    """Its outputs apart, its input, its exit code."""
    script = "cat; echo err >&2; exit 7"
    data = os.urandom(3 << 20)
    assert await run(gateway, "exec", "demo", "--", "sh", "-c", script, stdin=data) == (7, data, "err\n")
    assert (await run(gateway, "exec", "--env", "A=b c", "demo", "--", "sh", "-c", "echo $A"))[1] == b"b c\n"
    assert (await run(gateway, "exec", "demo", "printf", "%s", "-t", "--json"))[1] == b"-t--json"


async def test_what_cannot_start_ends_as_in_a_shell(gateway: LiveGateway) -> None:
    code, _, err = await run(gateway, "exec", "demo", "--", "no-such-program")
    assert code == 127 and "command not found" in err
    assert (await run(gateway, "exec", "demo", "--", "/etc/passwd"))[0] == 126
    code, _, err = await run(gateway, "exec", "t-none", "--", "true")
    assert code == 1 and "no tenant" in err


async def test_one_interrupt_ends_what_runs(gateway: LiveGateway) -> None:
    """All of it, where the runtime finds a command's processes, for which it needs root."""
    seconds = mark()
    words = ["bash", "-c", f"sleep {seconds}; echo after"] if os.geteuid() == 0 else ["sleep", seconds]
    process = await start(gateway, "exec", "demo", "--", *words)
    await until(lambda: alive(seconds) == 1)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 20) == 130
    assert alive(seconds) == 0
    await process.communicate()


async def test_a_terminal_is_passed_through(gateway: LiveGateway) -> None:
    master, slave = pty.openpty()
    script = "tty; read x; echo got $x"
    process = await start(gateway, "exec", "-t", "demo", "--", "sh", "-c", script, stdin=slave)
    os.close(slave)
    os.write(master, b"typed\n")
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    os.close(master)
    # its terminal echoes what was typed ahead, before or after the first line
    assert b"/dev/pts/" in out and out.endswith(b"got typed\r\n")
    assert process.returncode == 0


async def test_events_are_followed(gateway: LiveGateway) -> None:
    process = await start(gateway, "events", "--tenant", "demo", "--type", "exec.*", "--json")
    assert process.stdout is not None
    line = asyncio.ensure_future(process.stdout.readline())
    while not line.done():  # until it follows, what is run goes by unseen
        await run(gateway, "exec", "demo", "--", "true")
    event = orjson.loads(await line)
    assert event["type"].startswith("exec.") and event["tenant"] == "demo"
    process.kill()
    await process.communicate()


@pytest.mark.parametrize("words", [("list",), ("exec", "demo", "--", "true")], ids=["http", "websocket"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "http://127.0.0.1:1",
            "1: Connection refused; is it running? `incus-gateway serve` starts",
        ),
        ("unix:/nonexistent", "no gateway answers at /nonexistent: No such file or directory;"),
        ("http://no.such.host.invalid", "no gateway answers at http://no.such.host.invalid: "),
        ("https://127.0.0.1:{port}", "no TLS with it"),
        ("here", "is http://…, https://… or unix:/…, not 'here'; correct --url or GATEWAY_URL"),
        ("http://", "'http://' is not a gateway's address: it has no host; correct --url"),
        ("http://127.0.0.1:99999", "is not a gateway's address: Port out of range"),
    ],
)
async def test_a_gateway_that_does_not_answer_is_told_in_one_line(
    gateway: LiveGateway, words: tuple[str, ...], url: str, says: str
) -> None:
    code, out, err = await run(gateway, words[0], "--url", url.format(port=gateway.port), *words[1:])
    assert (code, out, err.count("\n")) == (1, b"", 1)
    assert err.startswith("incus-gateway: ") and says in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("demo", "--cwd", "/tmp", "--", "pwd"), "/tmp\n"),
        (("demo", "--cwd", "/tmp", "pwd"), "/tmp\n"),
        (("--env", "A=1", "demo", "--env", "B=2", "--", "sh", "-c", "echo $A$B"), "12\n"),
        (("demo", "--", "echo", "--cwd", "/tmp"), "--cwd /tmp\n"),
        (("demo", "echo", "--cwd", "--", "x"), "--cwd -- x\n"),
        (("demo", "--cwd=/tmp", "--", "echo", "--", "-t"), "-- -t\n"),
        (("demo", "--nope", "--", "ls"), "No such option: --nope"),
        (("demo", "--cwd", "/tmp"), "Missing argument"),
        (("demo", "-h"), "Run a command in a tenant"),
    ],
    ids=" ".join,
)
async def test_options_of_exec_may_follow_the_tenant(
    gateway: LiveGateway, words: tuple[str, ...], says: str
) -> None:
    """Until the command's name: what follows that is the command's own."""
    code, out, err = await run(gateway, "exec", *words)
    if says.endswith("\n"):
        assert (code, out.decode(), err) == (0, says, "")
    else:
        assert says in out.decode() + err


@pytest.mark.parametrize(
    "words",
    [("list", "--json"), ("list",), ("exec", "demo", "--", "cat", "/dev/zero"), ("audit",), ("--help",)],
    ids=" ".join,
)
async def test_nothing_is_said_where_nobody_reads_on(gateway: LiveGateway, words: tuple[str, ...]) -> None:
    """As with `head`: no traceback, no complaint of the interpreter; the code is SIGPIPE's, click's own 1."""
    read, write = os.pipe()
    os.close(read)
    process = await start(gateway, *words, stdout=write)
    os.close(write)
    _, err = await asyncio.wait_for(process.communicate(b""), 30)
    assert (process.returncode, err) == (1 if words == ("--help",) else 141, b"")


async def test_a_full_disk_is_told_in_one_line(gateway: LiveGateway) -> None:
    with Path("/dev/full").open("wb") as full:
        process = await start(gateway, "list", stdout=full.fileno())
        _, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, err) == (1, b"incus-gateway: No space left on device\n")


async def test_a_pipe_gets_all_of_a_row(gateway: LiveGateway) -> None:
    """However narrow the terminal is said to be."""
    domain = f"{'long-' * 11}name.{'and-' * 12}longer.example.com"
    assert (await run(gateway, "rename", "demo", domain))[:2] == (
        0,
        f"demo has the domain {domain}\n".encode(),
    )
    process = await start(gateway, "list", environment={"COLUMNS": "40"})
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    (row,) = [line for line in out.decode().splitlines() if line.startswith("demo ")]
    assert domain in row and "running" in row
    assert (await run(gateway, "rename", "demo", "-"))[:2] == (0, b"demo has no domain\n")


async def test_an_interrupt_ends_a_command_without_a_word(gateway: LiveGateway) -> None:
    process = await start(gateway, "events", "--json")
    assert process.stdout is not None
    line = asyncio.ensure_future(process.stdout.readline())
    while not line.done():
        await run(gateway, "exec", "demo", "--", "true")
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, err) == (130, b"")


async def test_changes_of_a_tenant_say_what_they_did(gateway: LiveGateway) -> None:
    said = [
        (("stop", "demo"), "demo is stopped"),
        (("start", "demo"), "demo is running"),
        (("restart", "demo"), "demo was restarted"),
        (("snapshot", "demo", "kept"), "kept"),
        (("clone", "demo", "twin", "--snapshot", "kept"), "twin is a copy of demo at kept; it has no domain"),
        (("restore", "demo", "kept"), "demo is restored to kept"),
        (("snapshot", "demo", "--delete", "kept"), "demo no longer has the snapshot kept"),
        (("destroy", "twin", "--yes"), "twin is destroyed"),
    ]
    for words, says in said:
        assert await run(gateway, *words) == (0, f"{says}\n".encode(), ""), words


@pytest.mark.parametrize(
    ("shell", "environment", "offers"),
    [
        ("bash", {"COMP_WORDS": "incus-gateway st", "COMP_CWORD": "1"}, ["start", "stop"]),
        ("bash", {"COMP_WORDS": "incus-gateway exec de", "COMP_CWORD": "2"}, ["demo"]),
        ("bash", {"COMP_WORDS": "incus-gateway resize demo --u", "COMP_CWORD": "3"}, ["--url"]),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "incus-gateway exec de"}, ["demo"]),
        (
            "fish",
            {"_TYPER_COMPLETE_ARGS": "incus-gateway logs ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
            ["demo"],
        ),
        (
            "bash",
            {
                "COMP_WORDS": "incus-gateway stop d",
                "COMP_CWORD": "2",
                "GATEWAY_URL": "http://127.0.0.1:1",
            },
            [],
        ),
    ],
)
async def test_a_shell_is_told_how_a_command_line_goes_on(
    gateway: LiveGateway, shell: str, environment: dict[str, str], offers: list[str]
) -> None:
    """Commands, options and tenants; nothing, not a word, where no gateway answers."""
    # a person waits for two seconds; a busy machine may need them to start Python
    patient = constants({"gateway.cli.invocation._PATIENCE": 20.0})
    asked = {"_INCUS_GATEWAY_COMPLETE": f"complete_{shell}", **environment, **patient}
    process = await start(gateway, environment=asked)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    words = re.findall(r"[\w-]+", out.decode()) if shell == "zsh" else out.decode().split()
    assert err == b"" and (set(offers) <= set(words) if offers else words == [])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_the_script_of_a_shell_is_printed(gateway: LiveGateway, shell: str) -> None:
    code, out, _ = await run(gateway, "completion", shell)
    assert code == 0 and b"_INCUS_GATEWAY_COMPLETE=complete_" + shell.encode() in out
    if shell == "bash":  # the one that is always there
        check = await asyncio.create_subprocess_exec("bash", "-n", stdin=asyncio.subprocess.PIPE)
        await check.communicate(out)
        assert check.returncode == 0


async def test_a_wrong_setting_is_named(gateway: LiveGateway, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "serve"),
        env={**gateway.environment, "GATEWAY_MAX_TENANTS": "many"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"GATEWAY_MAX_TENANTS" in err and b"Traceback" not in err


async def test_serve_help_lists_every_setting(gateway: LiveGateway) -> None:
    _, out, _ = await run(gateway, "serve", "--help")
    for name in ("GATEWAY_LISTEN", "GATEWAY_EXEC_TAIL", "GATEWAY_SHUTDOWN_TIMEOUT"):
        assert name in out.decode()


async def test_a_tenants_disk_is_kept_brought_back_and_copied(gateway: LiveGateway) -> None:
    async def cat(tenant: str) -> bytes:
        return (await run(gateway, "exec", tenant, "--", "cat", "a"))[1]

    await run(gateway, "exec", "demo", "--", "sh", "-c", "echo one >a")
    assert (await run(gateway, "snapshot", "demo", "s1"))[:2] == (0, b"s1\n")
    await run(gateway, "exec", "demo", "--", "sh", "-c", "echo two >a")
    _, out, _ = await run(gateway, "snapshot", "demo", "--list", "--json")
    assert [kept["name"] for kept in orjson.loads(out)] == ["s1"]
    assert (await run(gateway, "clone", "demo", "copy", "--snapshot", "s1"))[0] == 0
    assert (await cat("copy"), await cat("demo")) == (b"one\n", b"two\n")
    assert (await run(gateway, "restore", "demo", "s1"))[0] == 0
    assert await cat("demo") == b"one\n"
    assert (await run(gateway, "rename", "copy", "copy.example.com"))[0] == 0
    _, out, _ = await run(gateway, "list", "--json")
    assert {entry["name"]: entry["domain"] for entry in orjson.loads(out)}["copy"] == "copy.example.com"
    code, out, err = await run(gateway, "resize", "copy", "medium")
    assert (code, out) == (1, b"") and "the local runtime has no limits" in err
    assert (await run(gateway, "resize", "copy", "huge"))[0] == 2
    assert (await run(gateway, "destroy", "copy", "--yes"))[0] == 0
    assert (await run(gateway, "snapshot", "demo", "--delete", "s1"))[0] == 0
    code, out, err = await run(gateway, "restore", "demo", "s1")
    assert (code, out, err.count("\n")) == (1, b"", 1)
    assert (await run(gateway, "snapshot", "demo", "s2", "--list"))[0] == 2


async def test_what_agents_changed_is_listed_shown_and_taken_back(gateway: LiveGateway) -> None:
    assert (await run(gateway, "create", "turns"))[0] == 0
    code, _, err = await run(gateway, "undo", "turns")
    assert (code, err.count("\n")) == (1, 1) and "nothing to undo" in err
    async with gateway.wire("turns") as wire:
        for word in ("one", "two"):
            await wire.call("turn/begin", title=f"Write {word}\nmore", agent="Claude")
            given = {"file_path": "a", "content": f"{word}\n"}
            await wire.call("tools/call", name="Write", arguments=given)
        await wire.call("turn/end")
    _, out, _ = await run(gateway, "history", "turns", "--json")
    latest, before, *_ = orjson.loads(out)
    _, out, _ = await run(gateway, "history", "turns", "-n", "1")
    assert latest["turn"][:8] in out.decode() and "Claude" in out.decode() and "Write two" in out.decode()
    _, out, _ = await run(gateway, "history", "turns", latest["turn"][:8])
    assert b"-one\n+two\n" in out
    code, _, err = await run(gateway, "history", "turns", "nothing")
    assert (code, err.count("\n")) == (1, 1) and "incus-gateway history turns" in err
    code, out, _ = await run(gateway, "undo", "turns")
    assert (code, out) == (0, b"Undo: Write two: 1 file. To take it back: incus-gateway undo turns\n")
    assert (await run(gateway, "exec", "turns", "--", "cat", "a"))[1] == b"one\n"
    assert (await run(gateway, "undo", "turns", latest["turn"][:8], "--to", "after", "--yes"))[0] == 0
    assert (await run(gateway, "exec", "turns", "--", "cat", "a"))[1] == b"two\n"
    code, out, err = await run(gateway, "undo", "turns", before["turn"])
    assert (code, out, err.count("\n")) == (1, b"a\n", 1), "it made the file that is changed since"
    assert f"incus-gateway undo turns {before['turn'][:8]} --force a" in err
    assert (await run(gateway, "exec", "turns", "--", "cat", "a"))[1] == b"two\n"
    assert (await run(gateway, "undo", "turns", before["turn"], "--force", "a"))[0] == 0
    assert (await run(gateway, "exec", "turns", "--", "ls"))[1] == b""
    assert (await run(gateway, "undo", "turns"))[0] == 0, "an undo is undone"
    assert (await run(gateway, "exec", "turns", "--", "cat", "a"))[1] == b"two\n"
    assert (await run(gateway, "undo", "turns", before["turn"], "--to", "before", "--yes"))[0] == 0
    assert (await run(gateway, "exec", "turns", "--", "ls"))[1] == b""
    assert (await run(gateway, "undo", "turns", "--to", "after"))[0] == 2


@pytest.mark.parametrize(
    "kinds, undone",
    [
        (("turn", "first"), 0),
        (("outside", "turn", "first"), 1),
        (("outside", "restored", "turn"), 1),
        (("outside", "outside", "deployed", "turn"), 0),  # not the deployment, nor what was before it
    ],
)
def test_undo_takes_back_the_latest_since_the_deployment(kinds: tuple[str, ...], undone: int) -> None:
    turns = [{"turn": str(number), "kind": kind} for number, kind in enumerate(kinds)]
    assert _latest_turn("demo", turns) == str(undone)


@pytest.mark.parametrize(
    ("kind", "since"), [("deployed", "since it was deployed"), ("first", "since its history began")]
)
def test_undo_does_not_take_back_a_deployment(kind: str, since: str) -> None:
    with pytest.raises(Failed, match=rf"{since}; .*incus-gateway history demo"):
        _latest_turn("demo", [{"turn": "1", "kind": kind}, {"turn": "0", "kind": "turn"}])


async def test_the_sites_log_is_printed_and_followed(gateway: LiveGateway) -> None:
    log = Path(gateway.environment["GATEWAY_STATE_DIR"], "tenants", "demo", "site.log")
    log.write_text("".join(f"line {n}\n" for n in range(5)))
    assert (await run(gateway, "logs", "demo", "-n", "2"))[:2] == (0, b"line 3\nline 4\n")
    following = await start(gateway, "logs", "demo", "-f", "-n", "1")
    assert following.stdout is not None
    async with asyncio.timeout(20):
        assert await following.stdout.readline() == b"line 4\n"
        with log.open("a") as more:
            more.write("line 5\n")
        assert await following.stdout.readline() == b"line 5\n"
        following.send_signal(signal.SIGINT)
        assert await following.wait() == 130
    assert (await run(gateway, "logs", "none"))[0] == 1


async def test_a_token_is_taken_back_with_a_gateway_and_without(tmp_path: Path) -> None:
    gateway = LiveGateway(
        {"GATEWAY_RUNTIME": "local", "GATEWAY_STATE_DIR": str(tmp_path)}, tmp_path / "gateway.log"
    )
    raws = [(await run(gateway, "token", "--tenant", "shop"))[1].decode().strip() for _ in range(2)]
    assert (await run(gateway, "token", "--revoke", raws[0]))[0] == 0
    await gateway.start()
    assert (await run(gateway, "token", "--revoke", tokens.verify(SECRET, raws[1]).id))[0] == 0
    for raw in raws:
        code, _, said = await run(gateway, "list", "--token", raw)
        assert (code, said) == (1, "incus-gateway: this token is not valid\n")
    _, out, _ = await run(gateway, "audit", "--json")
    noted = [(entry["who"], entry["action"]) for entry in orjson.loads(out)]
    assert noted == [("tester (cli)", "token.revoked")]
    assert b"token.revoked" in (await run(gateway, "audit"))[1]
    assert (await run(gateway, "token", "--revoke", "x", "--tenant", "shop"))[0] == 2
    code, out, err = await run(gateway, "token", "--revoke", "zzz")
    assert (code, out) == (0, b"tokens with the id zzz are refused from now on\n") and "check that" in err
    assert await gateway.stop() == 0
