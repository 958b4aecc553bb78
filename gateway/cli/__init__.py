"""The command line `incus-gateway`."""
