"""The shell scripts that start and kill commands, under each shell that an image may have as `sh`.

A command's environment is compared with that of a plain exec.
"""

from __future__ import annotations

import os
import pty
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import termios
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies

from gateway.errors import ExecFailed
from gateway.rootfs.process_tree import MARKER, PARENT
from gateway.runtime import KillResult, Pty
from gateway.runtime.launcher import (
    DRAIN_SCRIPT,
    KILL_SCRIPT,
    START_SCRIPT,
    WAIT_SCRIPT,
    Account,
    Preamble,
    command_line,
    killed,
    start_command,
)
from tests.thorough import examples

SHELLS: Final = {"dash": ("dash",), "bash": ("bash", "--posix"), "busybox": ("busybox", "sh")}
BASE: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/"}
SHOWN: Final = ("cat", "--", "/proc/self/cmdline", "here", "/proc/self/environ")
HERE: Final = b"\0--in the folder--\0"
LONGEST: Final = 128 * 1024 - 1
OF_SHELLS: Final = {"PWD", "SHLVL", "_"}  # variables that a shell adds where nobody set them

pytestmark = [
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs Linux"),
    pytest.mark.timeout(60),
]


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = SHELLS[request.param]
    if shutil.which(found[0]) is None:
        pytest.skip(f"there is no {found[0]} here")
    return found


@pytest.fixture(scope="module")
def workspace() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        yield os.fsencode(folder)


def run(
    shell: tuple[str, ...], line: bytes, *, then: bytes = b"", ends: bool = False
) -> tuple[Preamble, bytes, bytes]:
    """Return the scripts' messages and the command's own output.

    `then` is the command's input, unless the input `ends` with the line.
    """
    waiting = subprocess.Popen(
        [*shell, "-c", WAIT_SCRIPT, "sh", "scan", "", ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=BASE,
    )
    with waiting:
        assert waiting.stdin is not None and waiting.stderr is not None
        waiting.stdin.write(line)
        waiting.stdin.flush()
        if ends:
            waiting.stdin.close()
            waiting.stdin = None
        preamble = Preamble()
        preamble.asked("", "", "")
        while not preamble.started and (said := os.read(waiting.stderr.fileno(), 65536)):
            preamble.feed(said)
        out, error = waiting.communicate(None if ends else then, timeout=30)
    return preamble, out, preamble.rest + error


def variables(environ: bytes) -> dict[bytes, bytes]:
    pairs = [pair.split(b"=", 1) for pair in environ.split(b"\0")[:-1]]
    made = {pair[0]: pair[1] for pair in pairs}
    assert len(made) == len(pairs), "a variable is there twice"
    return made


def same_as_plain(
    shell: tuple[str, ...], folder: bytes, words: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> None:
    """Assert that a command gets the same arguments, environment and folder as from a plain exec."""
    asked = dict(env or {})
    (Path(os.fsdecode(folder)) / "here").write_bytes(HERE)
    argv = (*SHOWN, *words)
    plain = subprocess.run(
        argv, cwd=folder, env={**BASE, **asked}, stdin=subprocess.DEVNULL, capture_output=True, timeout=30
    )
    preamble, out, _ = run(shell, command_line(argv, cwd=os.fsdecode(folder), env=asked))
    assert preamble.started
    assert out.partition(HERE)[0] == plain.stdout.partition(HERE)[0]
    expected, given = (variables(said.partition(HERE)[2]) for said in (plain.stdout, out))
    added = {os.fsencode(name) for name in OF_SHELLS - asked.keys()}
    assert {name: value for name, value in given.items() if name not in added} == expected


# what a shell would take for something else than bytes, and any bytes but NUL; a lone "-" is input to `cat`
ODD = ("\n", "'", '"', "\\", "$", "`", "-n", "-", "*", "~", "%s", "\x01", "\x7f", "\udc81", "é")
BYTES = strategies.binary(max_size=8).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
TEXTS = strategies.lists(strategies.sampled_from(ODD) | BYTES, max_size=6).map("".join)
MEANT: Final = """
    __n _gateway_line _gateway_path _gateway_folder _gateway_found _gateway_modes _0 _1 _ a IFS PS4 ENV
    BASH_ENV PWD OLDPWD LINENO RANDOM UID EUID PPID SHLVL SHELLOPTS BASHOPTS OPTIND OPTARG SECONDS LC_ALL
    LANG CDPATH TMOUT POSIXLY_CORRECT HOME
"""
NAMES = strategies.sampled_from(MEANT.split()) | strategies.from_regex(
    r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True
).filter(lambda name: name != "PATH")
FOLDERS = TEXTS.map(lambda text: os.fsencode(text.replace("/", "."))[:200]).filter(
    lambda name: name not in (b"", b".", b"..")
)


@settings(
    max_examples=examples(20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    strategies.lists(TEXTS.filter(lambda text: text != "-"), max_size=4),
    strategies.dictionaries(NAMES, TEXTS, max_size=5),
    FOLDERS,
)
@example(["a\nb"], {"__n": "X"}, b"-n")
@example(["\x01\udcc2\x01"], {"OPTIND": "abc"}, b"\x01\xc2\x01")
@example(["\n"], {"_0": "taken", "IFS": "'", "_": ""}, b"\n'\n\xff")
@example(["x" * LONGEST, "\n" * 999], {"A": "'" * 999 + "x" * (LONGEST - 1001), "UID": "\n" * 999}, b"\\")
def test_a_command_gets_what_a_plain_exec_gives_it(
    shell: tuple[str, ...], workspace: bytes, words: list[str], env: dict[str, str], folder: bytes
) -> None:
    place = os.path.join(workspace, folder)
    os.makedirs(place, exist_ok=True)
    same_as_plain(shell, place, words, env)


def test_no_variable_that_a_shell_knows_changes_or_prevents_a_start(
    shell: tuple[str, ...], workspace: bytes
) -> None:
    """Each word in the shell's executable that may be a variable, with a value that it does not accept."""
    program = Path(shutil.which(shell[0]) or "").read_bytes()
    names = {
        name.decode() for name in re.findall(rb"(?<![A-Za-z0-9_])[A-Z_][A-Z0-9_]{1,30}(?=[\0=])", program)
    }
    assert {"OPTIND", "IFS", "PPID"} <= names
    for value in ("abc", ""):
        env = {name: value for name in names if name != "PATH" and not name.startswith("LD_")}
        same_as_plain(shell, workspace, env=env)


def test_what_means_something_to_a_shell_shows_in_no_list_of_processes(workspace: bytes) -> None:
    """It is only in the environment of `env`, which others cannot read, while that runs."""
    line = command_line(("true",), cwd=os.fsdecode(workspace), env={"OPTIND": "secret", "PLAIN": "secret"})
    becomes = line.partition(b"exec ")[2]
    assert b"OPTIND" in becomes and b"secret" not in becomes


def test_a_long_line_is_not_read_byte_by_byte(shell: tuple[str, ...], workspace: bytes) -> None:
    line = command_line(("cat", "/proc/self/io", *["x" * 100_000] * 10), cwd=os.fsdecode(workspace), env={})
    assert len(line) > 1_000_000
    _, out, _ = run(shell, line)
    calls = int(
        dict(told.split(b": ") for told in out.splitlines())[b"syscr"]
    )  # of the shell and what it waited for
    assert calls < len(line) / 100  # dash takes 128 bytes at a time


def test_a_long_line_leaves_the_commands_input_alone(shell: tuple[str, ...], workspace: bytes) -> None:
    line = command_line(("cat", "-", *["/dev/null"] * 1000), cwd=os.fsdecode(workspace), env={})
    assert run(shell, line, then=b"input")[1] == b"input"


@pytest.mark.parametrize("words", [[], ["x" * 10_000]], ids=["short", "long"])
def test_nothing_of_a_line_runs_that_does_not_come_whole(
    shell: tuple[str, ...], workspace: bytes, words: list[str]
) -> None:
    line = command_line(("touch", "cut", *words), cwd=os.fsdecode(workspace), env={})
    for end in (1, 2, 3, len(line) // 2):
        preamble, out, _ = run(shell, line[:-end], ends=True)
        assert not preamble.started and not out
    assert not os.path.exists(os.path.join(workspace, b"cut"))


def test_outputs_are_merged_from_the_commands_first_byte(shell: tuple[str, ...], workspace: bytes) -> None:
    argv = ("sh", "-c", "echo one >&2; echo two; echo three >&3")
    preamble, out, error = run(shell, command_line(argv, cwd=os.fsdecode(workspace), env={}, merged=True))
    assert (preamble.started, out, error) == (True, b"one\ntwo\n", b"three\n")


@pytest.mark.parametrize("env", [{}, {"OPTIND": "abc"}], ids=["plain", "held"])
@pytest.mark.parametrize("name", ["-l", "a=b", "-a=b", "a b\n", "[", "printf"])
def test_a_program_may_be_called_as_it_likes(
    shell: tuple[str, ...], workspace: bytes, name: str, env: dict[str, str]
) -> None:
    place = Path(os.fsdecode(workspace)) / "programs"
    place.mkdir(exist_ok=True)
    shutil.copy("/bin/echo", place / name)
    for path in (f"{place}:/usr/bin", f"/usr/bin/none:{place}"):
        line = command_line((name, "mine"), cwd="/", env=env | {"PATH": path})
        assert run(shell, line)[1] == b"mine\n"
    for path in ("", ":", f"{BASE['PATH']}:"):  # an empty folder in it is the one where the command runs
        if name not in ("[", "printf"):
            line = command_line((name, "mine"), cwd=str(place), env=env | {"PATH": path})
            assert run(shell, line)[1] == b"mine\n"


@pytest.mark.parametrize(
    ("argv", "cwd", "reason"),
    [
        (("no-such-program",), "/", "not_found"),
        (("",), "/", "not_found"),
        (("/none/x",), "/", "not_found"),
        (("etc",), "/", "not_found"),
        (("/etc",), "/", "not_executable"),
        (("./passwd",), "/etc", "not_executable"),
        (("true",), "/none\n", "cwd"),
        (("true",), "/etc/passwd", "cwd"),
        (("true",), "/" + "x" * 100_000, "cwd"),
    ],
)
def test_what_cannot_start_is_told(
    shell: tuple[str, ...], argv: tuple[str, ...], cwd: str, reason: str
) -> None:
    with pytest.raises(ExecFailed) as caught:
        run(shell, command_line(argv, cwd=cwd, env={"OPTIND": "abc"}))
    assert caught.value.facts["reason"] == reason


def test_a_shell_whose_input_ends_without_a_line_ends(shell: tuple[str, ...]) -> None:
    preamble, out, error = run(shell, b"", ends=True)
    assert (preamble.ready, preamble.started, out, error) == (True, False, b"", b"")


# --- start.sh -----------------------------------------------------------------------------------------


def started(
    shell: tuple[str, ...], account: Account | None, *argv: str, env: Mapping[str, str] | None = None
) -> tuple[Preamble, bytes]:
    """Return the scripts' messages and a command's output; `env` is the environment set by Incus."""
    exec_id = f"test-{secrets.token_hex(8)}"
    command = start_command(exec_id, account, looks=0, terminal=False)
    line = command_line(argv, cwd="/", env={})
    environment = {**BASE, **(env or {})}
    made = subprocess.run(
        [*shell, *command[1:]], input=line, env=environment, capture_output=True, timeout=30
    )
    for group in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        if (group / PARENT / exec_id).is_dir():
            (group / PARENT / exec_id).rmdir()
    preamble = Preamble()
    preamble.asked("", "", "somebody")
    preamble.feed(made.stderr)
    return preamble, made.stdout.replace(exec_id.encode(), b"ID")


def test_a_command_is_marked_and_in_a_group_of_its_own(shell: tuple[str, ...]) -> None:
    preamble, out = started(shell, None, "cat", "/proc/self/environ", "/proc/self/cgroup")
    assert preamble.started and f"\0{MARKER}=ID\0".encode() in b"\0" + out
    assert (preamble.method == "cgroup") == (f"/{PARENT}/ID\n".encode() in out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize(
    ("account", "said"),
    [
        (Account("root", 0, 0, "/root"), "0 0 /root root root /bin/bash"),
        (Account("s", 65534, 1001, "/home/s"), "65534 1001 /home/s s s /bin/bash"),
        (Account("nobody"), "65534 65534 /nonexistent nobody nobody /usr/sbin/nologin"),
        (Account("54321"), "54321 54321 / 54321 54321 /bin/sh"),
    ],
    ids=["root", "known", "looked up", "number"],
)
def test_a_command_is_its_users(shell: tuple[str, ...], account: Account, said: str) -> None:
    script = 'echo $(id -u) $(id -g) "$HOME" "$USER" "$LOGNAME" "$SHELL"'
    preamble, out = started(shell, account, "sh", "-c", script)
    assert (preamble.started, out.decode()) == (True, f"{said}\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_programs_that_a_user_installed_come_first_and_never_run_as_root(shell: tuple[str, ...]) -> None:
    """A site's own `setpriv` is not a way to become root, and root finds none of its other programs."""
    with tempfile.TemporaryDirectory() as home:
        programs = Path(home, ".local", "bin")
        programs.mkdir(parents=True)
        Path(home).chmod(0o755)
        for name in ("setpriv", "sh", "mine"):
            (programs / name).write_text(f"#!/bin/sh\necho {name} by $(id -u)\n")
            (programs / name).chmod(0o755)
        for word in ("mine", "setpriv"):
            preamble, out = started(shell, Account("nobody", 65534, 65534, home), word)
            assert (preamble.started, out.decode()) == (True, f"{word} by 65534\n")
        preamble, out = started(shell, Account("root", 0, 0, home), "sh", "-c", "echo $PATH")
        assert (preamble.started, out.decode()) == (True, f"{BASE['PATH']}\n")


def names_in(script: str) -> set[str]:
    """Return the variables set by a script."""
    set_ = re.findall(r"(?<![\w$-])([A-Za-z_]\w*)=", script)
    for words in re.findall(r"\bread -r ([\w ]+)|\bfor (\w+) in", script):
        set_ += "".join(words).split()
    return {name for name in set_ if name not in ("IFS", "_")}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize(
    "account", [Account("root", 0, 0, "/root"), Account("nobody")], ids=["root", "looked up"]
)
def test_no_variable_of_the_scripts_takes_the_place_of_one_that_incus_sets(
    shell: tuple[str, ...], account: Account
) -> None:
    """As set by `incus config set TENANT environment.name=…`, for each name used in start.sh and wait.sh."""
    ours = {"GATEWAY_EXEC", "HOME", "PATH", "USER", "LOGNAME", "SHELL", "TERM", "LC_ALL"}
    names = {"name", "home", "group", *names_in(START_SCRIPT), *names_in(WAIT_SCRIPT)} - ours
    assert len(names) > 10
    env = {name: f"the operator's {name}" for name in names if not name.startswith("_gateway_")}
    preamble, out = started(shell, account, "cat", "/proc/self/environ", env=env)
    assert preamble.started
    given = variables(out)
    assert {name: given.get(name.encode()) for name in env} == {name: env[name].encode() for name in env}


def test_a_user_that_is_none_is_told(shell: tuple[str, ...]) -> None:
    with pytest.raises(ExecFailed, match="no such user: somebody"):
        started(shell, Account("no-such-user"), "true")


# --- kill.sh and drain.sh -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grace", "trap", "escalated"), [("0", "", True), ("5000", "", False), ("40", "trap '' TERM;", True)]
)
def test_a_marked_tree_ends(shell: tuple[str, ...], grace: str, trap: str, escalated: bool) -> None:
    exec_id = f"test-{secrets.token_hex(8)}"
    script = f"{trap} setsid sleep 1000 & setsid sleep 1000 & echo; wait"
    env = BASE | {MARKER: exec_id}
    with subprocess.Popen(["sh", "-c", script], env=env, stdout=subprocess.PIPE) as leader:
        try:
            assert leader.stdout is not None and leader.stdout.readline() == b"\n"
            asked = [*shell, "-c", KILL_SCRIPT, "sh", exec_id, grace, "5000"]
            said = subprocess.run(asked, env=BASE, stdout=subprocess.PIPE, timeout=30).stdout
            assert killed(said) == KillResult(3, escalated, 0, "scan")
            assert leader.wait(10) == -(signal.SIGKILL if escalated else signal.SIGTERM)
            said = subprocess.run(asked, env=BASE, stdout=subprocess.PIPE, timeout=30).stdout
            assert killed(said) == KillResult(0, False, 0, "scan")
        finally:
            leader.kill()


def test_what_is_found_late_hears_term_too(shell: tuple[str, ...], tmp_path: Path) -> None:
    """Such as a process that was just becoming a program, whose environment is then empty for a moment."""
    exec_id = f"test-{secrets.token_hex(8)}"
    late = f"until [ -e go ]; do sleep 0.01; done; exec env {MARKER}={exec_id} sleep 1000"
    script = f"trap ': >go' TERM; env -u {MARKER} sh -c '{late}' & echo; wait; wait"
    env = BASE | {MARKER: exec_id}
    with subprocess.Popen(["sh", "-c", script], env=env, stdout=subprocess.PIPE, cwd=tmp_path) as leader:
        try:
            assert leader.stdout is not None and leader.stdout.readline() == b"\n"
            asked = [*shell, "-c", KILL_SCRIPT, "sh", exec_id, "20000", "5000"]
            said = subprocess.run(asked, env=BASE, stdout=subprocess.PIPE, timeout=30).stdout
            assert killed(said) == KillResult(2, False, 0, "scan")
        finally:
            leader.kill()


def test_a_process_cannot_pass_for_a_zombie_by_its_name(shell: tuple[str, ...], workspace: bytes) -> None:
    exec_id = f"test-{secrets.token_hex(8)}"
    program = Path(os.fsdecode(workspace)) / "a) Z b"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "1000"], env={MARKER: exec_id}) as process:
        try:
            asked = [*shell, "-c", KILL_SCRIPT, "sh", exec_id, "0", "5000"]
            said = subprocess.run(asked, env=BASE, stdout=subprocess.PIPE, timeout=30).stdout
            assert killed(said) == KillResult(1, True, 0, "scan")
        finally:
            process.kill()


def test_a_terminal_is_drained_and_keeps_its_modes(shell: tuple[str, ...]) -> None:
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        asked = [*shell, "-c", DRAIN_SCRIPT, "sh", os.ttyname(slave)]
        with subprocess.Popen(asked, env=BASE, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as draining:
            assert draining.stdin is not None and draining.stdout is not None
            assert draining.stdout.readline() == b"\x01D\n"
            for _ in range(32):  # far more than a terminal holds: this would wait for ever
                os.write(master, b"x" * 4096)
            draining.stdin.close()
            draining.wait(10)
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def test_a_line_for_a_terminal_is_neither_echoed_nor_cut(shell: tuple[str, ...]) -> None:
    """Its modes are restored for the command, and it has the size that was asked for."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    command = start_command(f"test-{secrets.token_hex(8)}", None, looks=0, terminal=True)
    waiting = subprocess.Popen(
        [*shell, *command[1:]], stdin=slave, stdout=slave, stderr=slave, env=BASE, start_new_session=True
    )
    with waiting:
        try:
            preamble = Preamble()
            while not preamble.ready:
                preamble.feed(os.read(master, 65536))
            assert termios.tcgetattr(slave) != before
            line = command_line(
                ("sh", "-c", "stty size; stty -a; echo $TERM ${#1}", "sh", "x" * 9000),
                cwd="/",
                env={},
                pty=Pty(cols=91, rows=21),
            )
            while line:
                line = line[os.write(master, line[:1000]) :]
            while not preamble.started:
                preamble.feed(os.read(master, 65536))
            said = preamble.rest
            while b"9000" not in said:
                said += os.read(master, 65536)
            assert b"xxxx" not in said and b"xterm-256color 9000\r\n" in said
            assert said.startswith(b"21 91\r\n")
            assert waiting.wait(10) == 0
            assert termios.tcgetattr(slave) == before
        finally:
            waiting.kill()
            os.close(master)
            os.close(slave)


# --- the files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [START_SCRIPT, WAIT_SCRIPT, KILL_SCRIPT, DRAIN_SCRIPT])
def test_a_script_says_how_it_is_called(script: str) -> None:
    header = re.match(r"(#.*\n)*", script)
    assert header is not None
    for word in ("Usage:", "Input:", "Output:", "Exit:"):
        assert word in header[0]


def test_the_scripts_and_the_gateway_find_a_command_by_the_same_names() -> None:
    for script in (START_SCRIPT, KILL_SCRIPT):
        plain = script.replace("_gateway_", "").replace('="$1', "=$1")
        assert f"group=$tree/{PARENT}/$1\n" in plain and f'{MARKER}=$1"' in plain
