"""Bounds the cost of parsing a JSON message, before it is parsed."""

from __future__ import annotations

from typing import Final

from gateway.errors import TooLarge

VALUES_MAX: Final = 200_000  # values and names in one message; the largest argv has 65 536
LIGHT: Final = 256 << 10  # characters of a message too short to be checked
_SLICE: Final = 128 << 10
_STRUCTURE: Final = (",", ":", "[", "{")


def weigh(text: str | bytes) -> None:
    """Raise `TooLarge` for JSON with more values than any message needs.

    16 MiB of `{},` take a second and half a gigabyte to parse, and block everything else. This check may take
    as long, but releases the interpreter every millisecond: run it in a thread. Invalid JSON passes.
    """
    values, inside, escaped = 0, False, False
    for start in range(0, len(text), _SLICE):
        part = text[start + escaped : start + _SLICE]
        piece = part if isinstance(part, str) else part.decode("latin-1")
        escaped = (len(piece) - len(piece.rstrip("\\"))) % 2 == 1
        if escaped:
            piece = piece[:-1]
        if "\\" in piece:
            piece = piece.replace("\\\\", "").replace('\\"', "")
        parts = piece.split('"')
        outside = " ".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0
        values += sum(map(outside.count, _STRUCTURE))
        if values > VALUES_MAX:
            raise TooLarge(f"the message has over {VALUES_MAX} values; send fewer", limit=VALUES_MAX)
