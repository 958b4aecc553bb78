"""What an editor does with a workspace: stat, list, read, write, move, remove, mkdir, raw bytes, watching.

From outside use `files.Files` and, for HTTP, `http`. `handlers`, `opening`, `removing`, `sweeping` and
`watch_loop` run inside workers (see `gateway.rootfs`), which import no more than they need; so nothing is
imported here.
"""
