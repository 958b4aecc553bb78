"""A Grep's pattern, compiled by RE2.

Patterns are those of RE2, which are nearly ripgrep's: neither has look-around or back-references.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import re2

from gateway.tools.search.regexes import PatternError, translate
from gateway.tools.search.scope import rejected

PATTERN_MAX = 4000  # characters
_MEMORY = 8 << 20  # bytes; with re2's own 64 MB default a worker grew to 114 MB
_NOWHERE = (-1, -1)
Find = Callable[[bytes | memoryview, int], tuple[int, int]]


@lru_cache(8)
def compiled(pattern: str, ignore_case: bool, multiline: bool) -> tuple[Any, bool]:
    """Compile a pattern of Grep, and return whether a match may span lines.

    Without `multiline` nothing in it matches a line end, not even `\\s`.
    """
    if len(pattern) > PATTERN_MAX:
        raise rejected("regex parse error:\nerror: the pattern is too long")
    try:
        translated = translate(pattern, multiline=multiline)
    except PatternError as error:
        raise rejected(error.words) from None
    if translated.names_line_end and not multiline:
        raise rejected(
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
        raise rejected(PatternError.of(pattern, str(error)).words) from None
    return regex, multiline and translated.meets_line_end


def finder(regex: Any) -> Find:
    """Return a function that finds the next match from a position on: its start and end, -1 for none.

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
