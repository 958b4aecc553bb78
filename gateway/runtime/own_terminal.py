"""Make the terminal on standard input this session's own, and become the command in the arguments.

Incus does so for its containers. What was started in a background job ignores SIGINT, and so would all that
it starts: Ctrl-C must work again.

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
