"""Templates: what is one, and that nothing a hostile one holds is believed."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from gateway.deployments.archive import ArchiveEntry, packed, read_folder
from gateway.deployments.template import named, read_manifest, uploaded
from gateway.errors import GatewayError, InvalidParams, NotFound, TooLarge, Unavailable
from gateway.settings import Settings
from tests.archives import MANIFEST, archive, header, link, sparse
from tests.thorough import examples


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of 50 files and one MiB are the largest."""
    monkeypatch.setattr("gateway.deployments.archive.FILES", 50)
    monkeypatch.setattr("gateway.deployments.archive.BYTES", 1 << 20)


def long_names(count: int) -> bytes:
    """Return headers that each say the name of the next one."""
    one = header("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    one.size = 2
    return (one.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * count + archive()


def refused(data: bytes, kind: type[GatewayError] = InvalidParams) -> str:
    """Return what whoever uploads this is told, once it was seen to be fit for JSON and a terminal."""
    with pytest.raises(kind) as error:
        uploaded(data)
    assert error.value.facts["reason"] == "template_invalid"
    assert error.value.message.isprintable()
    assert len(error.value.message) < 500
    return error.value.message


def test_a_folder_and_its_archive_are_the_same_template(tmp_path: Path) -> None:
    """What a client packs is what the gateway reads; what is made anew is left out."""
    (tmp_path / "site.toml").write_bytes(MANIFEST)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tool").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "bin" / "tool").chmod(0o755)
    (tmp_path / "bin" / "up").symlink_to("../site.toml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "left").write_bytes(b"out")
    entries = read_folder(tmp_path)
    assert set(entries) == {"site.toml", "bin", "bin/tool", "bin/up", "empty"}
    read = uploaded(gzip.compress(packed(entries)))
    assert read.entries == entries
    assert read.entries["bin/tool"].executable
    assert read.manifest.start == ("bun", "serve.ts")
    assert not read.recipe().key, "what was uploaded is shared with nobody"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("out", "/etc/passwd"),
        ("out", "../outside"),
        ("a/b/out", "../../../outside"),
        ("out", "a/../../outside"),
        ("out", ".."),
        ("out", "a/.."),  # `a` may be a link that leads elsewhere
        ("out", "x\x1b[31m"),
        ("out", "x" * 2000),
    ],
)
def test_a_link_out_of_the_folder_is_refused(name: str, target: str) -> None:
    assert "points outside" in refused(archive(("a/b/c", b""), link(name, target)))


def test_a_link_within_the_folder_stays() -> None:
    links = {"a/b/up": "../../site.toml", "here": ".", "there": "a/b", "a/nothing": "no/such"}
    template = uploaded(archive(*(link(name, target) for name, target in links.items())))
    assert {path: entry.link for path, entry in template.entries.items() if entry.link} == links


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE])
def test_a_device_a_pipe_and_a_hard_link_in_an_archive_are_refused(kind: bytes) -> None:
    assert "is a device" in refused(archive(header("odd", kind, "site.toml")))


def told(**facts: str) -> bytes:
    """Return a tar of which an extended header tells these facts."""
    return archive(header("big", tarfile.REGTYPE, **facts), form=tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        sparse(10 << 30),
        told(**{"GNU.sparse.map": "0,0", "GNU.sparse.size": "1"}),
        told(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}),
        told(**{"GNU.sparse.size": "99999999999", "GNU.sparse.numblocks": "1"}),
        told(**{"GNU.sparse.map": ",".join(["9999,0"] * 10_000)}),
        told(comment="x" * 70_000),
        told(**{f"a.{n}": "x" for n in range(40)}),
    ],
)
def test_what_is_no_plain_tar_is_refused_before_it_is_there(data: bytes) -> None:
    said = refused(data)
    assert "plain tar" in said or "a sparse file" in said


def test_an_archive_takes_the_time_and_room_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of pieces, facts, headers, names of folders: each is refused, or read in a moment."""
    monkeypatch.undo()  # with the product's own limits
    one = header("a", tarfile.REGTYPE, **{f"a.{n}": "x" for n in range(31)})
    hostile = (
        gzip.compress(told(**{"GNU.sparse.map": "9999,0," * 1_000_000})),
        one.tobuf(tarfile.PAX_FORMAT) * 2_500,
        archive(*((f"node_modules/{n}", b"") for n in range(5_000))),
        archive(*(("ab/" * 31 + str(n), b"") for n in range(2_300))),
    )
    tracemalloc.start()
    try:
        for data in hostile:
            began = time.process_time()
            with contextlib.suppress(GatewayError):
                uploaded(data)
            assert time.process_time() - began < 4  # each allocation is traced meanwhile
        assert tracemalloc.get_traced_memory()[1] < 25 << 20
    finally:
        tracemalloc.stop()


LONG = header("c", tarfile.DIRTYPE, path="e" * 120)
WHOLE = archive(("a/b", b"x" * 600), link("c", "a"), LONG, form=tarfile.PAX_FORMAT)


@settings(deadline=None, max_examples=examples(200))
@given(
    strategies.lists(
        strategies.tuples(strategies.integers(0, len(WHOLE) - 1), strategies.integers(0, 255)), max_size=6
    ),
    strategies.booleans(),
)
def test_an_archive_with_any_bytes_changed_is_read_or_refused(
    changes: list[tuple[int, int]], summed: bool
) -> None:
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    for start in range(0, len(data), 512) if summed else ():  # so that more than its sum is looked at
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    with contextlib.suppress(InvalidParams, TooLarge):
        uploaded(bytes(data))


@settings(deadline=None, max_examples=examples(200))
@given(strategies.binary(max_size=300), strategies.text("[]{}\"'=.,1aé\\\n#-", max_size=300))
def test_any_manifest_is_read_or_refused(odd: bytes, text: str) -> None:
    for said in (odd, text.encode(), MANIFEST + text.encode()):
        with contextlib.suppress(InvalidParams):
            uploaded(archive(manifest=said))


@pytest.mark.parametrize(
    "line",
    [
        "[a{n}]\n",
        "a{n} = 1\n",
        "[[a.b.c]]\n",
        "a{n}.b.c.d = 1\n",
        "x{n} = {{a = [1, [2]]}}\n",
        "s{n} = '''\n'''\n",
        's{n} = "\\u0041\\n\\n\\n"\n',
        "a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a{n} = 1\n",
    ],
)
def test_the_largest_manifest_is_read_in_a_moment(line: str) -> None:
    lines = "".join(line.format(n=n) for n in range(20_000))[: 63 << 10]
    began = time.process_time()
    with contextlib.suppress(InvalidParams):
        uploaded(archive(manifest=MANIFEST + lines.encode()))
    assert time.process_time() - began < 1


def test_a_pipe_and_a_socket_in_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_bytes(MANIFEST)
    os.mkfifo(tmp_path / "pi\npe")
    with pytest.raises(InvalidParams, match=r"pi\\npe is a device, a pipe or a socket"):
        read_folder(tmp_path)
    (tmp_path / "pi\npe").unlink()
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o666)
    with pytest.raises(InvalidParams, match="socket is a device, a pipe or a socket"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "new\nline",
        "esc\x1b[2J",
        "not-\udcff-text",  # bytes that are not UTF-8
        "right\u202eleft",
        "/etc/passwd",
        "../outside",
        "a/../../outside",
        "a//b",
        "a/./b",
        "n" * 256,
        "p/" * 40 + "deep",
        "/".join(["long" * 50] * 8),
    ],
)
def test_an_odd_name_is_refused(name: str) -> None:
    said = refused(archive((name, b"x")))
    assert "is not plain" in said or "is too long" in said


def test_two_of_one_name_and_what_lies_below_a_file_or_a_link_are_refused() -> None:
    assert "appears twice" in refused(archive(("a", b"1"), link("a", "/etc")))
    assert "lies below" in refused(archive(("a", b"1"), ("a/b", b"2")))
    assert "lies below" in refused(archive(link("a", "b"), ("a/b", b"2")))
    assert "lies below" in refused(archive(header("a", tarfile.DIRTYPE), ("a/b", b"2"), link("a", "c")))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: archive(("a", bytes(2 << 20))), id="2 MB"),
        pytest.param(
            lambda: archive(header("a", tarfile.REGTYPE, size="99999999999"), form=tarfile.PAX_FORMAT),
            id="100 GB that are not there",
        ),
        pytest.param(lambda: gzip.compress(archive(("node_modules/a", bytes(64 << 20)))), id="a gzip bomb"),
        pytest.param(lambda: archive(*((f"{n}", bytes(40_000)) for n in range(40))), id="many bytes in all"),
        pytest.param(lambda: archive(*((f"{n}", b"") for n in range(51))), id="too many files"),
        pytest.param(
            lambda: archive(*((f"{n}/a/b/c/d/e/f/g", b"") for n in range(10))), id="too many folders"
        ),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_there(data: Callable[[], bytes]) -> None:
    assert "at most" in refused(data(), TooLarge)


def test_a_folder_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_bytes(MANIFEST)
    with (tmp_path / "big").open("wb") as big:
        big.truncate(10 << 30)
    with pytest.raises(TooLarge, match="at most 1048576 bytes"):
        read_folder(tmp_path)
    (tmp_path / "big").unlink()
    for number in range(60):
        (tmp_path / f"{number}").touch()
    with pytest.raises(TooLarge, match="at most 50 files"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: b"no tar", id="no tar"),
        pytest.param(lambda: gzip.compress(archive())[:-30], id="half a gzip"),
        pytest.param(lambda: archive(("a", b"x" * 10_000))[:3000], id="half a tar"),
        pytest.param(lambda: long_names(3000), id="a chain of headers"),
        pytest.param(lambda: archive(link("site.toml", "other"), manifest=None), id="a link for a manifest"),
        pytest.param(
            lambda: archive(header("a", tarfile.REGTYPE, size="-1"), form=tarfile.PAX_FORMAT, manifest=b""),
            id="a size below nothing",
        ),
    ],
)
def test_what_is_no_template_is_refused(data: Callable[[], bytes]) -> None:
    refused(data())


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ('"node index.js"', ("node", "index.js")),
        ("""'vite --port $PORT --base "/a b"'""", ("vite", "--port", "3000", "--base", "/a b")),
        ('["vite", "--port=${PORT}"]', ("vite", "--port=3000")),
        ('["x", "$PORTS", "$$PORT", "\\\\$PORT"]', ("x", "$PORTS", "$$PORT", r"\$PORT")),
        ('"npm ci && exec node x"', ("sh", "-c", "npm ci && exec node x")),
        ('"A=b node x"', ("sh", "-c", "A=b node x")),
        ('"node x --at ${PORT:-80}/$HOST"', ("sh", "-c", "node x --at ${PORT:-80}/$HOST")),
        ('["sh", "-c", "node x ${PORT:-80}"]', ("sh", "-c", "node x ${PORT:-80}")),
    ],
)
def test_a_command_is_words_or_a_string_with_its_port(start: str, words: tuple[str, ...]) -> None:
    template = uploaded(archive(manifest=f"start = {start}\n".encode()))
    assert template.recipe().command(3000) == words


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (b"start = []", "start"),
        (b"start = 1", "start: it must be a list of words"),
        (b'start = ""', "start"),
        (b'start = "a \'b"', "start: it has an unclosed quote"),
        (b'start = "' + b"x" * 5000 + b'"', "start: it has over 4096 characters"),
        (
            b'start = ["vite", "--port", "${PORT:-3000}"]',
            r"start: \$\{PORT:-3000\} needs a shell; write \$PORT",
        ),
        (b'start = [""]', "start"),
        (b"start = [1]", "start"),
        (b'start = ["new\\nline"]', "start"),
        (b'start = ["esc\\u001b[2J"]', "start"),
        (b'start = ["' + b"x" * 5000 + b'"]', "start"),
        (b"start = [" + b'"x",' * 65 + b"]", "start"),
        (MANIFEST + b"port = 80", "port"),
        (MANIFEST + b"port = 65536", "port"),
        (MANIFEST + b"port = 1e400", "port"),
        (MANIFEST + b"port = true", "port"),
        (MANIFEST + b'port = "x"', "port"),
        (MANIFEST + b"port = " + b"9" * 5000, "TOML"),
        (MANIFEST + b'health = "http://elsewhere/"', "health"),
        (MANIFEST + b'health = "/a b"', "health"),
        (MANIFEST + b'health = "/\\r\\nHost: x"', "health"),
        (MANIFEST + b"install = {a = 1}", "install"),
        (MANIFEST + b"warm = [" + b'"/",' * 17 + b"]", "warm"),
        (MANIFEST + b'description = "' + b"x" * 501 + b'"', "description"),
        (MANIFEST + b"unknown = 1", "unknown"),
        (MANIFEST + b'"\\u001b[2J\\u202e' + b"x" * 5000 + b'" = 1', r"\\x1b\[2J\\u202e"),
        (MANIFEST + b"port = 3000\nport = 3001", "TOML"),
        (MANIFEST + b"\xff", "TOML"),
        (b"start = " + b"[" * 20_000 + b"]" * 20_000, "nested"),
        (MANIFEST + b"# " + b"x" * (64 << 10), "64 KiB"),
    ],
)
def test_an_odd_manifest_is_refused_and_the_message_says_where(manifest: bytes, told: str) -> None:
    with pytest.raises(InvalidParams, match=told):
        uploaded(archive(manifest=manifest))
    refused(archive(manifest=manifest))


def test_the_operators_templates_win_over_ours_and_a_broken_one_says_what_is_wrong(tmp_path: Path) -> None:
    settings = Settings(templates_dir=tmp_path)
    assert "port = 3000" in named("static", settings).entries["site.toml"].content.decode()  # type: ignore[union-attr]  # it is there
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "site.toml").write_bytes(MANIFEST)
    assert named("static", settings).manifest.start == ("bun", "serve.ts")
    with pytest.raises(NotFound, match="there are: static, vite-react") as missing:
        named("nothing", settings)
    assert missing.value.facts["reason"] == "template_missing"
    # a folder that is taken away while it is read, or that its owner keeps to himself
    (tmp_path / "static" / "site.toml").unlink()
    (tmp_path / "static" / "site.toml").symlink_to("manifest")
    (tmp_path / "static" / "manifest").write_bytes(MANIFEST)
    with pytest.raises(InvalidParams, match=r"site\.toml is a folder or a link"):
        named("static", settings)


def test_a_folder_that_cannot_be_read_is_told_without_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "site.toml").write_bytes(MANIFEST)

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gateway.deployments.template.read_folder", denied)
    with pytest.raises(Unavailable, match="Permission denied") as error:
        named("mine", Settings(templates_dir=tmp_path))
    assert str(tmp_path) not in error.value.message


def test_an_update_is_younger_than_what_was_there() -> None:
    """Python and others believe what they made of a file of the same age and size."""
    began = int(time.time())
    with tarfile.open(fileobj=io.BytesIO(uploaded(archive(("a/b", b""))).recipe().archive)) as tar:
        assert all(member.mtime >= began for member in tar)


@pytest.mark.parametrize(
    "said",
    [
        "a" + ".a" * 32_000 + " = 1",
        "\n".join("a." * 127 + f"k{number} = 1" for number in range(250)),
        "[" + "a." * 32_000 + "b]",
        "a = " + "[" * 30_000,
        "a = " + "{a=" * 15_000,
        "[[a]]\n" * 10_000,
    ],
    ids=["key", "keys", "table", "lists", "tables", "array"],
)
def test_a_hostile_manifest_costs_little(said: str) -> None:
    """A key of many parts took the parser 12 s and 4 GiB, in a thread of the gateway."""
    began = time.process_time()
    with pytest.raises(InvalidParams):
        read_manifest(ArchiveEntry(said.encode()))
    assert time.process_time() - began < 5
