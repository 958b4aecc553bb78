"""A Grep's pattern: ripgrep's syntax and errors, translated to RE2 and compiled.

Rust's regular expressions are nearly those of RE2: neither has look-around or back-references. What RE2
lacks (class operations, the flag `x`, the word boundaries `\\<` and `\\b{start}`) is refused; `\\b` is ASCII
here and Unicode there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple

import re2

_BEYOND: Final = (
    "\n\nConsider enabling PCRE2 with the --pcre2 flag, which can handle backreferences\nand look-around."
)
_UNKNOWN: Final = "syntax not supported"
# errors that only RE2 finds, in ripgrep's words
_RE2: Final = (
    ("bad repetition operator", "repetition operator missing expression"),
    ("invalid repetition size", "invalid repetition count, which goes up to 1000 here"),
    (r"range: \p", "Unicode property not found"),
    (r"range: \P", "Unicode property not found"),
    ("invalid character class range", "invalid character class range, the start must be <= the end"),
    ("pattern too large", "compiled regex exceeds size limit"),
)
_WORD: Final = r"\p{L}\p{M}\p{Nd}\p{Pc}"
_SPACE: Final = r"\s\x0b\x{85}\p{Z}"
# Classes that are ASCII only in RE2, and line ends for a search line by line.
_OUTSIDE: Final = {
    "w": f"[{_WORD}]",
    "W": f"[^{_WORD}]",
    "d": r"\p{Nd}",
    "D": r"\P{Nd}",
    "s": f"[{_SPACE}]",
    "S": f"[^{_SPACE}]",
}
_INSIDE: Final = {"w": _WORD, "d": r"\p{Nd}", "D": r"\P{Nd}", "s": _SPACE}
_LINE: Final = {"A": "^", "z": "$"}
_LETTERS: Final = frozenset("aftnrvAbBzdDsSwWpP")
_CODE: Final = re.compile(
    r"\\(?:[xuU]\{([0-9a-fA-F]{1,8})\}|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))"
)
_PROPERTY: Final = re.compile(r"\\[pP](?:\{[^}]*\}|[A-Za-z])")
_COUNT: Final = re.compile(r"\{ *(\d+) *(?:(,) *(\d*) *)?\}")
_NAMED: Final = re.compile(r"\?P?<[A-Za-z_][^>]*>")


class PatternError(Exception):
    """A pattern that does not parse; its text is ripgrep's."""

    @classmethod
    def at(cls, wrapped: str, start: int, end: int, words: str) -> PatternError:
        """Return the error that marks a part of the `wrapped` pattern."""
        mark = " " * start + "^" * max(1, end - start)
        return cls(f"regex parse error:\n    {wrapped}\n    {mark}\nerror: {words}")


class Translated(NamedTuple):
    """A pattern in RE2's syntax, whether it names a line end, and whether it may match one otherwise.

    Every case-sensitive match contains one of `literals`; one of them is empty if nothing is known.
    """

    text: str
    names_line_end: bool
    meets_line_end: bool
    literals: tuple[str, ...]


def translate(pattern: str, *, multiline: bool) -> Translated:
    """Translate a pattern. Raises `PatternError`.

    ripgrep wraps it in a group before parsing, so positions in its errors include that.
    """
    scan = _Scan(f"(?:{pattern})", multiline)
    scan.run()
    literals = tuple(scan.literals)
    return Translated("".join(scan.out), scan.line_end, scan.line_end or scan.meets, literals)


class _Scan:
    """One pass over a pattern."""

    def __init__(self, text: str, multiline: bool) -> None:
        self._text = text
        self._multiline = multiline
        self._groups: list[tuple[int, int]] = []  # where each open group begins, in the text and in `out`
        self._at = 0
        self._atom: int | None = None  # where the last repeatable item begins in `out`
        self._repeats = False  # whether that is a repetition itself
        self.out: list[str] = []
        self.line_end = "\n" in text
        self.meets = False
        self._shut = False  # whether the open class excludes line ends
        self._run = ""  # the last run of literal characters outside groups
        self._cased = False  # whether a flag changes case sensitivity
        self.literals = [""]  # the longest of them in each alternative

    def _wrong(self, start: int, end: int, words: str) -> PatternError:
        return PatternError.at(self._text, start, end, words)

    def _take(self, end: int, said: str | None = None) -> None:
        self.out.append(self._text[self._at : end] if said is None else said)
        self._at = end

    def run(self) -> None:
        text = self._text
        while self._at < len(text):
            at, char, begins = self._at, text[self._at], len(self.out)
            if char in "*+?{":
                if self._atom is None:
                    raise self._wrong(at, at + 1, "repetition operator missing expression")
                # a repeated item may be absent, at least through an outer repetition
                stays = char == "+" and text[at + 1] not in "*+?{"
                self._end_run(self._run if stays else self._run[:-1])
                self._repeated(self._atom)
                continue
            match char:
                case "\\":
                    self._escape()
                case "[":
                    self._class()
                case "(":
                    self._open()
                case ")":
                    if not self._groups:
                        raise self._wrong(at, at + 1, "unopened group")
                    _, begins = self._groups.pop()
                    self._take(at + 1)
                case _:
                    self.meets |= char in ".^$"
                    self._take(at + 1)
            self._note(char, text[at : self._at])
            self._atom = None if char in "(|" else begins
            self._repeats = False
        if self._groups:
            at, _ = self._groups[-1]
            raise self._wrong(at, at + 1, "unclosed group")
        if self._cased:
            self.literals = [""]

    def _note(self, char: str, taken: str) -> None:
        """Record whether the item just taken, which begins with `char`, is literal."""
        if len(self._groups) == 1 and char not in "([.^$|)\\":
            self._run += char
        elif len(self._groups) == 1 and char == "\\" and len(taken) == 2 and not taken[1].isalnum():
            self._run += taken[1]
        else:
            self._end_run(self._run)
            if char == "|" and len(self._groups) == 1:
                self.literals.append("")

    def _end_run(self, run: str) -> None:
        self.literals[-1] = max(self.literals[-1], run, key=len)
        self._run = ""

    def _escape(self, brackets: str = "") -> None:
        """Take an escape; `brackets` opened the class that it is in."""
        text, at = self._text, self._at
        escaped = text[at + 1 : at + 2]
        code = _CODE.match(text, at)
        if code:
            number = next(filter(None, code.groups()))
            self.line_end |= int(number, 16) == 0x0A and brackets != "[^"
            self._take(code.end(), f"\\x{{{number}}}")
        elif found := _PROPERTY.match(text, at):
            self._take(found.end())
        elif not escaped:
            words = "incomplete escape sequence, reached end of pattern prematurely"
            raise self._wrong(at, at + 1, words)
        elif escaped.isdigit() and escaped.isascii():
            raise self._wrong(at, at + 2, f"backreferences are not supported{_BEYOND}")
        elif escaped.isalnum() and escaped not in _LETTERS:
            raise self._wrong(at, at + 2, "unrecognized escape sequence")
        elif escaped in "<>" or (escaped == "b" and not brackets and text.startswith(("{s", "{e"), at + 2)):
            raise self._wrong(at, at + 2, f"{_UNKNOWN}; use \\b for the boundary of a word")
        else:
            self.line_end |= escaped == "n" and brackets != "[^"
            if brackets == "[^":
                self._shut |= escaped in "snDW"
            else:
                self.meets |= escaped in "sDW"
            said = (_INSIDE if brackets else _OUTSIDE).get(escaped)
            self._take(at + 2, said if brackets or self._multiline else _LINE.get(escaped, said))

    def _class(self) -> None:
        text, start = self._text, self._at
        brackets = "[^" if text.startswith("^", start + 1) else "["
        self._shut = brackets == "["
        self._take(start + len(brackets))
        if text.startswith("]", self._at):  # a bracket that comes first is literal
            self._take(self._at + 1)
        while self._at < len(text):
            char = text[self._at]
            if char == "]":
                self.meets |= not self._shut
                self._take(self._at + 1)
                return
            if char == "\\":
                self._escape(brackets)
                continue
            end = text.find(":]", self._at) if text.startswith("[:", self._at) else -1
            self._take(end + 2 if end >= 0 else self._at + 1)
        raise self._wrong(start, start + 1, "unclosed character class")

    def _open(self) -> None:
        text, at = self._text, self._at
        self._groups.append((at, len(self.out)))
        if not text.startswith("?", at + 1):
            self._take(at + 1)
            return
        for mark in ("?=", "?!", "?<=", "?<!"):
            if text.startswith(mark, at + 1):
                words = "look-around, including look-ahead and look-behind, is not supported"
                raise self._wrong(at, at + 1 + len(mark), words + _BEYOND)
        named = _NAMED.match(text, at + 1)
        if named:
            self._take(named.end())
            return
        end = at + 2
        while end < len(text) and text[end] not in ":)":
            if text[end] not in "imsUuxR-":
                raise self._wrong(end, end + 1, "unrecognized flag")
            end += 1
        on, minus, off = text[at + 2 : end].partition("-")
        on = on.replace("u", "")  # Unicode stays on
        if "u" in off or {"x", "R"} & set(on + off):
            raise self._wrong(at, end, _UNKNOWN)
        flags = on + (minus + off if off else "")
        if text.startswith(")", end):  # flags for the rest, not a group
            self._groups.pop()
            self._cased |= "i" in flags
            self._take(end + 1, f"(?{flags})" if flags else "")
        else:
            self._take(end + 1, f"(?{flags}:")

    def _repeated(self, begins: int) -> None:
        text, at = self._text, self._at
        end = at + 1
        if text[at] == "{":
            count = _COUNT.match(text, at)
            if not count:
                digits = re.compile(r" *\d").match(text, at + 1)
                if not digits:
                    words = "repetition quantifier expects a valid decimal"
                    raise self._wrong(at + 1, at + 2, words)
                end = re.compile(r"[\d, ]*").match(text, at + 1).end()  # type: ignore[union-attr]  # may be empty
                raise self._wrong(at, end, "unclosed counted repetition")
            end = count.end()
            if count[3] and int(count[3]) < int(count[1]):
                words = "invalid repetition count range, the start must be <= the end"
                raise self._wrong(at, end, words)
        if text.startswith("?", end):
            end += 1
        if self._repeats:  # a repetition of a repetition, for which RE2 needs a group
            self.out.insert(begins, "(?:")
            self.out.append(")")
        self._repeats = True
        self._take(end)


_MEMORY: Final = 8 << 20  # bytes; with re2's own 64 MB default a worker grew to 114 MB
_NEEDLE_MIN: Final = 3  # characters; shorter literals are in too many files
_COMMON: Final = " etrnosaicpdlumfhg.,(=;\"'"  # the most frequent bytes of source code; all others are rarer
_NOWHERE: Final = (-1, -1)

# Returns the next match from a position on: its start and end, -1 for none.
Find = Callable[[bytes | memoryview, int], tuple[int, int]]


class Pattern(NamedTuple):
    """A compiled pattern, and whether a match may span lines.

    Every match contains one of `needles`; there are none if some of them are short or unknown.
    """

    find: Find
    spanning: bool
    needles: tuple[str, ...]


@lru_cache(8)
def compiled(pattern: str, ignore_case: bool, multiline: bool) -> Pattern:
    """Compile a pattern of Grep. Raises `PatternError`.

    Without `multiline` nothing in it matches a line end, not even `\\s`.
    """
    translated = translate(pattern, multiline=multiline)
    if translated.names_line_end and not multiline:
        raise PatternError(
            'the literal "\\n" is not allowed in a regex\n\nConsider enabling multiline mode with the '
            "--multiline flag (or -U for short).\nWhen multiline mode is enabled, new line characters can be "
            "matched."
        )
    options = re2.Options()
    options.max_mem = _MEMORY
    options.log_errors = False
    options.case_sensitive = not ignore_case
    options.dot_nl = multiline
    options.never_nl = not multiline
    try:
        regex = re2.compile(b"(?m)" + translated.text.encode(), options)
    except re2.error as error:
        words = next((words for key, words in _RE2 if key in str(error)), _UNKNOWN)
        raise PatternError.at(f"(?:{pattern})", 0, 1, words) from None
    known = not ignore_case and min(map(len, translated.literals)) >= _NEEDLE_MIN
    needles = translated.literals if known else ()
    return Pattern(finder(regex), multiline and translated.meets_line_end, needles)


def finder(regex: Any) -> Find:
    """Return a function that finds the next match of a compiled expression.

    It uses `finditer`, because `search` is a slower wrapper of it, and one is called for each file.
    """
    matches = regex.finditer

    def find(data: bytes | memoryview, at: int) -> tuple[int, int]:
        found = next(matches(data, at), None)
        if found is None:
            return _NOWHERE
        span: tuple[int, int] = found.span()
        return span

    return find


def literal(needle: str) -> Find:
    """Return a search for a literal, or for the rest of it from a rare byte on.

    RE2 jumps from one occurrence of the first byte to the next: at up to 20 GB/s, or 1 if it is frequent.
    """
    last = len(needle) - _NEEDLE_MIN
    rarest = max(range(last + 1), key=lambda at: _COMMON.find(needle[at]) % (len(_COMMON) + 1))
    options = re2.Options()
    options.literal = True
    return finder(re2.compile(needle[rarest:], options))
