"""The gateways of an Incus cluster, one on each member, on top of the gateway of one server."""
