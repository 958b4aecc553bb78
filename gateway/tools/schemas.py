"""The tools' names, inputs and descriptions; checks an input against its schema.

Names, inputs and refusals are those of Claude Code 2.1, and so is the leniency: "2" counts as 2 and "true" as
true, while unknown and missing parameters are errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.errors import InvalidParams
from gateway.protocol.maxima import ARGUMENT_MAX, CONTENT_MAX, PATH_MAX, SHORT_MAX
from gateway.tools.call import ToolFailure

_DIGITS_MAX = 400  # characters of a number given as text
_VALUES_MAX = 256  # values in lists and objects of one input; no tool here takes any
_SAFE_INTEGER = (1 << 53) - 1  # the largest integer that JSON carries everywhere

_PATH = {"type": "string", "maxLength": PATH_MAX}
_CONTENT = {"type": "string", "maxLength": CONTENT_MAX}
_COMMAND = {"type": "string", "maxLength": ARGUMENT_MAX}
_PATTERN = {"type": "string", "maxLength": 16 << 10}  # `Limits.pattern_max` is less
_WORDS = {"type": "string", "maxLength": 4096}
_SHORT = {"type": "string", "maxLength": SHORT_MAX}
_NUMBER = {"type": "number"}
_FLAG = {"type": "boolean"}


def check_size(tool: str, arguments: Mapping[str, Any]) -> None:
    """Refuse inputs that are longer, deeper or have more values than a tool takes, whatever they contain.

    A list of lists takes thirty times its text's memory. Raises `InvalidParams`, and `ToolFailure` for a text
    that is too long: the model can send a shorter one.
    """
    for name, schema in TOOLS[tool]["properties"].items():
        value, most = arguments.get(name), schema.get("maxLength", _DIGITS_MAX)
        if isinstance(value, str) and len(value) > most:
            words = (
                f"Error calling tool ({tool}): {name}: Too big: expected string to have <={most} characters"
            )
            raise ToolFailure("invalid_params", words, field=name, limit=most)
    left, inside = _VALUES_MAX, [*arguments.values()]
    while inside:
        value = inside.pop()
        if isinstance(value, dict | list):
            left -= len(value)
            if left < 0:
                raise InvalidParams(f"a tool's input may have at most {_VALUES_MAX} values")
            inside += value.values() if isinstance(value, dict) else value


def _object(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _field(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {**schema, "description": description}


FILE_TOOLS: dict[str, dict[str, Any]] = {
    "Read": _object(
        ("file_path",),
        file_path=_field(_PATH, "The path of the file, absolute or relative to the working directory"),
        offset=_field(
            {"type": "integer", "minimum": 0, "maximum": _SAFE_INTEGER},
            "The line to start at; lines count from 1",
        ),
        limit=_field(
            {"type": "integer", "exclusiveMinimum": 0, "maximum": _SAFE_INTEGER},
            "The number of lines to read",
        ),
        pages=_field(_SHORT, 'Pages of a PDF, such as "1-5" or "3"; at most 20'),
        allow_large=_field(_FLAG, "Return a large file at once instead of its first page"),
    ),
    "Write": _object(
        ("file_path", "content"),
        file_path=_field(_PATH, "The path of the file, absolute or relative to the working directory"),
        content=_field(_CONTENT, "The complete new content"),
    ),
    "Edit": _object(
        ("file_path", "old_string", "new_string"),
        file_path=_field(_PATH, "The path of the file, absolute or relative to the working directory"),
        old_string=_field(_CONTENT, "The text to replace, exactly as in the file"),
        new_string=_field(_CONTENT, "The text to replace it with"),
        replace_all=_field({"default": False, **_FLAG}, "Replace every occurrence"),
    ),
    "Glob": _object(
        ("pattern",),
        pattern=_field(_PATTERN, 'The glob, such as "**/*.ts" or "src/*.{css,html}"'),
        path=_field(_PATH, "The folder to search; default: the working directory"),
    ),
    "Grep": _object(
        ("pattern",),
        pattern=_field(_PATTERN, "The regular expression (RE2 syntax)"),
        path=_field(_PATH, "The file or folder to search; default: the working directory"),
        glob=_field(_PATTERN, 'Globs of the files to search, such as "*.js" or "!*.min.js"'),
        output_mode={
            "type": "string",
            "enum": ["content", "files_with_matches", "count"],
            "default": "files_with_matches",
            "description": "Matching lines, only the files, or the number of matching lines in each",
        },
        **{
            "-B": _field(_NUMBER, "Lines before each match"),
            "-A": _field(_NUMBER, "Lines after each match"),
            "-C": _field(_NUMBER, "Lines around each match"),
            "context": _field(_NUMBER, "Lines around each match"),
            "-n": _field({"default": True, **_FLAG}, "Show line numbers"),
            "-i": _field(_FLAG, "Ignore case"),
            "-o": _field({"default": False, **_FLAG}, "Show only the match, not its line"),
        },
        type=_field(_SHORT, 'The type of the files to search, such as "js", "py" or "rust"'),
        head_limit=_field({"default": 250, **_NUMBER}, "The maximum number of lines or entries; 0 for all"),
        offset=_field({"default": 0, **_NUMBER}, "The number of lines or entries to skip"),
        multiline=_field({"default": False, **_FLAG}, "Let . match newlines, and matches span lines"),
    ),
}

SHELL_TOOLS: dict[str, dict[str, Any]] = {
    "Bash": _object(
        ("command",),
        command=_field(_COMMAND, "The command line, for bash"),
        timeout=_field(
            {"default": 120_000, **_NUMBER},
            "Milliseconds, at most 600000; then the command goes on in the background",
        ),
        description=_field(_WORDS, "What the command does, in a few words"),
        run_in_background=_field(
            _FLAG, "Return at once while the command runs; see BashOutput and KillShell"
        ),
        dangerouslyDisableSandbox=_field(_FLAG, "Accepted but ignored: every command runs in the container"),
    ),
    "BashOutput": _object(
        ("bash_id",),
        bash_id=_field(_SHORT, "The ID that Bash gave to the background command"),
        filter=_field(_PATTERN, "A regular expression (RE2 syntax, case ignored): only lines that match"),
    ),
    "KillShell": _object(
        ("shell_id",), shell_id=_field(_SHORT, "The ID that Bash gave to the background command")
    ),
}

TOOLS: dict[str, dict[str, Any]] = FILE_TOOLS | SHELL_TOOLS

DESCRIPTIONS: dict[str, str] = {
    "Read": (
        "Read a file in the workspace. Lines are numbered, as `number<TAB>line`. Text files up to 256 KB are "
        "returned whole; read larger ones in parts with offset and limit. Images (PNG, JPEG, GIF, WebP) are "
        "returned as images, PDFs as images of their pages, notebooks as their cells."
    ),
    "Write": (
        "Write a complete file in the workspace, atomically. Missing folders are created; an existing file "
        "is replaced."
    ),
    "Edit": (
        "Replace text in a file. old_string must occur exactly once, unless replace_all is set; leave off "
        "the line numbers that Read shows. An empty old_string creates a new file."
    ),
    "Glob": (
        "Find files by name. A pattern without a slash matches at any depth; hidden and ignored files are "
        "included. Returns at most 100 paths, oldest file first."
    ),
    "Grep": (
        "Search files with a regular expression. Inside a git repository its ignore rules apply. "
        "files_with_matches lists the newest file first."
    ),
    "Bash": (
        "Run a command line with bash as the workspace's user. The working directory carries over to the "
        "next call if the command succeeded and ended inside the workspace; variables do not. Standard input "
        "is empty. Long output is cut, and the result names the file with all of it."
    ),
    "BashOutput": (
        "Return the output of a background command since the last call, and whether it still runs. With a "
        "filter, lines that do not match are discarded."
    ),
    "KillShell": "End a background command and all processes that it has started.",
}


def descriptions() -> list[dict[str, Any]]:
    """Return the tools for `tools/list`, with the inputs that models know: without the maximum lengths."""
    return [
        {
            "name": name,
            "description": DESCRIPTIONS[name],
            "inputSchema": {
                **schema,
                "properties": {
                    field: {key: value for key, value in one.items() if key != "maxLength"}
                    for field, one in schema["properties"].items()
                },
            },
        }
        for name, schema in TOOLS.items()
    ]


def checked(tool: str, arguments: object) -> dict[str, Any]:
    """Return the input of `tool` in its schema's types, without parameters that are absent or null.

    Raises `ToolFailure` with all errors.
    """
    schema = TOOLS[tool]
    properties: dict[str, Any] = schema["properties"]
    if not isinstance(arguments, dict):
        arguments = {}  # then the required parameters are missing
    wrong = [
        f"The required parameter `{name}` is missing" for name in schema["required"] if name not in arguments
    ]
    wrong += [
        f"An unexpected parameter `{str(name)[:100]}` was provided"
        for name in arguments
        if name not in properties
    ]
    found: dict[str, Any] = {}
    refused: list[dict[str, Any]] = []  # values of the right type
    for name, value in arguments.items():
        if name not in properties or (value is None and name not in schema["required"]):
            continue
        kind: str = properties[name]["type"]
        choices: list[str] = properties[name].get("enum", [])
        taken = _taken(kind, value)
        if choices and taken not in choices:
            refused.append(_no_choice(name, choices))
        elif taken is None:
            wrong.append(
                f"The parameter `{name}` type is expected as `{_wanted(kind, value)}` but provided as "
                f"`{_kind(value)}`"
            )
        elif kind == "integer" and abs(taken) > _SAFE_INTEGER:
            refused.append(_no_integer(name, taken))
        else:
            found[name] = taken
    if refused and not wrong:
        shown = orjson.dumps(refused, option=orjson.OPT_INDENT_2).decode()
        raise ToolFailure("invalid_params", f"InputValidationError: {shown}")
    wrong += [f"The parameter `{one['path'][0]}` is invalid: {one['message']}" for one in refused]
    if wrong:
        issue = "issue" if len(wrong) == 1 else "issues"
        raise ToolFailure(
            "invalid_params",
            f"InputValidationError: {tool} failed due to the following {issue}:\n" + "\n".join(wrong),
        )
    for name in _NAMING:
        if "\0" in found.get(name, ""):
            words = f"{tool} {name} cannot contain null bytes (\\0). Remove the null byte and try again."
            raise ToolFailure("invalid_params", words)
    return found


# parameters that contain file names
_NAMING = ("file_path", "pattern", "path", "glob", "type")


def _no_choice(name: str, choices: list[str]) -> dict[str, Any]:
    expected = "|".join(f'"{choice}"' for choice in choices)
    return {
        "code": "invalid_value",
        "values": choices,
        "path": [name],
        "message": f"Invalid option: expected one of {expected}",
    }


def _no_integer(name: str, value: int) -> dict[str, Any]:
    code, bound, sign = ("too_big", "maximum", "<=") if value > 0 else ("too_small", "minimum", ">=")
    limit = _SAFE_INTEGER if value > 0 else -_SAFE_INTEGER
    return {
        "code": code,
        bound: limit,
        "note": "Integers must be within the safe integer range.",
        "origin": "int",
        "inclusive": True,
        "path": [name],
        "message": f"Too {code[4:]}: expected int to be {sign}{limit}",
    }


_DIGITS = re.compile(r"\s*[+-]?\d+(\.\d+)?\s*", re.ASCII)


def _taken(kind: str, value: object) -> Any:
    """Convert `value` to `kind`, leniently; None if that is impossible."""
    if kind == "string":
        return value if isinstance(value, str) else None
    if kind == "boolean":
        if isinstance(value, str):
            return {"true": True, "false": False}.get(value)
        return value if isinstance(value, bool) else None
    if isinstance(value, str):
        if len(value) > _DIGITS_MAX or not _DIGITS.fullmatch(value):
            return None
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        if not value.is_integer():
            return None if kind == "integer" else value
        value = int(value)
    return value if kind == "integer" else max(-_SAFE_INTEGER, min(_SAFE_INTEGER, value))


def _wanted(kind: str, value: object) -> str:
    """Return the name of the type `kind` for an error about `value`."""
    if kind != "integer":
        return kind
    return "int" if isinstance(value, float) else "number"


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
