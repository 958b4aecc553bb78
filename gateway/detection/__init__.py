"""Detection: what a folder without a manifest is, and how it is installed and started.

From outside: `Clues`, `detect`, `Detected`. A folder is whatever its owner wrote: `Clues` is a bounded part
of it, and `detect` is a function of that part, without IO.
"""

from gateway.detection.clues import Clues
from gateway.detection.decision import detect
from gateway.detection.detected import Detected

__all__ = ["Clues", "Detected", "detect"]
