"""File operations of an editor: stat, list, read, write, move, remove, mkdir, raw bytes, watching.

Other packages use `files.Files` and, for HTTP, `http`. `operations`, `opening` and `watcher` run inside
workers (see `gateway.rootfs`), which import as little as possible; so this module imports nothing.
"""
