"""The gateways of an Incus cluster, one on each member, as one of them sees the others.

`Membership` returns this member and the others. Without a cluster there is one member, with an empty name.
"""

from gateway.cluster.member import DRAINED, PREFIX, Member, Membership

__all__ = ["DRAINED", "PREFIX", "Member", "Membership"]
