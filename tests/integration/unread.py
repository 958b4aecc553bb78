"""What incusd does not read any more of a command's outputs."""

from __future__ import annotations

import os
from typing import Any

from tests.contracts.runtime import finish
from tests.waits import until


async def last_words(process: Any) -> None:
    """Write into the pipes of a silent command once incusd has closed them; the gateway reads that."""
    sockets = process._sockets
    await until(lambda: bool(sockets._pipes))
    pipes = {name: os.open(f"/proc/self/fd/{sockets._pipes[name]}", os.O_WRONLY) for name in ("1", "2")}
    assert (await sockets.result()).metadata["return"] == 0
    for name, descriptor in pipes.items():
        os.write(descriptor, f"last {name}".encode())
        os.close(descriptor)
    exit_, found = await finish(process)
    assert (exit_.code, found) == (0, [b"last 1", b"last 2"])
    assert not sockets._pipes
