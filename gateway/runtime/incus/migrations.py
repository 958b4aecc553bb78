"""Reads from an instance's keys how far its site was moved in from a folder of the host.

`gateway.migration` writes them. They are read here so that every route follows them: until the switch the
tenant's domain leads to the old service.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

from gateway.runtime.sites import Exposure

STATE: Final = "user.gateway.migrate"
OLD: Final = "user.gateway.migrate.old"  # where the old service listens, ADDRESS:PORT
FOLDER: Final = "user.gateway.migrate.from"
UNIT: Final = "user.gateway.migrate.unit"
FACTS: Final = "user.gateway.migrate.facts"  # of the old service, as JSON, without values of variables

BEFORE_SWITCH: Final = frozenset({"attaching", "attached", "copied", "returning"})

_PLACE: Final = re.compile(r"([0-9.]{7,15}):([1-9][0-9]{0,4})")


def old_service(config: Mapping[str, str]) -> Exposure | None:
    """Return where an instance's domain leads while its old service serves it, or None."""
    if config.get(STATE) not in BEFORE_SWITCH:
        return None
    match = _PLACE.fullmatch(config.get(OLD, ""))
    if match is None or int(match[2]) > 65535:
        return None
    try:
        address = str(ipaddress.IPv4Address(match[1]))
    except ValueError:
        return None
    return Exposure(address, int(match[2]), f"{address}:{match[2]}")
