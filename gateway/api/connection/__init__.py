"""One websocket of `gateway.v1`, from accept to close.

```
Connection ─ reads ─► ClientSocket ─► ServerWire (gateway.protocol): event ─► Requests ─► a family's method
           ◄───────── ClientSocket ◄──────────────────────────────── answer, notifications, output
```

`Connection` joins the parts. `ClientSocket` moves messages at the client's pace. `ServerWire` decides what
each one means. `Requests` runs calls, each as a task with one answer. `ClientSession` is the client: tenant,
token, tasks. The families in `methods` and `exec_methods` answer. Other packages use the names
in this module.
"""

from gateway.api.connection.client_session import ClientSession, Hub, close_code
from gateway.api.connection.connection import Connection

__all__ = ["ClientSession", "Connection", "Hub", "close_code"]
