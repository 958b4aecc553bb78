"""Glob and Grep: what Claude Code makes of ripgrep, on our own walk and RE2.

From outside: `glob.glob`, `grep.grep` and `scan.scan`, which `worker_operations` hands to workers, and the
globs and ignore files, which `mirroring` shares. All of it runs inside workers.
"""
