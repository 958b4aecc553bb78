"""Registers the cluster with the gateway: the object that its entry point in pyproject.toml names."""

from __future__ import annotations

from gateway.cluster.routes import ROUTES
from gateway.cluster.topology import opened

routes = ROUTES

__all__ = ["opened", "routes"]
