"""History by turns: what each tool session changed, as commits to look at and to go back to.

Other packages use `History` only. `recorder` decides which turn a change belongs to, and makes the commits;
`outside` records what people and their commands change without a turn; `repository` runs git in the tenant.
"""

from gateway.history.history import History
from gateway.history.repository import Commit

__all__ = ["Commit", "History"]
