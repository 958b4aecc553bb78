"""Runs a gateway that finds no tenant before a file exists: `stuck.py FILE serve`. As if Incus were slow."""

from __future__ import annotations

import sys
from pathlib import Path

from gateway.cli.main import main
from gateway.runtime import TenantInstance
from gateway.runtime.local.runtime import LocalTenants
from tests import constants
from tests.waits import until


def hold_up(there: Path) -> None:
    """Have the runtime answer about a tenant only once the file is there."""
    get = LocalTenants.get

    async def late(self: LocalTenants, name: str) -> TenantInstance:
        await until(there.exists)
        return await get(self, name)

    LocalTenants.get = late  # type: ignore[method-assign]


if __name__ == "__main__":
    constants.apply()
    hold_up(Path(sys.argv.pop(1)))
    main()
