"""incus-gateway: one websocket in front of Incus tenant containers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        # looked up on first use: it takes longer than all of a command's imports
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("incus-gateway")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0.0.0"
