"""The protocol `gateway.v1`, both ends of it, without IO.

Frames and messages, which clients need too, are in `gateway_client.wire`. The server feeds what it receives
to a `ServerWire` and gets events with checked parameters (`params`). Nothing here waits, so every case can be
tested with values. Import from this package, not from its modules, except `maxima`, `types` and `results`.
"""

# ruff: noqa: F403 - this package has the names of its modules, and mypy knows them by these imports
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.protocol.maxima import *
    from gateway.protocol.params import *
    from gateway.protocol.results import wire_schema as wire_schema
    from gateway.protocol.server_wire import *
    from gateway_client.wire import *
else:

    def __getattr__(name: str) -> object:
        # on first use: `maxima` is imported by processes that must not load pydantic, which the others need
        from importlib import import_module

        if not name.startswith("_") and name not in _SUBMODULES:
            for module in _MODULES:
                if hasattr(found := import_module(module), name):
                    globals()[name] = getattr(found, name)
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MODULES: Final = (
    "gateway_client.wire",
    *(f"{__name__}.{module}" for module in ("maxima", "params", "results", "server_wire")),
)
_SUBMODULES: Final = ("maxima", "params", "results", "server_wire", "types")
