"""The shell scripts that provision a site, under each shell that an image may have as `sh`.

Scripts that use /etc, /run and /var see folders of the test there, in a separate mount namespace, and a
`systemctl` that only records its arguments.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies

import gateway
from gateway.runtime.incus import provisioning, service_unit
from gateway.runtime.incus.service_unit import script, systemd_script
from tests.thorough import examples
from tests.waits import until_true

SHELLS: Final = {"dash": ("dash",), "bash": ("bash", "--posix"), "busybox": ("busybox", "sh")}
SCRIPTS: Final = [
    path for path in sorted(Path(gateway.__file__).parent.rglob("*.sh")) if "overlay" not in path.parts
] + sorted((Path(__file__).parents[2] / "clients/web/src").rglob("*.sh"))
INCUS: Final = Path(service_unit.__file__).parent
SYSTEMD: Final = ("start_service", "allow_domain", "apply_limits", "halt", "settle", "unsettle", "clear")
"""The scripts that wait for systemd."""
UID: Final = 65534
NAMES: Final = (
    strategies.sampled_from(["-n", "-rf", "a b", "\n", "a\nb", "'", '"', "$HOME", "*", "\udc81", "é", " "])
    | strategies.binary(min_size=1, max_size=8).map(
        lambda data: os.fsdecode(data.replace(b"\0", b"0").replace(b"/", b"."))
    )
).filter(lambda name: name not in (".", ".."))

# mounts first, and nothing else where one of them fails: the scripts change what lies there
INSIDE: Final = """
set -e
for place in etc run var; do mount --bind "$1/$place" "/$place"; done
PATH=$1/bin:$PATH
shift
exec "$@"
"""

pytestmark = [
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root mounts, and becomes another"
    ),
    pytest.mark.timeout(60),
]


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = SHELLS[request.param]
    if shutil.which(found[0]) is None:
        pytest.skip(f"there is no {found[0]} here")
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def run(
    shell: tuple[str, ...], name: str, *words: str | Path, given: bytes = b"", within: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run a script as the gateway does, with both outputs merged."""
    text = systemd_script(name) if name in SYSTEMD else script(name)
    argv = [*within, *shell, "-c", text, "sh", *words]
    return subprocess.run(
        argv, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", timeout=30
    )


def owned(folder: Path, files: dict[str, str]) -> Path:
    """Create a folder with files owned by the site's user."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
        os.chown(folder / name, UID, UID)
    os.chown(folder, UID, UID)
    return folder


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


class Machine:
    """A fake container as the scripts see it, with a record of their requests to systemd."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for folder in ("etc/systemd/system", "run/systemd/system", "var/log/journal", "bin"):
            (place / folder).mkdir(parents=True)
        (place / "var/lib/systemd").mkdir(parents=True)
        fakes = {"systemctl": f'echo "$*" >>{place}/asked', "sync": "", "du": r"printf '123\t/\n'"}
        for name, body in fakes.items():
            (place / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (place / "bin" / name).chmod(0o755)
        os.mknod(place / "run/systemd/private", stat.S_IFSOCK | 0o666)
        self.live = owned(place / "live", {"page": "old"})
        self.next = owned(place / "next", {"page": "new"})
        self.note = place / "before"
        self.unit = place / "etc/systemd/system/site.service"
        self.environment = place / "etc/site.env"
        self.kept = place / "kept"
        self.sides = (self.live, self.next, self.note)

    def run(self, shell: tuple[str, ...], name: str, *words: str | Path, given: bytes = b"") -> bytes:
        """Run a script inside; return what it printed."""
        within = ("unshare", "--mount", "/bin/sh", "-c", INSIDE, "sh", str(self.place))
        ended = run(shell, name, *words, given=given, within=within)
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    def asked(self) -> list[str]:
        """Return the requests to systemd since the last call."""
        asked = self.place / "asked"
        words = asked.read_text().splitlines() if asked.exists() else []
        asked.unlink(missing_ok=True)
        return words

    def state(self) -> dict[str, str]:
        """Return the parts of a site that an undo must restore."""
        files = {path.name: path.read_text() for path in (self.unit, self.environment) if path.exists()}
        return files | {"page": (self.live / "page").read_text()}


@pytest.fixture
def machine(place: Path) -> Machine:
    return Machine(place)


# --- files --------------------------------------------------------------------------------------------


@settings(
    max_examples=examples(8),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(strategies.sets(NAMES, min_size=1, max_size=6), strategies.integers(0, 5))
@example({"-n", "a\nb", "$HOME"}, 1)
def test_a_next_site_has_all_of_the_live_one_but_what_is_lost(
    shell: tuple[str, ...], names: set[str], count: int
) -> None:
    """Whatever the files' names; files written meanwhile are copied if they match `keep`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        live = owned(Path(folder, "live"), dict.fromkeys(names, "old"))
        following = Path(folder, "next")
        assert run(shell, "stage", live, following, str(UID), "update").returncode == 0
        assert held(following) == dict.fromkeys(names, "old")
        assert (following.stat().st_uid, following.stat().st_gid) == (UID, UID)

        lost = sorted(names)[:count]
        said = b"".join(os.fsencode(name) + b"\0" for name in lost)
        assert run(shell, "discard", following, str(UID), given=said).returncode == 0
        left = dict.fromkeys(names - {*lost}, "old")
        assert held(following) == left

        kept = sorted(names)[-1]
        (live / kept).write_text("written meanwhile")
        os.utime(live / kept, (4e9, 4e9))
        said = b"./" + os.fsencode(kept) + b"\0gone meanwhile\0"
        words = (live, following, str(UID), Path(folder, "note"), "update")
        assert run(shell, "carry", *words, given=said).returncode == 0
        assert Path(folder, "note.lasting").read_bytes() == said
        assert held(following) == left | {kept: "written meanwhile"}


def test_a_database_is_carried_without_what_the_next_site_wrote_beside_it(
    shell: tuple[str, ...], place: Path
) -> None:
    """It would be replayed: a database that was closed in order has no log file of its own."""
    live = owned(place / "live", {"a.db": "live", "b.db": "live", "b.db-wal": "live"})
    rehearsed = dict.fromkeys(("a.db", "a.db-wal", "a.db-shm", "b.db", "b.db-wal", "b.db-journal"), "next")
    following = owned(place / "next", rehearsed | {"c.db-wal": "deployed"})
    words = (live, following, str(UID), place / "note", "update")
    assert run(shell, "carry", *words, given=b"./a.db\0b.db\0b.db-wal\0").returncode == 0
    assert held(following) == {**held(live), "c.db-wal": "deployed"}


def test_what_the_sites_user_cannot_read_is_named(shell: tuple[str, ...], place: Path) -> None:
    live = owned(place / "live", {"a": "", "roots own\n%s": "secret"})
    secret = live / "roots own\n%s"
    os.chown(secret, 0, 0)
    secret.chmod(0o600)
    ended = run(shell, "stage", live, place / "next", str(UID), "update")
    _, named, path = ended.stdout.decode().rpartition(provisioning._UNREADABLE)
    assert (ended.returncode, bool(named), path) == (1, True, secret.name)


def test_files_that_vanish_while_a_site_is_copied_are_not_missed(shell: tuple[str, ...], place: Path) -> None:
    """As those of a database's transaction, of a commit or a build; all others are there."""
    names = [f"{number:04}" for number in range(2000)]
    live, following = owned(place / "live", dict.fromkeys(names, "")), place / "next"

    def vanish() -> None:
        until_true(lambda: following.exists() and any(following.iterdir()), every=0)
        for name in reversed(names[1000:]):
            (live / name).unlink()

    vanishing = threading.Thread(target=vanish)
    vanishing.start()
    ended = run(shell, "stage", live, following, str(UID), "update")
    vanishing.join()
    assert ended.returncode == 0, ended
    assert {*names[:1000]} <= held(following).keys() < {*names}, "none has vanished in time"


@pytest.mark.parametrize("script", ["discard", "carry"])
def test_nothing_is_touched_where_the_folder_is_missing(
    shell: tuple[str, ...], place: Path, script: str
) -> None:
    """The scripts would otherwise continue in /."""
    outside = owned(place / "outside", {"file": "kept"})
    target = owned(place / "target", {})
    carry = (place / "none", target, str(UID), place / "note", "update")
    words = {"discard": (place / "none", str(UID)), "carry": carry}
    path = os.fsencode(outside.relative_to("/") / "file") + b"\0"
    assert run(shell, script, *words[script], given=path).returncode != 0
    assert held(outside) == {"file": "kept"} and not held(target)


def test_an_archive_becomes_the_sites_users(shell: tuple[str, ...], place: Path) -> None:
    folder = owned(place / "site", {"index.html": "old", "other": "stays"})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("index.html")
        entry.size, entry.uid, entry.mode = 3, 0, 0o644
        archive.addfile(entry, io.BytesIO(b"new"))
    assert run(shell, "unpack", folder, str(UID), given=packed.getvalue()).returncode == 0
    assert held(folder) == {"index.html": "new", "other": "stays"}
    assert (folder / "index.html").stat().st_uid == UID
    assert run(shell, "unpack", folder, str(UID), given=b"no archive").returncode != 0


@pytest.mark.parametrize("text", [b"", b'A="b\\$c"\n' * 20_000, b"\xff\0\n\n"], ids=["none", "long", "odd"])
def test_an_environment_is_roots_alone_and_byte_for_byte(
    shell: tuple[str, ...], place: Path, text: bytes
) -> None:
    assert run(shell, "keep_environment", place / "site.env", given=text).returncode == 0
    assert (place / "site.env").read_bytes() == text
    assert (place / "site.env").stat().st_mode & 0o777 == 0o600


# --- service ------------------------------------------------------------------------------------------

UNIT: Final = "[Service]\nExecStart=\"a\\nb\" '%%' $$\n\n\n"
RESTARTED: Final = ["--quiet --no-reload enable site.service", "daemon-reload", "restart site.service"]


def test_a_live_service_is_enabled_and_a_next_one_only_started(
    shell: tuple[str, ...], machine: Machine
) -> None:
    words = ("/etc/systemd/system/site.service", "live", "site.service")
    machine.run(shell, "start_service", *words, given=UNIT.encode())
    assert machine.unit.read_text() == UNIT
    assert machine.asked() == RESTARTED
    words = ("/run/systemd/system/site-next.service", "next", "site-next.service")
    machine.run(shell, "start_service", *words, given=UNIT.encode())
    assert (machine.place / words[0].lstrip("/")).read_text() == UNIT
    assert machine.asked() == ["daemon-reload", "restart site-next.service"]


def test_both_services_are_told_the_domain(shell: tuple[str, ...], machine: Machine) -> None:
    """If they know it already, systemd does not reload all its units."""
    for domain, asked in (("old", ["daemon-reload"]), ("shop", ["daemon-reload"]), ("shop", [])):
        machine.run(shell, "allow_domain", f"NAME={domain}.example")
        assert machine.asked() == asked
    for side in ("site", "site-next"):
        told = machine.place / f"run/systemd/system/{side}.service.d/domain.conf"
        assert told.read_text() == '[Service]\nEnvironment="NAME=shop.example"\n'


@pytest.mark.parametrize("name", SYSTEMD)
def test_a_container_that_has_just_started_is_waited_for(
    shell: tuple[str, ...], machine: Machine, name: str
) -> None:
    """Until systemd listens. What is in /run before goes as soon as systemd has mounted its own."""
    run = machine.place / "run"
    (run / "systemd/private").rename(machine.place / "socket")
    (machine.place / "bin/sleep").write_text(
        f"#!/bin/sh\nfind {run} -type f >>{machine.place}/asked\nrm -rf {run}/*\n"
        f"mkdir -p {run}/systemd/system\ncp -a {machine.place}/socket {run}/systemd/private\n"
        f"echo up >>{machine.place}/asked\n"
    )
    (machine.place / "bin/sleep").chmod(0o755)
    machine.note.write_text(f"{machine.live.stat().st_ino}\n")
    machine.unit.write_text(UNIT)
    shutil.copy(machine.unit, f"{machine.unit}.old")
    words = {
        "start_service": ("/run/systemd/system/site-next.service", "next", "site-next.service"),
        "allow_domain": ("NAME=shop.example",),
        "apply_limits": ("85%",),
        "halt": (machine.live, machine.note),
        "settle": (*machine.sides, "update"),
        "unsettle": machine.sides,
        "clear": (*machine.sides, machine.kept, str(UID)),
    }
    machine.run(shell, name, *words[name], given=UNIT.encode())
    first, *asked = machine.asked()
    assert first == "up" and asked
    made = {path.name for path in run.rglob("*") if path.is_file()}
    assert made == {"start_service": {"site-next.service"}, "allow_domain": {"domain.conf"}}.get(name, set())


def test_a_sealed_container_shares_no_id_and_no_log(shell: tuple[str, ...], machine: Machine) -> None:
    gone = [machine.place / path for path in ("var/log/journal/a", "var/lib/systemd/random-seed")]
    machine_id = machine.place / "etc/machine-id"
    for path in (*gone, machine_id):
        path.write_text("x")
    with machine_id.open() as before:
        assert machine.run(shell, "seal")[-12:] == b"         123"
        # made anew, so that a copy's first write parts nothing that lies beside the old one
        assert os.fstat(before.fileno()).st_nlink == 0
    assert not any(path.exists() for path in gone) and machine_id.read_bytes() == b""
    assert machine_id.stat().st_mode & 0o777 == 0o444
    assert machine.asked()[0] == "stop site.service"


# --- the exchange -------------------------------------------------------------------------------------


def exchanged(shell: tuple[str, ...], machine: Machine, how: str, unit: str) -> None:
    machine.run(shell, "halt", machine.live, machine.note)
    machine.run(shell, "settle", *machine.sides, how, given=unit.encode())


@pytest.mark.parametrize("before", [{}, {"unit": "old\n", "environment": "A=old\n"}], ids=["first", "later"])
@pytest.mark.parametrize("environment", [None, "A=new\n"], ids=["same", "changed"])
def test_an_exchange_is_idempotent_and_so_is_its_undo(
    shell: tuple[str, ...], machine: Machine, before: dict[str, str], environment: str | None
) -> None:
    for name, text in before.items():
        getattr(machine, name).write_text(text)
    if environment is not None:
        (machine.place / "etc/site-next.env").write_text(environment)
    was = machine.state()
    expected = was | {"site.service": UNIT, "page": "new"}
    if environment is not None:
        expected["site.env"] = environment
    for _ in range(2):
        exchanged(shell, machine, "update", UNIT)
        assert machine.state() == expected
        assert machine.asked() == ["stop site-next.service site.service", *RESTARTED]
    for _ in range(2):
        machine.run(shell, "unsettle", *machine.sides)
        assert machine.state() == was
    again = ["daemon-reload", "restart site.service"]
    assert machine.asked() == (again if before else ["--quiet disable --now site.service"])


def test_an_exchange_that_was_cut_off_after_the_note_is_finished_or_undone(
    shell: tuple[str, ...], machine: Machine
) -> None:
    """The note records which folder was live, so it can be seen whether they were exchanged."""
    machine.unit.write_text("old\n")
    shutil.copy(machine.unit, f"{machine.unit}.old")
    machine.note.write_text(f"{machine.live.stat().st_ino}\n")
    machine.run(shell, "unsettle", *machine.sides)
    assert machine.state() == {"site.service": "old\n", "page": "old"}

    exchanged(shell, machine, "update", UNIT)
    assert machine.state() == {"site.service": UNIT, "page": "new"}


def test_nothing_of_an_exchange_is_left_once_it_is_cleared(shell: tuple[str, ...], machine: Machine) -> None:
    before = {path for path in machine.place.rglob("*") if path.is_file()} | {machine.unit}
    machine.unit.write_text("old\n")
    machine.environment.write_text("A=old\n")
    (machine.place / "etc/site-next.env").write_text("A=new\n")
    words = ("/run/systemd/system/site-next.service", "next", "site-next.service")
    machine.run(shell, "start_service", *words, given=UNIT.encode())
    exchanged(shell, machine, "update", UNIT)
    machine.asked()
    for _ in range(2):
        machine.run(shell, "clear", *machine.sides, machine.kept, str(UID))
        assert machine.asked() == [
            *("stop site-next.service", "reset-failed site-next.service"),
            "daemon-reload",
        ]
        left = {path for path in machine.place.rglob("*") if path.is_file()}
        assert left - before == {machine.environment} and not machine.next.exists()
    assert machine.state() == {"site.service": UNIT, "site.env": "A=new\n", "page": "new"}


# --- former sites -------------------------------------------------------------------------------------

FIRST, SECOND, THIRD = (f"d-{digit * 16}" for digit in "123")


def put(shell: tuple[str, ...], machine: Machine, former: str, live: str, most: int = 10) -> None:
    words = (*machine.sides, machine.kept, former, live, str(most), str(UID))
    machine.run(shell, "put_former", *words)


def updated(shell: tuple[str, ...], machine: Machine, page: str, former: str, live: str, most: int) -> None:
    """Make another site live, and keep the previous one."""
    if not machine.next.exists():
        owned(machine.next, {"page": page})
    (machine.place / "etc/site-next.env").write_text(f"PAGE={page}\n")
    exchanged(shell, machine, "update", f"{page}\n")
    for _ in range(2):
        put(shell, machine, former, live, most)
    machine.run(shell, "clear", *machine.sides, machine.kept, str(UID))


def listed(machine: Machine) -> list[str]:
    return [line.split()[0] for line in (machine.kept / "list").read_text().splitlines()]


def test_former_sites_are_kept_up_to_a_number_and_the_oldest_go(
    shell: tuple[str, ...], machine: Machine
) -> None:
    """With environment and unit, readable only by root; without files that a manifest has stay live."""
    machine.unit.write_text("old\n")
    machine.environment.write_text("PAGE=old\n")
    written = os.fsdecode(b"by\nnobody's \xff")
    (machine.live / "db").write_text("customers'")
    (machine.live / written).write_text("once")
    Path(f"{machine.note}.lasting").write_bytes(b"db\0./%b\0gone\0" % os.fsencode(written))
    for folder in (machine.live, machine.next):
        owned(folder / ".git", {"HEAD": folder.name})
    updated(shell, machine, "new", FIRST, SECOND, 2)
    kept = machine.kept / FIRST
    assert held(kept / "site") == {"page": "old", written: "once"}
    assert (kept / "site.env").read_text() == "PAGE=old\n"
    assert (kept / "site.service").read_text() == "old\n"
    assert (machine.kept.stat().st_mode & 0o777, listed(machine)) == (0o700, [FIRST])
    assert (machine.kept / "live").read_text() == SECOND
    assert (machine.live / ".git/HEAD").read_text() == "next"
    updated(shell, machine, "newer", SECOND, THIRD, 2)
    assert listed(machine) == [FIRST, SECOND]
    updated(shell, machine, "newest", THIRD, FIRST[:-1] + "4", 2)
    assert listed(machine) == [SECOND, THIRD]
    assert not kept.exists() and not machine.next.exists()
    machine.run(shell, "drop_former", machine.kept, "1")
    assert listed(machine) == [THIRD] and not (machine.kept / SECOND).exists()
    updated(shell, machine, "last", SECOND, THIRD, 0)
    assert listed(machine) == [] and {path.name for path in machine.kept.iterdir()} == {"list", "live"}


def test_a_former_site_comes_back_and_one_that_does_not_is_put_back(
    shell: tuple[str, ...], machine: Machine
) -> None:
    """The repository stays with the live site, however often each step is repeated."""
    machine.unit.write_text("old\n")
    machine.environment.write_text("PAGE=old\n")
    updated(shell, machine, "new", FIRST, SECOND, 2)
    owned(machine.live / ".git", {"HEAD": "mine"})
    live, before = machine.state(), sorted(machine.kept.rglob("*"))
    for settles in (False, True):
        machine.run(shell, "take_former", machine.next, machine.kept, FIRST)
        assert held(machine.next) == {"page": "old"}
        assert (machine.place / "etc/site-next.env").read_text() == "PAGE=old\n"
        if settles:
            for _ in range(2):
                exchanged(shell, machine, "rollback", "old\n")
            assert machine.state() == {"site.service": "old\n", "site.env": "PAGE=old\n", "page": "old"}
            assert (machine.live / ".git/HEAD").read_text() == "mine"
        for _ in range(2):
            machine.run(shell, "unsettle", *machine.sides)
            machine.run(shell, "clear", *machine.sides, machine.kept, str(UID))
        assert machine.state() == live
        assert (machine.live / ".git/HEAD").read_text() == "mine"
        assert sorted(machine.kept.rglob("*")) == before
    machine.run(shell, "take_former", machine.next, machine.kept, FIRST)
    exchanged(shell, machine, "rollback", "old\n")
    put(shell, machine, SECOND, THIRD)
    machine.run(shell, "clear", *machine.sides, machine.kept, str(UID))
    assert (listed(machine), held(machine.kept / SECOND / "site")) == ([SECOND], {"page": "new"})
    assert (machine.live / ".git/HEAD").read_text() == "mine"
    assert not (machine.kept / FIRST).exists() and not machine.next.exists()


def test_an_environment_changes_without_an_exchange(shell: tuple[str, ...], machine: Machine) -> None:
    machine.unit.write_text("old\n")
    machine.environment.write_text("A=old\n")
    (machine.place / "etc/site-next.env").write_text("A=new\n")
    exchanged(shell, machine, "environment", "old\n")
    assert machine.state() == {"site.service": "old\n", "site.env": "A=new\n", "page": "old"}
    put(shell, machine, FIRST, SECOND)
    machine.run(shell, "clear", *machine.sides, machine.kept, str(UID))
    assert machine.state() == {"site.service": "old\n", "site.env": "A=new\n", "page": "old"}
    assert (machine.kept / FIRST / "site.env").read_text() == "A=old\n"


# all in one namespace, as in one life of a container
CHANGED: Final = """
place=$1 uid=$2 shell=$3
for name in etc run var; do mount --bind "$place/$name" "/$name"; done
PATH=$place/bin:$PATH
script() { name=$1; shift; $shell -c "$(cat "$place/$name.sh")" sh "$place/live" "$place/next" "$@"; }
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"; }
script stage "$uid" environment
[ ! -d "$place/next.layers" ] || echo layers
as_site sh -c 'cd "$1"; echo next >page; echo next >own; rm removed' sh "$place/next"
cat "$place/live/page"
as_site sh -c 'echo agent >"$1/edited"' sh "$place/live"
for _ in $6; do script copy_former "$uid"; done
$shell -c "$(cat "$place/halt.sh")" sh "$place/live" "$place/before"
echo old | script settle "$place/before" environment
as_site sh -c 'echo agent >"$1/later"' sh "$place/live"
for _ in 1 2; do script put_former "$place/before" "$place/kept" "$4" "$5" 2 "$uid"; done
script clear "$place/before" "$place/kept" "$uid"
! grep "$place/next" /proc/self/mounts
"""


@pytest.mark.parametrize(
    ("layers", "ahead"),
    [(True, "1 2"), (True, ""), (False, "1 2")],
    ids=["copied_ahead", "copied_at_last", "no_layers"],
)
def test_a_site_whose_environment_changes_is_served_beside_itself(
    shell: tuple[str, ...], machine: Machine, layers: bool, ahead: str
) -> None:
    """What the next one writes goes with it. Where the kernel makes no layers it has a copy."""
    machine.unit.write_text("old\n")
    machine.environment.write_text("A=old\n")
    owned(machine.live / "folder", {"file": "old"})
    (machine.live / "removed").write_text("old")
    os.chown(machine.live / "removed", UID, UID)
    for name in ("stage", "copy_former", "halt", "settle", "put_former", "clear"):
        (machine.place / f"{name}.sh").write_text((INCUS / f"{name}.sh").read_text())
    if not layers:
        (machine.place / "bin/mount").write_text(
            '#!/bin/sh\n[ "$2" != overlay ] || exit 32\nexec /bin/mount "$@"\n'
        )
        (machine.place / "bin/mount").chmod(0o755)
    words = (str(machine.place), str(UID), " ".join(shell), FIRST, SECOND, ahead)
    ended = subprocess.run(
        ("unshare", "--mount", "/bin/sh", "-ec", CHANGED, "sh", *words), capture_output=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode().split() == [*(["layers"] if layers else []), "old"]
    assert {name: (machine.live / name).read_text() for name in ("page", "removed")} == {
        "page": "old",
        "removed": "old",
    }
    assert not (machine.live / "own").exists()
    former = machine.kept / FIRST / "site"
    assert (former / "folder/file").read_text() == "old"
    assert (former / "edited").exists() == layers, "the live site as it was when it was copied"
    assert (former / "later").exists() == (not ahead)
    assert sorted(path.name for path in machine.place.glob("next*")) == []
    assert (listed(machine), (machine.kept / "live").read_text()) == ([FIRST], SECOND)


# --- the files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_how_it_is_called(script: Path) -> None:
    header = re.match(r"(#.*\n)*", script.read_text())
    assert header is not None
    for word in ("Usage:", "Input:", "Output:", "Exit:"):
        assert word in header[0]
