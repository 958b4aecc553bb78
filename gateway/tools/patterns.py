"""Knows ripgrep's globs, the rules of ignore files, and file types.

All matching is by RE2, in time linear to the name: a glob is the client's and an ignore file the tenant's,
and `*a*a*a*a*b` must cost neither of them anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Final

import re2

from gateway.errors import GatewayError
from gateway.rootfs.tree import Tree
from gateway.rootfs.walk import Names

GLOB_MAX = 2000  # characters of one glob
_RULES_MAX = 2000  # rules of one ignore file
_IGNORE_FILE_MAX = 256 << 10  # bytes of one ignore file
_MEMORY = 1 << 20  # bytes of one compiled glob; re2 refuses what needs more
_ONE = rb"(?:[\x00-\x2e\x30-\x7f]|[\xc2-\xf4][\x80-\xbf]+|[\x80-\xff])"  # one UTF-8 character, no slash

_OPTIONS = re2.Options()
_OPTIONS.encoding = re2.Options.Encoding.LATIN1  # names are bytes
_OPTIONS.max_mem = _MEMORY
_OPTIONS.log_errors = False
_OPTIONS.dot_nl = True


class GlobError(Exception):
    """A glob that does not parse, in the words of ripgrep's parser."""

    def __init__(self, glob: str, words: str) -> None:
        super().__init__(f"error parsing glob '{glob}': {words}")


def _literal(byte: int) -> bytes:
    return b"\\x%02x" % byte


def _translate(glob: str) -> bytes:
    """Return the glob as a regular expression over bytes, in which `*` and `?` do not match a slash."""
    data = os.fsencode(glob)
    out: list[bytes] = []
    depth = 0
    i, n = 0, len(data)
    while i < n:
        char = data[i : i + 1]
        i += 1
        if char == b"*":
            if data[i : i + 1] != b"*":
                out.append(b"[^/]*")
                continue
            while data[i : i + 1] == b"*":
                i += 1
            starts = not out or out[-1] == b"/" or out[-1] in (b"(?:", b"|")
            if starts and data[i : i + 1] == b"/":
                i += 1
                out.append(b"(?:[^/]+/)*")
            elif starts and i == n:
                out.append(b".+" if out else b".*")
            else:
                out.append(b"[^/]*")
        elif char == b"?":
            out.append(_ONE)
        elif char == b"[":
            end = data.find(b"]", i + 2 if data[i : i + 1] in (b"!", b"^") else i + 1)
            if end < 0:
                raise GlobError(glob, "unclosed character class; missing ']'")
            out.append(_class(glob, data[i:end]))
            i = end + 1
        elif char == b"{":
            depth += 1
            if depth > 10:
                raise GlobError(glob, "alternate groups are nested too deep")
            out.append(b"(?:")
        elif char == b"}":
            if not depth:
                raise GlobError(glob, "unopened alternate group; missing '{' (maybe escape '}' with '[}]'?)")
            depth -= 1
            out.append(b")")
        elif char == b"," and depth:
            out.append(b"|")
        elif char == b"\\":
            if i == n:
                raise GlobError(glob, "dangling '\\'")
            out.append(_literal(data[i]))
            i += 1
        elif char == b"/":
            out.append(b"/")
        else:
            out.append(_literal(char[0]))
    if depth:
        raise GlobError(glob, "unclosed alternate group; missing '}' (maybe escape '{' with '[{]'?)")
    return b"".join(out)


def _class(glob: str, inside: bytes) -> bytes:
    """Translate what stands in brackets. Of ranges beyond ASCII only the two ends are known."""
    negated = inside[:1] in (b"!", b"^")
    text = os.fsdecode(inside[1:] if negated else inside)
    plain: list[bytes] = []
    wide: list[bytes] = []
    i = 0
    while i < len(text):
        low = high = text[i]
        if text[i + 1 : i + 2] == "-" and i + 2 < len(text):
            high = text[i + 2]
            i += 2
        i += 1
        if high < low:
            raise GlobError(glob, f"invalid range; '{low}' > '{high}'")
        if high < "\x80":
            plain.append(_literal(ord(low)) + b"-" + _literal(ord(high)))
        else:
            wide += [b"".join(map(_literal, os.fsencode(char))) for char in (low, high)]
    if not negated:
        return b"(?:" + b"|".join([b"[" + b"".join(plain) + b"]"] * bool(plain) + wide) + b")"
    # Any other character; those of more than one byte are not told apart.
    return b"(?:[^/\\x80-\\xff" + b"".join(plain) + b"]|[\\xc2-\\xf4][\\x80-\\xbf]+|[\\x80-\\xff])"


_WILD: Final = frozenset("*?[]{}\\/")


def _endings(text: str) -> tuple[str, ...] | None:
    """Return what `text` can be where nothing in it is wild but one group of alternatives, else None."""
    before, brace, rest = text.partition("{")
    inside, closed, after = rest.partition("}")
    if not _WILD.isdisjoint(before + inside + after) or bool(brace) != bool(closed):
        return None
    return tuple(before + one + after for one in inside.split(","))


class Glob:
    """One glob of an override or an ignore file: `negated`, `folders_only`, and whether it `matches`.

    `name` is the one file name that it matches anywhere, None where it is not as simple.
    """

    __slots__ = ("_endings", "_head", "_regex", "_tail", "folders_only", "name", "negated")

    def __init__(self, pattern: str) -> None:
        if len(pattern) > GLOB_MAX:
            raise GlobError(pattern[:40] + "…", "too long")
        body = pattern
        self.negated = body.startswith("!")
        if self.negated:
            body = body[1:]
        if body.startswith(("\\!", "\\#")):
            body = body[1:]
        self.folders_only = body.endswith("/")
        body = body.rstrip("/") if self.folders_only else body
        # "**/x" says no more than "x" does.
        while body.startswith("**/") and "/" not in body[3:] and body[3:]:
            body = body[3:]
        anchored = "/" in body
        body = body[1:] if body.startswith("/") else body
        # Two short cuts for what most globs are, a name or its ending; both without a regular expression.
        self.name = body if not anchored and _WILD.isdisjoint(body) else None
        self._endings = _endings(body[1:]) if not anchored and body.startswith("*") else None
        # What stands before the first and after the last wildcard: cheap questions that most names answer
        # with no. A name's beginning is known only where a glob does not speak of its folders.
        literals = re.split(r"[*?\[\]{}\\]", body)
        self._head = "" if anchored else literals[0]
        self._tail = literals[-1]
        self._regex = None
        if self.name is None and self._endings is None:
            expression = _translate(body)
            if not anchored:
                expression = b"(?:.*/)?" + expression
            try:
                self._regex = re2.compile(expression, _OPTIONS)
            except re2.error:
                raise GlobError(pattern, "too complex") from None

    def kind(self) -> tuple[bool, bool, bool]:
        """Return what globs must have in common to be asked as one: whether a plain name, and the marks."""
        return self.name is not None, self.negated, self.folders_only

    def matches(self, path: str) -> bool:
        if self._endings is not None:
            return path.endswith(self._endings)
        if self.name is not None:
            return path == self.name or path.endswith("/" + self.name)
        assert self._regex is not None
        if not path.endswith(self._tail):
            return False
        return self._regex.fullmatch(os.fsencode(path)) is not None

    def among(self, prefix: str, names: Sequence[str]) -> Collection[str]:
        """Return those of the names of files in the folder `prefix`, with its slash, that it matches."""
        if self.folders_only:
            return ()
        if self._endings is not None:
            endings = self._endings
            return [name for name in names if name.endswith(endings)]
        if self.name is not None:
            return (self.name,) if self.name in names else ()
        head, tail, matches = self._head, self._tail.rpartition("/")[2], self.matches
        likely = [name for name in names if name.startswith(head) and name.endswith(tail)]
        return [name for name in likely if matches(prefix + name)]


class _Names:
    """Globs that stand together and say the same of one name each: one look for all of them."""

    __slots__ = ("_names", "folders_only", "negated")

    def __init__(self, names: Iterable[str], *, negated: bool, folders_only: bool) -> None:
        self._names = frozenset(names)
        self.negated = negated
        self.folders_only = folders_only

    def matches(self, path: str) -> bool:
        return path.rpartition("/")[2] in self._names

    def among(self, prefix: str, names: Sequence[str]) -> Collection[str]:
        return () if self.folders_only else self._names.intersection(names)


_Rule = Glob | _Names


def _joined(globs: Sequence[Glob]) -> tuple[_Rule, ...]:
    """Return rules that say the same as `globs` in their order, with fewer questions."""
    rules: list[_Rule] = []
    for (plain, negated, folders_only), group in groupby(globs, Glob.kind):
        if plain:
            rules.append(
                _Names((glob.name for glob in group if glob.name), negated=negated, folders_only=folders_only)
            )
        else:
            rules += group
    return tuple(rules)


class Globs:
    """Globs in the order of a command line: the last that matches a path decides."""

    def __init__(self, patterns: Collection[str]) -> None:
        globs = [Glob(pattern) for pattern in patterns]
        self._rules = _joined(globs[::-1])
        self._selective = any(not glob.negated for glob in globs)
        self.excludes = any(glob.negated for glob in globs)
        self._single = globs[0] if len(globs) == 1 and not self.excludes else None

    def decide(self, path: str, *, folder: bool) -> bool | None:
        """Say whether the path is taken (True), left out (False) or not spoken of (None)."""
        for rule in self._rules:
            if (folder or not rule.folders_only) and rule.matches(path):
                return not rule.negated
        return False if self._selective and not folder else None

    def among(self, prefix: str, names: Sequence[str]) -> Collection[str]:
        """Return those of the files' names in the folder `prefix`, with its slash, that are not left out."""
        if self._single is not None:
            return self._single.among(prefix, names)
        if not self._selective:  # whatever one of them matches is left out
            left_out = set().union(*(rule.among(prefix, names) for rule in self._rules))
            return [name for name in names if name not in left_out] if left_out else names
        decide = self.decide
        return [name for name in names if decide(prefix + name, folder=False) is not False]


class Named:
    """Chooses files by globs alone: what Glob walks.

    Folders are entered unless a glob excludes them, or nothing in them can match: `hidden` itself, those
    beside `prefix`, the literal beginning of the pattern, and with `depth` those that have as many folders
    above them.
    """

    def __init__(self, globs: Globs, prefix: str, depth: int | None, hidden: str | None) -> None:
        self._globs = globs
        self._prefix = prefix
        self._depth = depth
        self._hidden = hidden

    def enter(self, path: str, names: Names, state: Any) -> Any:
        return None

    def folder(self, path: str, state: Any) -> bool:
        prefix = self._prefix
        if prefix and not (path + "/").startswith(prefix) and not prefix.startswith(path + "/"):
            return False
        if path == self._hidden or (self._depth is not None and path.count("/") >= self._depth):
            return False
        return not self._globs.excludes or self._globs.decide(path, folder=True) is not False

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]:
        if self._prefix and not prefix.startswith(self._prefix):
            return ()
        return self._globs.among(prefix, names)


@lru_cache(256)
def _rules(text: str) -> tuple[_Rule, ...]:
    """Return the rules of an ignore file (gitignore(5)), last first; lines that do not parse are left out."""
    rules = []
    for line in text.split("\n", _RULES_MAX)[:_RULES_MAX]:
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        stripped = line.rstrip(" ")
        line = stripped + " " if stripped.endswith("\\") and stripped != line else stripped
        try:
            rules.append(Glob(line))
        except GlobError:
            continue
    return _joined(rules[::-1])


# Which ignore files hold in a folder: whether a repository was entered, and from the innermost outwards
# the length of each file's folder (with its slash) and its rules.
_Stack = tuple[tuple[int, tuple[_Rule, ...]], ...]
_State = tuple[bool, _Stack, _Stack]


class Sought:
    """Chooses files as ripgrep does: globs, then ignore files (in a repository), then the type."""

    def __init__(self, tree: Tree, start: str, globs: Globs, types: Globs | None) -> None:
        self._tree = tree
        self._base = start + "/" if start else ""
        self._globs = globs
        self._types = types

    def above(self) -> _State:
        """Return the state from the folders above the start, the workspace first."""
        state: _State = (False, (), ())
        parts = self._base.split("/")[:-1]
        for i in range(len(parts)):
            folder = "/".join(parts[:i])
            names = [name for name in (".git", ".gitignore", ".ignore") if self._exists(folder, name)]
            state = self._entered(folder, names, state)
        return state

    def _exists(self, folder: str, name: str) -> bool:
        try:
            self._tree.status(f"{folder}/{name}" if folder else name)
        except GatewayError:
            return False
        return True

    def enter(self, path: str, names: Names, state: _State) -> _State:
        return self._entered((self._base + path).rstrip("/"), names(), state)

    def _entered(self, folder: str, names: Collection[str], state: _State) -> _State:
        repository, tracked, ignored = state
        if ".git" in names:
            repository, tracked = True, ()  # rules from above a repository's root do not reach into it
            tracked = self._read(folder, ".git/info/exclude", tracked)
        if ".gitignore" in names and repository:
            tracked = self._read(folder, ".gitignore", tracked)
        if ".ignore" in names:
            ignored = self._read(folder, ".ignore", ignored)
        return repository, tracked, ignored

    def _read(self, folder: str, name: str, stack: _Stack) -> _Stack:
        prefix = folder + "/" if folder else ""
        try:
            data, _ = self._tree.read_file(prefix + name, _IGNORE_FILE_MAX)
        except GatewayError:
            return stack
        rules = _rules(data.decode("utf-8", "surrogateescape"))
        return ((len(prefix), rules), *stack) if rules else stack

    def _ignored(self, path: str, state: _State, *, folder: bool) -> bool:
        full = self._base + path
        for stack in (state[2], state[1]):  # .ignore goes before .gitignore
            for start, rules in stack:
                inner = full[start:]
                for rule in rules:
                    if (folder or not rule.folders_only) and rule.matches(inner):
                        return not rule.negated
        return False

    def folder(self, path: str, state: _State) -> bool:
        decided = self._globs.decide(path, folder=True)
        return decided if decided is not None else not self._ignored(path, state, folder=True)

    def files(self, prefix: str, names: Sequence[str], state: _State) -> Collection[str]:
        decide, types, ignores = self._globs.decide, self._types, state[1] or state[2]
        if types is None and not ignores:
            return self._globs.among(prefix, names)
        chosen = []
        for name in names:
            path = prefix + name
            decided = decide(path, folder=False)
            if decided is None:
                decided = not (ignores and self._ignored(path, state, folder=False)) and (
                    types is None or types.decide(path, folder=False) is True
                )
            if decided:
                chosen.append(name)
        return chosen


# The types of ripgrep 14 that a web or systems project meets (crates/ignore/src/default_types.rs).
TYPES: dict[str, str] = {
    "asm": "*.asm *.s *.S",
    "astro": "*.astro",
    "awk": "*.awk",
    "bat": "*.bat",
    "c": "*.[chH] *.[chH].in *.cats",
    "clojure": "*.clj *.cljc *.cljs *.cljx",
    "cmake": "*.cmake CMakeLists.txt",
    "config": "*.cfg *.conf *.config *.ini",
    "cpp": "*.[ChH] *.cc *.[ch]pp *.[ch]xx *.hh *.inl *.[ChH].in *.cc.in *.[ch]pp.in *.[ch]xx.in *.hh.in",
    "cs": "*.cs",
    "csharp": "*.cs",
    "css": "*.css *.scss",
    "csv": "*.csv",
    "dart": "*.dart",
    "diff": "*.patch *.diff",
    "docker": "*Dockerfile*",
    "elixir": "*.ex *.eex *.exs *.heex *.leex *.livemd",
    "elm": "*.elm",
    "erlang": "*.erl *.hrl",
    "fish": "*.fish",
    "go": "*.go",
    "gradle": "*.gradle *.gradle.kts gradle.properties gradle-wrapper.* gradlew gradlew.bat",
    "graphql": "*.graphql *.graphqls",
    "h": "*.h *.hh *.hpp",
    "haskell": "*.hs *.lhs *.cpphs *.c2hs *.hsc",
    "html": "*.htm *.html *.ejs",
    "java": "*.java *.jsp *.jspx *.properties",
    "js": "*.js *.jsx *.vue *.cjs *.mjs",
    "json": "*.json composer.lock *.sarif",
    "jsonl": "*.jsonl",
    "julia": "*.jl",
    "kotlin": "*.kt *.kts",
    "less": "*.less",
    "lock": "*.lock package-lock.json",
    "log": "*.log",
    "lua": "*.lua",
    "make": "[Gg][Nn][Uu]makefile [Mm]akefile [Gg][Nn][Uu]makefile.am [Mm]akefile.am [Gg][Nn][Uu]makefile.in "
    "[Mm]akefile.in *.mk *.mak",
    "markdown": "*.markdown *.md *.mdown *.mdwn *.mkd *.mkdn *.mdx",
    "md": "*.markdown *.md *.mdown *.mdwn *.mkd *.mkdn *.mdx",
    "nix": "*.nix",
    "objc": "*.h *.m",
    "ocaml": "*.ml *.mli *.mll *.mly",
    "perl": "*.perl *.pl *.PL *.plh *.plx *.pm *.t",
    "php": "*.php *.php3 *.php4 *.php5 *.php7 *.php8 *.pht *.phtml",
    "prisma": "*.prisma",
    "protobuf": "*.proto",
    "ps": "*.cdxml *.ps1 *.ps1xml *.psd1 *.psm1",
    "py": "*.py *.pyi",
    "python": "*.py *.pyi",
    "r": "*.R *.r *.Rmd *.rmd *.Rnw *.rnw",
    "rst": "*.rst",
    "ruby": "config.ru Gemfile .irbrc Rakefile *.gemspec *.rb *.rbw",
    "rust": "*.rs",
    "sass": "*.sass *.scss",
    "scala": "*.scala *.sbt",
    "sh": "*.bash *.sh *.bashrc *.csh *.cshrc *.ksh *.kshrc *.tcsh *.zsh .bashrc .bash_profile .profile "
    ".zshrc",
    "sql": "*.sql *.psql",
    "svelte": "*.svelte *.svelte.ts",
    "svg": "*.svg",
    "swift": "*.swift",
    "systemd": "*.automount *.conf *.device *.link *.mount *.path *.scope *.service *.slice *.socket *.swap "
    "*.target *.timer",
    "tex": "*.tex *.ltx *.cls *.sty *.bib *.dtx *.ins",
    "tf": "*.tf *.tf.json *.tfvars *.tfvars.json *.terraformrc terraform.rc *.tfrc *.terraform.lock.hcl",
    "toml": "*.toml Cargo.lock",
    "ts": "*.ts *.tsx *.cts *.mts",
    "txt": "*.txt",
    "typescript": "*.ts *.tsx *.cts *.mts",
    "vim": "*.vim .vimrc .gvimrc vimrc gvimrc _vimrc _gvimrc",
    "vue": "*.vue",
    "xml": "*.xml *.xml.dist *.dtd *.xsl *.xslt *.xsd *.xjb *.rng *.sch *.xhtml",
    "yaml": "*.yaml *.yml",
    "zig": "*.zig",
    "zsh": ".zshenv .zlogin .zlogout .zprofile .zshrc *.zsh",
}
