"""A process that holds descriptors for the gateway, and the gateway's end of it.

What it holds outlives the gateway: the sockets of running commands, which go on while it is restarted.
`holding` is the process, `holder` its client; `messages` are what both say. The process is to stay small, and
imports nothing but Python's own.
"""
