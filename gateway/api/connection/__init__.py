"""One websocket of `gateway.v1`, from accept to close.

```
Connection ─ reads ─► ClientSocket ─► ServerWire (gateway.protocol): event ─► Requests ─► a family's method
           ◄───────── ClientSocket ◄──────────────────────────────── answer, notifications, output
```

`Connection` joins the parts. `ClientSocket` moves messages at the client's pace. `ServerWire` decides what
each one means. `Requests` runs calls, each as a task with one answer. `Peer` is the client: tenant, token,
tasks. The families answer: session, exec, tools, files, history, watches, events. Other packages use the
names in this module.
"""

from gateway.api.connection.connection import Connection
from gateway.api.connection.peer import Hub, Peer, close_code

__all__ = ["Connection", "Hub", "Peer", "close_code"]
