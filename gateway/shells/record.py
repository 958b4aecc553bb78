"""What the gateway's next process must know of a Bash command, besides its output and its end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from gateway.runtime import StreamName
from gateway.tools.lasting import LastingCall
from gateway.tools.shell import KEPT

Count = Annotated[int, Field(ge=0)]
Short = Annotated[str, Field(max_length=512)]

_MOST: Final = 3000  # bytes of texts chosen by the caller; more would leave no room for the rest


@dataclass(slots=True)
class Record:
    """One Bash command. Its caller waits in front of it until the time `until`; then it is `moved`.

    `offsets` say how much of each output has been copied, `file` how much of that is in the output file: None
    if there is no file, -1 if it could not be written. `taken` is how much BashOutput has returned, `last`
    its last call and the offsets at which that began. The first `head` bytes are kept while `shown`.
    """

    shell: Annotated[str, Field(pattern=r"^bash_[0-9a-f]{8}$")]
    session: Annotated[str, Field(max_length=128)] | None
    cwd: str | None
    phase: Literal["front", "moved", "background"]
    seconds: float
    until: float
    meaning: Short | None
    call: LastingCall | None
    notes: list[str] = field(default_factory=list)
    offsets: dict[StreamName, Count] = field(default_factory=dict)
    size: Count = 0
    characters: Count = 0
    pending: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,3}$")] = ""
    head: Annotated[int, Field(ge=0, le=KEPT)] = 0
    shown: bool = True
    file: Annotated[int, Field(ge=-1)] | None = None
    taken: dict[StreamName, Count] = field(default_factory=dict)
    last: tuple[str, dict[StreamName, Count]] | None = None
    killer: str | None = None

    def facts(self) -> Mapping[str, Any]:
        """Return the record as a JSON object."""
        return {name: getattr(self, name) for name in _NAMES}

    @property
    def lasting(self) -> bool:
        """Whether the next process should continue it: somebody may ask for it, and the record fits."""
        said = [self.cwd or "", self.session or "", *self.notes]
        if self.call is not None:
            said += [self.call.id, self.call.by]
        if self.session is None and (self.call is None or self.phase == "background"):
            return False
        return len(orjson.dumps("".join(said).encode(errors="replace").decode())) < _MOST


_NAMES: Final = tuple(one.name for one in fields(Record))
_RECORD: Final = TypeAdapter(Record)


def parsed(found: Mapping[str, Any]) -> Record:
    """Return the record that an earlier process wrote. Raises `ValueError`."""
    try:
        return _RECORD.validate_python(found, strict=False)
    except ValidationError as error:
        raise ValueError(f"not a command's record: {error.error_count()} faults") from None


def mark(call_id: str | None) -> str | None:
    """Return a short digest of a call's id, which may be long."""
    return None if call_id is None else hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:24]
