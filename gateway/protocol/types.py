"""Types for the models of all interfaces: each string, list and object with its maximum, see `maxima`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from gateway.protocol.maxima import (
    ARCHIVE_MAX,
    ARGUMENT_MAX,
    ARGUMENTS_MAX,
    CONTENT_MAX,
    DOMAIN_MAX,
    EXEC_ID_MAX,
    ID_MAX,
    NAME_MAX,
    PATH_MAX,
    SHORT_MAX,
    TOKEN_MAX,
    VARIABLES_MAX,
)

Path: TypeAlias = Annotated[str, Field(min_length=1, max_length=PATH_MAX)]
Cwd: TypeAlias = Annotated[str, Field(max_length=PATH_MAX)]
FileName: TypeAlias = Annotated[str, Field(min_length=1, max_length=255)]
Argument: TypeAlias = Annotated[str, Field(max_length=ARGUMENT_MAX)]
Command: TypeAlias = Annotated[str, Field(min_length=1, max_length=ARGUMENT_MAX)]
Argv: TypeAlias = Annotated[list[Argument], Field(min_length=1, max_length=ARGUMENTS_MAX)]
VariableName: TypeAlias = Annotated[str, Field(max_length=SHORT_MAX)]
Variables: TypeAlias = Annotated[dict[VariableName, Argument], Field(max_length=VARIABLES_MAX)]
# `deployments.request.check_env` has the maximum of all together
SiteValue: TypeAlias = Annotated[str, Field(max_length=64 << 10)]
User: TypeAlias = Annotated[str, Field(max_length=SHORT_MAX)] | int
Content: TypeAlias = Annotated[str, Field(max_length=CONTENT_MAX)]
Archive: TypeAlias = Annotated[str, Field(min_length=1, max_length=ARCHIVE_MAX)]
Etag: TypeAlias = Annotated[str, Field(min_length=1, max_length=ID_MAX)]
Token: TypeAlias = Annotated[str, Field(max_length=TOKEN_MAX)]
Slot: TypeAlias = Annotated[str, Field(max_length=32, pattern="^[a-z0-9]{1,32}$")]
SessionName: TypeAlias = Annotated[str, Field(min_length=1, max_length=128)]
CallId: TypeAlias = Annotated[str, Field(min_length=1, max_length=ID_MAX)]
ToolName: TypeAlias = Annotated[str, Field(max_length=ID_MAX)]
TokenId: TypeAlias = Annotated[str, Field(min_length=1, max_length=ID_MAX)]
ExecId: TypeAlias = Annotated[str, Field(min_length=1, max_length=EXEC_ID_MAX, pattern=r"^[A-Za-z0-9._:-]+$")]
ExecName: TypeAlias = Annotated[str, Field(max_length=EXEC_ID_MAX)]  # of a command that may not exist
TurnId: TypeAlias = Annotated[str, Field(max_length=40, pattern=r"^[0-9a-f]{40}$")]
Title: TypeAlias = Annotated[str, Field(max_length=4000)]
Label: TypeAlias = Annotated[str, Field(max_length=ID_MAX)]  # shown to people, such as an agent's name
TenantName: TypeAlias = Annotated[str, Field(max_length=NAME_MAX)]
MemberName: TypeAlias = Annotated[str, Field(max_length=NAME_MAX)]
SnapshotName: TypeAlias = Annotated[str, Field(max_length=NAME_MAX)]
SizeName: TypeAlias = Annotated[str, Field(max_length=NAME_MAX)]
DeploymentId: TypeAlias = Annotated[str, Field(max_length=NAME_MAX)]
TemplateName: TypeAlias = Annotated[str, Field(min_length=1, max_length=NAME_MAX)]
DomainName: TypeAlias = Annotated[str, Field(max_length=DOMAIN_MAX)]
EventType: TypeAlias = Annotated[str, Field(max_length=SHORT_MAX)]
EventPosition: TypeAlias = Annotated[str, Field(max_length=4096)]
Choices: TypeAlias = Annotated[str, Field(max_length=64 * (SHORT_MAX + 1))]  # 64 values, with commas
