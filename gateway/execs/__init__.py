"""Commands of all tenants: started once, read by many, ended completely.

`Execs` is the registry (`registry`). An `Exec` (`exec`) outlives those that read it by an `Attachment`,
with a `Cursor` on each output (`streams`). It uses the runtime and the event bus, and no websockets. Other
rooms use what is named here.
"""

from gateway.execs.attachment import Attachment
from gateway.execs.ended import Ended
from gateway.execs.exec import Exec
from gateway.execs.registry import Execs
from gateway.execs.shown import started_at
from gateway.execs.streams import Cursor, Reading

__all__ = ["Attachment", "Cursor", "Ended", "Exec", "Execs", "Reading", "started_at"]
