"""The maximum length and count of everything that clients send. Lengths of text are in characters.

The edge checks, the inside trusts: websocket, HTTP, MCP and tools check what they are sent against these
before any other code sees it. `types` has models' types made of them; file workers, which have no pydantic,
need the numbers alone. `tests/unit/test_edge.py` finds what has no maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gateway.errors import TooLarge

PATH_MAX: Final = 4096  # bytes in the kernel (limits.h), so characters are enough
ARGUMENT_MAX: Final = (128 << 10) - 1  # what the kernel takes as one argument (MAX_ARG_STRLEN)
ARGUMENTS_MAX: Final = 65536  # the kernel's own limit is their bytes, see `runtime.launcher.check_size`
CONTENT_MAX: Final = 16 << 20  # text of a file; GATEWAY_WRITE_MAX and `BODY_MAX` are usually less
ARCHIVE_MAX: Final = 1 << 30  # base64; a template has 64 MiB, and `BODY_MAX` is usually less
FRAME_MAX: Final = 16 << 20  # bytes of a websocket's message: a file's text with its escapes
BODY_MAX: Final = 16 << 20  # bytes of a JSON body, for the same reason
REQUESTS_MAX: Final = 256  # in flight on one websocket; a client with more does not read its answers
TOKEN_MAX: Final = 16384
NAME_MAX: Final = 63  # of a tenant, a snapshot, a member: one label of a domain (RFC 1035)
DOMAIN_MAX: Final = 253  # RFC 1035
ID_MAX: Final = 200
EXEC_ID_MAX: Final = 128
VARIABLES_MAX: Final = 4096
SHORT_MAX: Final = 256
MCP_MAX: Final = 64 << 10  # bytes of a message of MCP but a tool's arguments; icons may come as data: URLs

# --- the head of an HTTP request ---------------------------------------------------------------------

TARGET_MAX: Final = 16 << 10  # bytes of a path as it is sent, where a character may take nine (%E2%82%AC)
QUERY_MAX: Final = 32 << 10  # bytes
QUERY_MEMBERS: Final = 64
HEADERS_MAX: Final = 128
HEADER_MAX: Final = 8 << 10  # bytes of a header that the table does not name
HEADERS: Final[Mapping[str, int]] = {
    "authorization": TOKEN_MAX + 64,
    "cookie": 32 << 10,  # browsers send those of the whole domain
    "host": DOMAIN_MAX + 7,  # with a final dot and a port
    "origin": DOMAIN_MAX + 16,  # with scheme and port
    "range": SHORT_MAX,
    "x-forwarded-proto": SHORT_MAX,
    "x-gateway-uri": TARGET_MAX + QUERY_MAX,
}


# --- how many values a message may have ----------------------------------------------------------------


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
