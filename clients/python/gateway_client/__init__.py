"""The Python client of the gateway: files, commands and events of a tenant, over asyncio.

    async with Client("http://127.0.0.1:8080", token=…) as client:
        shop = client.tenant("shop")
        print((await shop.read("src/App.tsx")).text)
        async with shop.exec("bun install") as install:
            async for chunk in install.stdout:
                sys.stdout.buffer.write(chunk)
            exit = await install.wait()

Everything that fails raises a class of `gateway_client.errors`. `gateway_client.sync` is the same without
asyncio.
"""

from gateway_client.attachment import Exit
from gateway_client.client import Client, TenantInfo
from gateway_client.credentials import Token
from gateway_client.deployments import Deployment, DeploymentRecord, History, Phase
from gateway_client.errors import Disconnected, GatewayError, TokenUnavailable
from gateway_client.events import Event, EventStream
from gateway_client.execution import Exec, Killed
from gateway_client.files import Changed, Content, Entry, Files, Watch
from gateway_client.output import Output
from gateway_client.results import RunResult, ShellResult, ToolResult
from gateway_client.retry import Change, Retry
from gateway_client.tenant import Tenant

__all__ = [
    "Change",
    "Changed",
    "Client",
    "Content",
    "Deployment",
    "DeploymentRecord",
    "Disconnected",
    "Entry",
    "Event",
    "EventStream",
    "Exec",
    "Exit",
    "Files",
    "GatewayError",
    "History",
    "Killed",
    "Output",
    "Phase",
    "Retry",
    "RunResult",
    "ShellResult",
    "Tenant",
    "TenantInfo",
    "Token",
    "TokenUnavailable",
    "ToolResult",
    "Watch",
]
