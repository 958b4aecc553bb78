"""incus-gateway: one websocket in front of Incus tenant containers."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("incus-gateway")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"
