"""Fetches the gateway's own ripgrep: one static program, run only inside file workers."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Final

from gateway.host import HostError, npm
from gateway.settings import Settings

VERSION: Final = "1.18.0"  # of the package; ripgrep's own is 15.0
# npm's dist.integrity of @vscode/ripgrep-linux-ARCHITECTURE at that version
_INTEGRITY: Final = {
    "x64": "sha512-mQ3bVrUpnD2vs7QT0vX90Lt0cnUq467uFtEktIdsJJmW296RoSULRGqWgzG1AKxyBpNDD6l4ZO4qKf6SgyC23Q==",
    "arm64": "sha512-lQ/5zTG++U0E3IhVgS4EPTTn/U4okncaRMM5GOFfOYZywS4nuD31GhkHbNYlDk5CuDC68+hYJ0/eQeyCKJDA+g==",  # noqa: E501
}
_ARCHITECTURE: Final = {"x86_64": "x64", "aarch64": "arm64"}


def ensure(settings: Settings) -> str | None:
    """Have the program at `settings.ripgrep`; return what was done, None where it was there.

    Nothing depends on it but the time of searches in large trees: what goes wrong is told and left.
    """
    target = settings.ripgrep
    mark = target.with_name(f"{target.name}.version")
    architecture = _ARCHITECTURE.get(platform.machine())
    if architecture is None:
        return f"left out: there is none for {platform.machine()}"
    wanted = f"{VERSION}-{architecture}"
    if target.exists() and mark.exists() and mark.read_text() == wanted:
        return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".rg-") as folder:
            fetched = Path(folder, "rg")
            package = f"@vscode/ripgrep-linux-{architecture}@{VERSION}"
            said = npm.fetch(package, _INTEGRITY[architecture], "package/bin/rg", fetched)
            fetched.replace(target)
        mark.write_text(wanted)
    except (HostError, OSError) as error:
        return f"left out, which only makes searches in large trees slower: {error}"
    return said
