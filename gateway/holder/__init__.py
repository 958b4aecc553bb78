"""A process that holds file descriptors for the gateway, and the gateway's client of it.

Held descriptors survive the gateway: with the sockets of running commands held, those commands run on while
the gateway restarts. `holding` is the process, `holder` the client, `messages` their protocol. The process is
kept small and imports only the standard library.
"""
