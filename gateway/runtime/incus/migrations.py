"""Read the state of a site's migration from a host folder from its instance's keys.

`gateway.migration` writes them. They are read here because they affect routes: until the switch, the tenant's
domain leads to the old service.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

from gateway.runtime.sites import Exposure

STATE: Final = "user.gateway.migrate"
OLD: Final = "user.gateway.migrate.old"  # address of the old service, ADDRESS:PORT
FOLDER: Final = "user.gateway.migrate.from"
UNIT: Final = "user.gateway.migrate.unit"
FACTS: Final = "user.gateway.migrate.facts"  # about the old service, as JSON, without variables' values

DEVICE: Final = "migrate"
"""The instance's device that shows the folder as the workspace."""

BEFORE_SWITCH: Final = frozenset({"attaching", "attached", "copied", "returning"})

_PLACE: Final = re.compile(r"([0-9.]{7,15}):([1-9][0-9]{0,4})")


def old_service(config: Mapping[str, str]) -> Exposure | None:
    """Return where the old service answers while an instance's domain still leads to it, or None."""
    if config.get(STATE) not in BEFORE_SWITCH:
        return None
    match = _PLACE.fullmatch(config.get(OLD, ""))
    if match is None or int(match[2]) > 65535:
        return None
    try:
        address = str(ipaddress.IPv4Address(match[1]))
    except ValueError:
        return None
    return Exposure(address, int(match[2]))
