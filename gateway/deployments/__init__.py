"""Deployments: from a domain to a site that answers, in phases that can each be undone.

Other packages use `Deployments`, `Request`, and the functions of `template`.
"""

from gateway.deployments.context import Context
from gateway.deployments.deployments import Deployments
from gateway.deployments.health import Hangs, Health
from gateway.deployments.record import Record
from gateway.deployments.request import Request

__all__ = ["Context", "Deployments", "Hangs", "Health", "Record", "Request"]
