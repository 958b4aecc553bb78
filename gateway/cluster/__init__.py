"""The gateway as one of several, one on each member of an Incus cluster.

`Membership` tells this member and the others; without a cluster there is one, whose name is empty.
"""

from gateway.cluster.member import DRAINED, PREFIX, Member, Membership

__all__ = ["DRAINED", "PREFIX", "Member", "Membership"]
