"""The rules of ignore files, gitignore(5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from gateway.tools.search.globs import Glob, GlobError, Rule, joined

_RULES_MAX = 2000  # rules of one ignore file


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of an ignore file, last first. `negates` if any rule is negated; `digest` is of its text."""

    rules: tuple[Rule, ...]
    negates: bool
    digest: bytes

    def decide(self, path: str, *, folder: bool) -> bool | None:
        """Return whether a path, relative to the file's folder, is left out; None if no rule matches."""
        for rule in self.rules:
            if (folder or not rule.folders_only) and rule.matches(path):
                return not rule.negated
        return None


@lru_cache(256)
def rules(text: str) -> Rules:
    """Parse an ignore file (gitignore(5)); lines that do not parse are skipped."""
    found = []
    for line in text.split("\n", _RULES_MAX)[:_RULES_MAX]:
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        stripped = line.rstrip(" ")
        line = stripped + " " if stripped.endswith("\\") and stripped != line else stripped
        try:
            found.append(Glob(line))
        except GlobError:
            continue
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return Rules(joined(found[::-1]), any(rule.negated for rule in found), digest)
