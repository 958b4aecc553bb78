#!/usr/bin/env python3
"""Writes src/wire-types.ts, the types of `gateway.v1`, from the gateway's own schema of it.

.venv/bin/python clients/typescript/wire_types.py           writes it
.venv/bin/python clients/typescript/wire_types.py --check   fails where it is not what would be written
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from gateway.protocol import wire_schema

TARGET: Final = Path(__file__).parent / "src" / "wire-types.ts"
_PLAIN: Final = {
    "string": "string",
    "integer": "number",
    "number": "number",
    "boolean": "boolean",
    "null": "null",
}
_NAME: Final = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")


def _type(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"$ref": str(where)}:
            return where.rpartition("/")[2]
        case {"anyOf": list(some)}:
            return " | ".join(dict.fromkeys(_type(one) for one in some))
        case {"const": value}:
            return json.dumps(value)
        case {"enum": list(values)}:
            return " | ".join(json.dumps(value) for value in values)
        case {"type": "array", "items": dict(items)}:
            inner = _type(items)
            return f"readonly ({inner})[]" if "|" in inner else f"readonly {inner}[]"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"Readonly<Record<string, {_type(values)}>>"
        case {"type": "object"}:
            return "Readonly<Record<string, unknown>>"
        case {"type": str(kind)} if kind in _PLAIN:
            return _PLAIN[kind]
    raise ValueError(f"no TypeScript for {schema}")


def _written(schema: Mapping[str, Any]) -> str:
    """Return a type's members; one that may be left out may be undefined too."""
    lines = []
    for name, one in schema.get("properties", {}).items():
        key = name if _NAME.fullmatch(name) else json.dumps(name)
        needed = name in schema.get("required", ())
        may, absent = ("", "") if needed else ("?", " | undefined")
        lines.append(f"  readonly {key}{may}: {_type(one)}{absent};")
    return "{\n" + "\n".join(lines) + "\n}" if lines else "Readonly<Record<string, never>>"


def _lines() -> Iterator[str]:
    schema = wire_schema()
    yield "// Made by wire_types.py from the gateway's own schema of `gateway.v1`: do not change it by hand."
    yield "// biome-ignore-all format: it is as it was made\n"
    for name, one in sorted(schema["$defs"].items()):
        if told := one.get("description"):
            yield f"/** {' '.join(told.split())} */"
        yield f"export type {name} = {_written(one)};\n"
    yield "/** Parameters and result of each method. */\nexport interface Methods {"
    for method, one in schema["methods"].items():
        yield f'  "{method}": {{ params: {_type(one["params"])}; result: {_type(one["result"])} }};'
    yield "}\n\n/** Parameters of what the server says by itself. */\nexport interface Notifications {"
    for name, one in schema["notifications"].items():
        yield f'  "{name}": {_type(one)};'
    yield "}"


def main() -> int:
    text = "\n".join(_lines()) + "\n"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
        return 0
    if not TARGET.exists() or TARGET.read_text() != text:
        sys.stderr.write(f"{TARGET.name} is stale; run .venv/bin/python clients/typescript/wire_types.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
