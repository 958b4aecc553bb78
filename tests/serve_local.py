"""Makes tenants of the `local` runtime, then is `incus-gateway serve`: `python -m tests.serve_local NAME…`.

For tests in other languages, which need one start of Python so, and not one for each command.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from gateway.cli.main import main
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings


async def make(names: Sequence[str]) -> None:
    async with LocalRuntime(Settings()) as runtime:
        for name in names:
            await runtime.tenants.create(name)


if __name__ == "__main__":
    if names := sys.argv[1:]:
        asyncio.run(make(names))
    sys.argv[1:] = ["serve"]
    main()
