"""History by turns: what each tool session changed, as commits to look at and to go back to.

Other packages use `History` only. `open_turns` decides which turn a change belongs to, without IO; `recorder`
makes the commits, one at a time; `repository` runs git in the tenant, as the site's user and on a separate
repository; `reading` parses what it prints.
"""

from gateway.history.history import History
from gateway.history.reading import Turn

__all__ = ["History", "Turn"]
