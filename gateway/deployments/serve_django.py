"""Starts a Django project's dev server, which answers to the tenant's domain beside what its settings allow.

Runs in the container: `python -c "$(cat serve_django.py)" manage.py runserver …`. The project's files stay as
they are. Its own check of hosts stays, too; behind Caddy it takes a request for as secure as it was sent.
"""

import contextlib
import os
import runpy
import sys
from typing import Any

DOMAIN = os.environ.get("__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS", "")
LOCAL = [".localhost", "127.0.0.1", "[::1]"]  # what Django allows where its settings name no host


def allow() -> None:
    """Have the settings of development allow the domain, in this process and in those that it starts."""
    from django import conf
    from django.utils import autoreload

    read = conf.Settings.__init__

    def settings(self: Any, module: str) -> None:
        read(self, module)
        if self.DEBUG and DOMAIN:
            self.ALLOWED_HOSTS = [*(self.ALLOWED_HOSTS or LOCAL), DOMAIN]
            if self.SECURE_PROXY_SSL_HEADER is None:
                self.SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

    conf.Settings.__init__ = settings
    autoreload.get_child_arguments = lambda: [sys.executable, *sys.orig_argv[1:]]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with contextlib.suppress(ImportError):  # which manage.py tells, too
        allow()
    runpy.run_path(sys.argv[0], run_name="__main__")
