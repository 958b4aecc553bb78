"""Make the terminal on stdin the session's controlling terminal, and exec the command in the arguments.

Incus does the same in its containers. A gateway started as a background job ignores SIGINT, which its
children inherit; the default is restored so that Ctrl-C works.

Usage: python own_terminal.py PROGRAM ARGUMENT…, with PROGRAM's path, in a new session.
"""

import fcntl
import os
import signal
import sys
import termios

if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - the gateway's own start command
