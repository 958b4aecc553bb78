"""Glob and Grep as Claude Code offers them with ripgrep, here with our own walk and RE2.

Other modules use `glob.glob`, `grep.grep` and `scan.scan` (`worker_operations` runs them in workers), and the
globs and ignore files (`mirroring`). All of it runs inside workers.
"""
