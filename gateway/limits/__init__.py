"""What a tenant and a host may use: bytes in flight, disk, memory."""
