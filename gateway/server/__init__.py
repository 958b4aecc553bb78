"""Serves the application, and hands over to a successor. Other packages use `serve`."""

from gateway.server.serving import LEAVE, serve

__all__ = ["LEAVE", "serve"]
