"""What a token may, and what ends with it, over the `local` runtime."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.contracts.tokens import SHORT, TokensContract, connected
from tests.live import LiveGateway
from tests.unit.test_gateway_local import gateway, quick, tenant
from tests.waits import until

__all__ = ["gateway", "quick", "tenant"]


class TestLocalTokens(TokensContract):
    async def test_a_log_that_nobody_reads_keeps_no_connection_beyond_the_end(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        log = Path(gateway.environment["GATEWAY_STATE_DIR"], "tenants", tenant, "site.log")
        log.write_text(("x" * 4095 + "\n") * 4096)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
            ours = writer.get_extra_info("sockname")[1]
            head = f"GET /v1/tenants/{tenant}/logs?follow=1&lines=10000 HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Authorization: Bearer {gateway.token(tenant, ttl=SHORT)}\r\n\r\n"
            writer.write(head.encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            assert connected(gateway.port, ours)
            # nothing is told to who reads nothing
            await until(lambda: not connected(gateway.port, ours), SHORT + 20, every=0.1)
            writer.transport.abort()
        finally:
            log.unlink()
