"""The results of tools and commands of a tenant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway_client.errors import GatewayError, from_wire


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A tool's result, in the form of an MCP tool result. `structured` holds the same facts as data."""

    content: Sequence[Mapping[str, Any]]
    is_error: bool = False
    structured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text parts, joined by newlines."""
        return "\n".join(str(part["text"]) for part in self.content if part.get("type") == "text")

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> ToolResult:
        return cls(value.get("content", ()), bool(value.get("isError")), value.get("structuredContent") or {})


class ShellResult(ToolResult):
    """The result of Bash and BashOutput. An exit code other than 0 is a result, not an error."""

    @property
    def status(self) -> Literal["running", "completed", "failed", "killed"]:
        found: Literal["running", "completed", "failed", "killed"] = self.structured["status"]
        return found

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the command runs."""
        return self.structured.get("exitCode")

    @property
    def exec(self) -> str:
        """The id of the command, for `Tenant.attach`."""
        return str(self.structured["exec"])

    @property
    def shell_id(self) -> str | None:
        """The id of a command in the background, for `bash_output` and `kill_shell`."""
        return self.structured.get("shellId")

    @property
    def output_file(self) -> str | None:
        """The file with the whole output, for `read`, if the text is not all of it."""
        return self.structured.get("outputFile")


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a command over HTTP. `reason` says whether it exited or timed out."""

    exec: str
    exit_code: int | None
    signal: str | None
    stdout: str
    stderr: str
    truncated: bool
    duration_ms: int
    reason: str = "exited"


def failure(result: ToolResult) -> GatewayError:
    """Return the typed error of a result with `is_error`."""
    facts = {name: fact for name, fact in result.structured.items() if name != "code"}
    return from_wire(str(result.structured.get("code", "")), result.text, facts)
