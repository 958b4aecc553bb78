"""Serves the application, and hands it on to a successor. From outside `serve` is used."""

from gateway.server.serving import LEAVE, serve

__all__ = ["LEAVE", "serve"]
