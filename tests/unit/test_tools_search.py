"""Glob and Grep where Claude's recorded cases do not reach; each was compared with ripgrep 15 once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path

import pytest

from gateway.rootfs import FilesystemRoot, walk
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import Workspace
from gateway.settings import Settings
from gateway.tools import grep
from gateway.tools.globs import Glob, GlobError, Globs
from gateway.tools.search import GrepFilter
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from gateway.tools.worker_operations import OPERATIONS
from tests.unit.test_tools_conformance import HereWorkers


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path


async def ask(site: Path, tool: str, **given: object) -> str:
    """Lay nothing, call once, return the text."""
    here = HereWorkers(site)
    try:
        tools = FileTools(here, Settings())  # type: ignore[arg-type]  # the stand-in
        root = FilesystemRoot("search", "/srv/site")
        result = await tools.call(root, ToolSession(), tool, given)
        return str(result.data()["content"][0]["text"])
    finally:
        here.close()


def lay(site: Path, **files: str) -> None:
    for name, text in files.items():
        (site / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("*.py", ["a.py", "x/y/.b.py"], ["a.pyc", "py"]),
        ("src/*.ts", ["src/a.ts"], ["src/x/a.ts", "lib/src/a.ts"]),
        ("src/**", ["src/a", "src/x/y"], ["src", "lib/src/a"]),
        ("**/deep/**", ["deep/a", "x/deep/y/z"], ["deep", "deeper/a"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/bc"]),
        ("**", ["a", "a/b"], []),
        ("**/deep/x", ["deep/x", "a/b/deep/x"], ["x", "adeep/x"]),
        ("**/**/*.py", ["a.py", "x/y/b.py"], ["a.pyc"]),
        ("[!a].c", ["b.c"], ["a.c", "ab.c", "x//c", "é.c"]),  # names are bytes
        ("{a,bc}.x", ["a.x", "bc.x"], ["b.x", "c.x"]),
        ("?.x", ["a.x"], ["ab.x", "é.x"]),
        ("??.x", ["ab.x", "é.x"], ["a.x"]),
        ("[éa-c].x", ["b.x"], ["d.x", "e.x", "é.x"]),
        ("\\[id\\].ts", ["[id].ts", "r/[id].ts"], ["i.ts"]),
        ("/a.py", ["a.py"], ["x/a.py"]),
        ("a.b", ["a.b", "x/a.b"], ["axb"]),
        ("*.{ts,tsx}", ["a.ts", "x/b.tsx", ".ts"], ["a.t", "a.ts/b", "a.tsxx", "ts"]),
        ("*_{a,}.x", ["q_a.x"], ["q_b.x", "q.x", "q_.x"]),  # an empty alternative is none
        ("{,x/}a", ["x/a"], ["a", "y/x/a"]),
        ("*{.a,.b}", ["q.a", "y/q.b"], ["q.d", "qa"]),
        ("*}", ["a", "x/a}"], []),  # what closes nothing stands for nothing
        ("**/part7.*", ["part7.js", "x/part7.d.ts"], ["part70.js", "xpart7.js", "part7.x/a"]),
        ("a*b", ["ab", "x/a-b"], ["ba", "a/b", "xab"]),
        ("a,b*", ["a,b", "x/a,bc"], ["a", "b"]),
        ("a/**/b/*.c", ["a/b/q.c", "a/x/y/b/.c"], ["a/q.c", "b/q.c", "a/b/x/q.c"]),
        ("folder/", [], ["folder", "x/folder"]),
    ],
)
def test_glob(glob: str, yes: list[str], no: list[str]) -> None:
    """A glob matches what ripgrep's does, asked for one path or for all names of a folder."""
    compiled, globs = Glob(glob), Globs([glob])
    assert [path for path in yes if not compiled.matches(path)] == []
    assert [path for path in no if compiled.matches(path) and not compiled.folders_only] == []
    for paths, wanted in ((yes, True), (no, False)):
        for path in paths:
            folder, slash, name = path.rpartition("/")
            assert (name in globs.among(folder + slash, [".", name])) is wanted, path


@pytest.mark.parametrize("glob", ["[a", "{a", "*{a", "{a,{b,c}}", "*.{a,{b}}", "a\\", "[z-a]", "x" * 5000])
def test_bad_glob(glob: str) -> None:
    """A glob that does not parse is an error, not a glob that matches nothing."""
    with pytest.raises(GlobError):
        Glob(glob)


async def test_context_of_overlapping_matches(site: Path) -> None:
    """Context of neighbouring matches is shown once, groups are parted by two dashes."""
    lay(site, a__txt="1\nx\n3\nx\n5\n6\n7\n8\nx\n10\n")
    text = await ask(site, "Grep", pattern="x", output_mode="content", **{"-C": 1})
    rows = ["-1-1", ":2:x", "-3-3", ":4:x", "-5-5", "--", "-8-8", ":9:x", "-10-10"]
    assert text.splitlines() == [row if row == "--" else "a.txt" + row for row in rows]


async def test_a_page_far_behind_the_start_is_there(site: Path) -> None:
    """Lines in front of the offset take nothing of the result's room."""
    lay(site, a__txt="".join(f"hit {n} {'x' * 400}\n" for n in range(4000)), b__txt="hit last\n")
    given = {"pattern": "hit", "output_mode": "content", "-n": False}
    answer = await ask(site, "Grep", **given, offset=4000)
    assert answer == "b.txt:hit last\n\n[Showing results with pagination = offset: 4000]"
    answer = await ask(site, "Grep", **given, offset=4001)
    assert answer.startswith("No entries at this offset")
    answer = await ask(site, "Grep", **given, offset=0)
    assert answer.endswith("[Showing results with pagination = limit: 250]")
    # separators count as lines do
    lay(site, c__txt="one\ntwo\nthree\nfour\nfive\n")
    given = {"pattern": "two|five", "output_mode": "content", "path": "c.txt", "-A": 0, "-B": 1}
    whole = (await ask(site, "Grep", **given)).split("\n")
    assert whole == ["1-one", "2:two", "--", "4-four", "5:five"]
    for offset in range(1, 5):
        page = (await ask(site, "Grep", **given, offset=offset)).split("\n\n")[0]
        assert page.split("\n") == whole[offset:]


async def test_empty_matches(site: Path) -> None:
    """A pattern that matches nothing matches each line once, and no line after the last line end."""
    lay(site, a__txt="a\n\nb\n", b__txt="a\nb\n")
    assert await ask(site, "Grep", pattern="^$", output_mode="content") == "a.txt:2:"
    assert await ask(site, "Grep", pattern="^$") == "Found 1 file\na.txt"
    count = await ask(site, "Grep", pattern="x*", output_mode="count")
    assert count.startswith("a.txt:3\nb.txt:2\n")


async def test_lines_are_not_crossed(site: Path) -> None:
    """Without multiline not even a class that includes the line end matches it; a literal one is refused."""
    lay(site, a__txt="a\nb\n")
    assert await ask(site, "Grep", pattern="a[^x]b", output_mode="content") == "No matches found"
    assert await ask(site, "Grep", pattern="a\\s+b", output_mode="content") == "No matches found"
    assert 'the literal "\\n" is not allowed' in await ask(site, "Grep", pattern="a\\nb")
    assert await ask(site, "Grep", pattern="a\\nb", multiline=True) == "Found 1 file\na.txt"


async def test_unicode_classes(site: Path) -> None:
    """Word and digit classes are Unicode's, inside brackets too."""
    lay(site, a__txt="naïve\n١٢\n-\n")
    assert await ask(site, "Grep", pattern="^\\w+$", output_mode="content", **{"-n": False}) == (
        "a.txt:naïve\na.txt:١٢"
    )
    assert await ask(site, "Grep", pattern="^[\\d]+$", output_mode="content", **{"-o": True}) == "a.txt:2:١٢"
    assert await ask(site, "Grep", pattern="^[]\\W]$", output_mode="content") == "a.txt:3:-"


async def test_ignore_files(site: Path) -> None:
    """In a repository the nearest rule decides; an ignored folder is not entered; .ignore always counts."""
    for name in ("keep.log", "drop.log", "build/x.txt", "sub/drop.log", "sub/any.txt"):
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text("hit\n")
    (site / ".gitignore").write_text("*.log\n!keep.log\nbuild/\n!build/x.txt\n")
    (site / "sub" / ".gitignore").write_text("!drop.log\n")
    assert (await ask(site, "Grep", pattern="hit", output_mode="count")).count(":1") == 5
    (site / ".git").mkdir()
    text = await ask(site, "Grep", pattern="hit", output_mode="count")
    assert text.splitlines()[:3] == ["keep.log:1", "sub/any.txt:1", "sub/drop.log:1"]
    (site / ".ignore").write_text("keep.log\n")
    assert "keep.log" not in await ask(site, "Grep", pattern="hit", output_mode="count")
    inside = await ask(site, "Grep", pattern="hit", path="/srv/site/sub", output_mode="count")
    assert inside.splitlines()[:2] == ["sub/any.txt:1", "sub/drop.log:1"]


async def test_each_kind_of_ignore_file_goes_before_the_next(site: Path) -> None:
    """What an outer .rgignore says holds against an inner .ignore, and that against any .gitignore."""
    (site / "a/b/.git").mkdir(parents=True)
    (site / "a/b/hit.txt").write_text("hit\n")
    none, found = "No files found", "Found 1 file\na/b/hit.txt"
    for name, rule, expected in (
        ("a/b/.gitignore", "*.txt", none),
        ("a/.ignore", "!*.txt", found),
        ("a/b/.ignore", "*.txt", none),
        (".rgignore", "!*.txt", found),
        ("a/.rgignore", "*.txt", none),
    ):
        (site / name).write_text(rule)
        assert await ask(site, "Grep", pattern="hit") == expected


async def test_negated_glob(site: Path) -> None:
    """A pattern that begins with ! lists everything else."""
    lay(site, a__py="", b__js="")
    assert await ask(site, "Glob", pattern="!*.py") == "b.js"


async def test_session_is_bounded() -> None:
    """A session forgets the file that was used longest ago, and of each all but how it was seen last."""
    from gateway.tools.call import Seen

    session = ToolSession(maximum=2)
    for path in ("a", "b"):
        session.remember(path, Seen("1", 1, True))
    assert session.seen("a") is not None
    session.remember("c", Seen("1", 1, True))
    assert session.seen("b") is None
    assert session.seen("a") is not None
    session.remember("a", Seen("1", 1, False))
    assert session.seen("a") == Seen("1", 1, False)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("src/*.ts", ["src/a.ts"]),
        ("src/*/*.ts", ["src/x/b.ts"]),
        ("src/**/*.ts", ["src/a.ts", "src/x/b.ts", "src/x/y/c.ts"]),
        ("src/x/**/*.ts", ["src/x/b.ts", "src/x/y/c.ts"]),
        ("src/**/y/*.ts", ["src/x/y/c.ts"]),
        ("src/**/x/*.ts", ["src/x/b.ts"]),
        ("src/{x,x/y}/*.ts", ["src/x/b.ts", "src/x/y/c.ts"]),
        ("src/x/b.ts", ["src/x/b.ts"]),
        ("link/*.ts", []),
        ("none/*.ts", []),
        ("./src/*.ts", []),
        ("src/../src/*.ts", []),
        ("!src/*.ts", ["src/x/b.ts", "src/x/y/c.ts"]),
        ("src/!*.md", []),  # the mark is one at the very beginning alone
    ],
)
async def test_folders_that_a_glob_names(site: Path, pattern: str, found: list[str]) -> None:
    """Walking only the folders that a glob can match in finds what a walk of all would find."""
    for name in ("src/a.ts", "src/x/b.ts", "src/x/y/c.ts"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).touch()
    (site / "link").symlink_to("src")
    answer = await ask(site, "Glob", pattern=pattern)
    assert sorted(answer.split("\n")) == (found or ["No files found"])


async def test_the_gateways_own_folder_is_found_by_its_name_alone(site: Path) -> None:
    (site / ".gateway" / "output").mkdir(parents=True)
    for name in (".gateway/output/a.txt", "a.txt"):
        (site / name).write_text("kept")
    assert await ask(site, "Glob", pattern="**/*.txt") == "a.txt"
    assert await ask(site, "Glob", pattern=".gateway/**/*.txt") == ".gateway/output/a.txt"
    assert await ask(site, "Grep", pattern="kept") == "Found 1 file\na.txt"


@pytest.mark.parametrize("start", ["", "src", "src/ui"])
@pytest.mark.parametrize(
    "rules",
    [
        "*.log",
        "/a.ts",
        "src/*.ts",
        "ui/",
        "a.ts\nb.*\n.c",
        "**/ui/a.*",
        "*\n!a.ts",
        "!a.ts\n*.ts\n!b.ts",
        "ui/**",
    ],
)
async def test_ignore_files_leave_out_of_many_what_they_do_of_one(site: Path, rules: str, start: str) -> None:
    """A folder's names are asked of at once where they can be; each alone gets the same answer."""
    (site / "src/ui").mkdir(parents=True)
    (site / ".git").mkdir()
    (site / ".gitignore").write_text(rules)
    tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
    names = ["a.ts", "b.ts", "b.log", ".c", "c", "ui", "a.ts.log"]
    sought = GrepFilter(tree, start, Globs(["!d.ts"]), Globs(["*.ts", "*.log", "c"]))
    untyped = GrepFilter(tree, start, Globs(["!d.ts"]), None)
    taken = GrepFilter(tree, start, Globs(["a.*"]), None)
    above = sought.above() if start else sought.enter("", {".git", ".gitignore"}, sought.above())
    assert any(above.stacks)
    for prefix in ("", "ui/", "x/ui/"):
        one = [name for name in names if not untyped._ignored(prefix + name, above, folder=False)]
        assert list(untyped.files(prefix, names, above)) == one
        assert list(sought.files(prefix, names, above)) == [
            name for name in one if name.endswith((".ts", ".log")) or name == "c"
        ]
        assert list(taken.files(prefix, names, above)) == ["a.ts", "a.ts.log"]
    tree.close()


@pytest.mark.parametrize(
    "given",
    [
        {"pattern": "[^b]", "multiline": True, "output_mode": "count"},
        {"pattern": "a", "-o": True, "output_mode": "content", "offset": 10_000_000},
    ],
)
def test_a_line_of_megabytes_is_given_up_in_time(site: Path, given: dict[str, object]) -> None:
    """Not by the end of the worker, which knows no words for it."""
    (site / "a.txt").write_text("a" * (8 << 20))
    tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
    asked = {"input": given, "cwd": "/srv/site", "seen": None, "read_first": False}
    try:
        began = time.monotonic()
        workspace = Workspace(tree, CallLimits(tool_timeout=0.5))
        reply = OPERATIONS["Grep"](workspace, {**asked, "brief": False, "named": None})
        assert time.monotonic() - began < 30
    finally:
        tree.close()
    assert isinstance(reply, bytes) and b"Search timed out after 0.5 seconds" in reply


@pytest.fixture
def kept() -> Iterator[Callable[[], int]]:
    """Say how many files' contents are kept for the next search."""
    grep.forget()
    yield lambda: len(grep._cache)
    grep.forget()


async def test_keeps_what_is_settled(
    site: Path, kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(site, a="one\n")
    monkeypatch.setattr(walk, "_SETTLED", -(10**12))
    for _ in range(2):
        assert await ask(site, "Grep", pattern="one") == "Found 1 file\na"
        assert kept() == 1
    (site / "a").write_text("two\n")
    assert await ask(site, "Grep", pattern="one") == "No files found"


async def test_keeps_nothing_that_changed_a_moment_ago(
    site: Path, kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may change again in the same tick of the clock; by a mapping it does so whatever the kernel."""
    monkeypatch.setattr(walk, "_SETTLED", 10**12)
    lay(site, a="none")
    with (site / "a").open("r+b") as file, mmap(file.fileno(), 0) as mapped:
        mapped[:] = b"one\n"
        assert await ask(site, "Grep", pattern="one") == "Found 1 file\na"
        mapped[:] = b"two\n"
        assert await ask(site, "Grep", pattern="one") == "No files found"
        assert await ask(site, "Grep", pattern="two") == "Found 1 file\na"
    assert kept() == 0
