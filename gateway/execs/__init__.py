"""Commands of all tenants: started once, read by many clients, ended with their whole process tree.

`Execs` is the registry (`registry`). An `Exec` (`exec`) outlives its readers; each of them has an
`Attachment` with a `Cursor` per output (`streams`). The package uses the runtime and the event bus, but no
websockets. Other packages import only the names listed here.
"""

from gateway.execs.ended import ExecEnd
from gateway.execs.exec import Exec, started_at
from gateway.execs.readers import Attachment
from gateway.execs.registry import Execs
from gateway.execs.streams import Cursor, Reading

__all__ = ["Attachment", "Cursor", "Exec", "ExecEnd", "Execs", "Reading", "started_at"]
