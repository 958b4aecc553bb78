"""The texts of Claude Code's Bash, BashOutput and KillShell: results, exit codes, cuts.

Texts and quirks of Bash are those of version 2.1.331; of the other two, 2.0.50, the last that had them.
`gateway.shells` runs the commands.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.tools.call import ToolAnswer, ToolFailure

RESULT_MAX: Final = 30_000  # characters of a result; of a longer one only a preview is shown
ERROR_MAX: Final = 10_000  # characters of a failed command's result, half from each end
PREVIEW: Final = 2_000  # characters
# bytes of beginning and end kept in memory, enough for both cuts above at 4 bytes a character
KEPT: Final = 4 * RESULT_MAX
SILENT: Final = "(Bash completed with no output)"

# The command runs without descriptor 3, so nothing that it starts can hold it open or write to it.
# If it succeeds, the shell reports its folder; after `exit` or `exec` it cannot.
SCRIPT: Final = (
    'eval "$1" 3>&- </dev/null; __gateway_status=$?; '
    "[ $__gateway_status -ne 0 ] || builtin pwd -P >&3 2>/dev/null; builtin exit $__gateway_status"
)

# Programs whose exit code 1 is an answer, not a failure, and its meaning.
_ANSWERS: Final[Mapping[str, str]] = {
    "grep": "No matches found",
    "egrep": "No matches found",
    "fgrep": "No matches found",
    "rg": "No matches found",
    "find": "Some directories were inaccessible",
    "diff": "Files differ",
    "cmp": "Files differ",
    "test": "Condition is false",
    "[": "Condition is false",
}
_TERMINATED: Final = 128 + 15
# a word of a command line, or what ends a command; possessive, so that the time is linear in the length
_BLANK: Final = r"[ \t\r]*+"
_WORD: Final = re.compile(
    rf"""{_BLANK}(?:
        (?P<word>(?:[^ \t\r\n;|&()<>'"\\]++|'[^']*+'|"(?:[^"\\]++|\\.)*+"|\\.)++)
      | (?P<punctuation>[;|&()<>\n]++)
    ){_BLANK}""",
    re.VERBOSE | re.DOTALL,
)
_QUOTES: Final = re.compile(r"""'([^']*+)'|"((?:[^"\\]++|\\.)*+)"|\\(.)""", re.DOTALL)
_ASSIGNED: Final = re.compile(r"[A-Za-z_]\w*=")
_JUDGED: Final = 16 << 10  # characters of a command line: at most 4 ms of CPU


@dataclass(frozen=True, slots=True)
class Printed:
    """A command's output. `whole` says that `head` is all of it; `file` is the file with all of it.

    `size` is in bytes, `characters` the same in characters. `head` and `tail` are its two ends.
    """

    size: int
    characters: int
    head: str
    tail: str
    whole: bool
    file: str | None = None


def trimmed(text: str) -> str:
    """Return a command's output without leading blank lines and trailing white space."""
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())


def needs_file(printed: Printed) -> bool:
    """Return whether a result shows only a part of the output, so that it needs a file."""
    return not printed.whole or len(trimmed(printed.head)) > RESULT_MAX


def finished(
    meant: str | None, printed: Printed, code: int, notes: tuple[str, ...], facts: Mapping[str, Any]
) -> ToolAnswer:
    """Return the result of a command that ended by itself. `notes` are lines after its output.

    `meant` is what `interpretation` said of exit code 1.
    """
    meaning = meant if code == 1 else None
    structured: dict[str, Any] = {**facts, "size": printed.size, "truncated": False}
    if printed.file is not None:
        structured["outputFile"] = printed.file
    if meaning is not None:
        structured["interpretation"] = meaning
    if code == 0 or meaning is not None:
        output = trimmed(printed.head)
        if needs_file(printed):
            output = _persisted(output, printed)
            structured["truncated"] = True
        words = "\n".join(part for part in (output, *notes) if part) or SILENT
        return ToolAnswer([{"type": "text", "text": words}], structured)
    lines = [f"Exit code {code}"]
    if code == _TERMINATED and not trimmed(printed.tail).endswith("Terminated"):
        notes = ("Terminated", *notes)
    head = "\n".join([*lines, trimmed(printed.head)]) if printed.size else lines[0]
    tail = "\n".join(part for part in (printed.tail.rstrip(), *notes) if part)
    total = len(head) + sum(len(note) + 1 for note in notes)
    if not printed.whole:
        total += printed.characters - len(printed.head)
    if printed.whole and total <= ERROR_MAX:
        words = "\n".join(part for part in (head.rstrip(), *notes) if part)
    else:
        half = ERROR_MAX // 2
        cut = total - 2 * half
        words = f"{head[:half]}\n\n... [{cut} characters truncated] ...\n\n{tail[-half:].lstrip(chr(10))}"
        structured["truncated"] = True
    structured["code"] = "exec_failed"
    return ToolAnswer([{"type": "text", "text": words}], structured, True, "exec_failed")


def _persisted(output: str, printed: Printed) -> str:
    where = f"Full output saved to: {printed.file}" if printed.file else "The full output could not be saved."
    return (
        f"<persisted-output>\nOutput too large ({_size(printed.size)}). {where}\n\n"
        f"Preview (first 2KB):\n{_preview(output)}\n...\n</persisted-output>"
    )


def _preview(output: str) -> str:
    first = output[:PREVIEW]
    end = first.rfind("\n")
    return first[:end] if end > PREVIEW // 2 else first


def _size(size: int) -> str:
    if size < 1 << 20:
        return f"{size / (1 << 10):.1f}KB"
    return f"{size / (1 << 20):.1f}MB" if size < 1 << 30 else f"{size / (1 << 30):.1f}GB"


def interpretation(command: str, code: int) -> str | None:
    """Return the meaning of exit code 1 for the command's last program, None if it is a failure."""
    return _ANSWERS.get(_last_program(command)) if code == 1 else None


def _last_program(command: str) -> str:
    """Return the name of the program that a command line runs last, judged by its words only.

    Empty if a quote is open, or the line is longer than one that a person would judge.
    """
    if len(command) > _JUDGED:
        return ""
    name, first, at = "", True, 0
    while (found := _WORD.match(command, at)) is not None:
        at = found.end()
        word = found["word"] or found["punctuation"]
        if not word.strip(";|&()\n"):
            first = True
        elif first and not _ASSIGNED.match(word):
            name, first = _QUOTES.sub(r"\1\2\3", word).rpartition("/")[2], False
    return name if at == len(command) else ""


def moved(text: str, shell_id: str, file: str | None, seconds: float, facts: Mapping[str, Any]) -> ToolAnswer:
    """Return the result of a command that continues after its timeout. `text` is its output."""
    limit = int(seconds + 0.5)
    words = (
        f"Command did not complete within its {limit}s timeout and was moved to the background "
        f"(ID: {shell_id}). {_following(file)}"
    )
    output = trimmed(text)
    if len(output) > RESULT_MAX:
        output = _preview(output) + "\n..."
    words = f"{output}\n{words}" if output else words
    return ToolAnswer([{"type": "text", "text": words}], _with_file(facts, file))


def begun(shell_id: str, file: str | None, facts: Mapping[str, Any]) -> ToolAnswer:
    """Return the result of a command that was started in the background."""
    words = f"Command running in background with ID: {shell_id}. {_following(file)}"
    return ToolAnswer([{"type": "text", "text": words}], _with_file(facts, file))


def _with_file(facts: Mapping[str, Any], file: str | None) -> dict[str, Any]:
    return {**facts, **({} if file is None else {"outputFile": file})}


def _following(file: str | None) -> str:
    written = f"Output is being written to: {file}. " if file else ""
    return f"{written}Use BashOutput to read new output and KillShell to end it."


def timed_out(printed: Printed, seconds: float, facts: Mapping[str, Any]) -> ToolAnswer:
    """Return the result of a command that was ended at its timeout, because it could not continue."""
    notes = (f"Command timed out after {int(seconds + 0.5)}s and was ended.",)
    answer = finished(None, printed, _TERMINATED, notes, facts)
    return ToolAnswer(answer.content, {**answer.structured, "code": "timeout"}, True, "timeout")


def flooded(limit: int) -> str:
    return f"Command was ended: it printed more than {_size(limit)}."


def unknown(shell_id: str) -> ToolFailure:
    return ToolFailure("not_found", f"No shell found with ID: {shell_id[:100]}")


def report(status: str, code: int | None, streams: Mapping[str, str], facts: Mapping[str, Any]) -> ToolAnswer:
    """Return BashOutput's result: `status` one of running, completed, failed, killed; output by stream."""
    parts = [f"<status>{status}</status>"]
    if code is not None:
        parts.append(f"<exit_code>{code}</exit_code>")
    for name, text in streams.items():
        if output := trimmed(text):
            parts.append(f"<{name}>\n{_latest(output)}\n</{name}>")
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    parts.append(f"<timestamp>{stamp}.{int(now * 1000) % 1000:03d}Z</timestamp>")
    return ToolAnswer([{"type": "text", "text": "\n\n".join(parts)}], dict(facts))


def _latest(output: str) -> str:
    cut = len(output) - RESULT_MAX
    return output if cut <= 0 else f"... [{cut} characters truncated] ...\n\n{output[-RESULT_MAX:]}"


def killed(shell_id: str, command: str, facts: Mapping[str, Any]) -> ToolAnswer:
    said = {"message": f"Successfully killed shell: {shell_id} ({command})", "shell_id": shell_id}
    return ToolAnswer([{"type": "text", "text": orjson.dumps(said).decode()}], dict(facts))


def not_running(shell_id: str, status: str) -> ToolFailure:
    words = f"Shell {shell_id} is not running, so cannot be killed (status: {status})"
    return ToolFailure("conflict", words, tagged=False, status=status)
