"""Put the table in force that lets each tenant of the network use its own address only; see
`bridge_port`.

A bridge learns from each frame where an address is, and Incus's filter looks at frames after that. This table
looks before. A second one drops what comes to the host past the bridge.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final

from gateway.host import HostError
from gateway.rootfs import bridge_port
from gateway.settings import Settings

_HERE: Final = Path(__file__).with_suffix("")
_MOST: Final = 1 << 14  # addresses; more would take seconds to put in force


def guard(settings: Settings) -> str | None:
    """Put the table in force; return what was changed, or None. Needs root.

    Where the kernel cannot have such a table, tenants get Incus's filter. Raises `HostError`.
    """
    hook = bridge_port.guard_hook(settings.incus_socket.parent, settings.network)
    nft, wanted = shutil.which("nft"), rendered(settings)
    if wanted is None:
        hook.unlink(missing_ok=True)
        return None
    # once there are tenants that need it, a failure is one
    if not hook.exists() and (nft is None or not _fits(nft, wanted)):
        return None
    if nft is None:
        raise HostError("nft is missing, and no tenant starts without it; install the package nftables")
    table = hook.with_suffix(".nft")
    words = {"NFT": nft, "TABLE": table_name(settings), "FILE": str(table)}
    script = _filled(_HERE.with_suffix(".sh").read_text(), words)
    same = _text(table) == wanted and _text(hook) == script
    if same and in_force(settings):
        return None
    hook.parent.mkdir(mode=0o755, exist_ok=True)
    _write(table, wanted, 0o644)
    said = subprocess.run([nft, "-f", str(table)], check=False, capture_output=True, text=True)
    if said.returncode != 0:
        raise HostError(f"cannot restrict tenants to their addresses: {said.stderr.strip()[:500]}")
    _write(hook, script, 0o755)
    return "each tenant is restricted to its own"


def in_force(settings: Settings) -> bool:
    """Return whether the table is there. Needs root."""
    nft = shutil.which("nft") or "nft"
    words = (nft, "list", "chain", "bridge", table_name(settings), "ports")
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def table_name(settings: Settings) -> str:
    """Return the name of the network's table."""
    return "gateway_" + re.sub("[^A-Za-z0-9]", "_", settings.network)


def rendered(settings: Settings) -> str | None:
    """Return the table as nft(8) takes it, None if the network has too many addresses."""
    bridge = IPv4Interface(settings.network_ipv4)
    if bridge.network.num_addresses > _MOST:
        return None
    names, addresses = [], []
    for address in bridge.network.hosts():
        if address != bridge.ip:
            names.append(f'"{bridge_port.port_name(address)}"')
            addresses.append(f"{names[-1]} . {bridge_port.hardware_address(address)} . {address}")
    words = {"TABLE": table_name(settings), "NAMES": ", ".join(names), "ADDRESSES": ", ".join(addresses)}
    return _filled(_HERE.with_suffix(".nft").read_text(), words)


def _filled(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(rf"\b{name}\b" for name in words), lambda found: words[found[0]], text)


def _fits(nft: str, text: str) -> bool:
    """Return whether nft and the kernel take the table."""
    words = (nft, "--check", "-f", "-")
    return subprocess.run(words, check=False, input=text, text=True, capture_output=True).returncode == 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write(path: Path, text: str, mode: int) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.chmod(mode)
    new.replace(path)
