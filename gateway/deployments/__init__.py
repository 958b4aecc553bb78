"""Deployments: from a domain to a site that answers, in phases that can each be undone.

Other packages use `Deployer`, `DeploymentRequest`, and the functions of `template`.
"""

from gateway.deployments.context import Context
from gateway.deployments.deployments import Deployer
from gateway.deployments.health import Hangs, Health
from gateway.deployments.record import Record
from gateway.deployments.request import DeploymentRequest

__all__ = ["Context", "Deployer", "DeploymentRequest", "Hangs", "Health", "Record"]
