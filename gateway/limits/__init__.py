"""Limits of tenants and of the host: bytes in flight, disk, memory."""
