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

from typing import TYPE_CHECKING

from gateway_client.errors import Disconnected, GatewayError, TokenUnavailable

if TYPE_CHECKING:
    from gateway_client.attachment import Exit
    from gateway_client.client import Client, TenantInfo
    from gateway_client.credentials import Token
    from gateway_client.deployments import Deployment, DeploymentRecord, History, Phase
    from gateway_client.events import Event, EventStream
    from gateway_client.execution import Exec, Killed
    from gateway_client.files import Changed, Content, Entry, Files, Watch
    from gateway_client.output import Output
    from gateway_client.results import RunResult, ShellResult, ToolResult
    from gateway_client.retry import Change, Retry
    from gateway_client.tenant import Tenant
else:

    def __getattr__(name: str) -> object:
        # loaded on first use: importing all of it takes longer than a short command line program runs
        for module, names in _MODULES.items():
            if name in names.split():
                from importlib import import_module

                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MODULES = {
    "attachment": "Exit",
    "client": "Client TenantInfo",
    "credentials": "Token",
    "deployments": "Deployment DeploymentRecord History Phase",
    "events": "Event EventStream",
    "execution": "Exec Killed",
    "files": "Changed Content Entry Files Watch",
    "output": "Output",
    "results": "RunResult ShellResult ToolResult",
    "retry": "Change Retry",
    "tenant": "Tenant",
}

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
