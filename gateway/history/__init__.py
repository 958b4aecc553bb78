"""History by turns: what each tool session changed, as commits that can be looked at and gone back to.

`History` is all that other rooms use. `open_turns` says which turn a change belongs to, by values; `recorder`
makes the commits, one at a time; `repository` runs git in the tenant, as the site's user and on a repository
of its own; `reading` takes apart what it prints.
"""

from gateway.history.history import History
from gateway.history.reading import Turn

__all__ = ["History", "Turn"]
