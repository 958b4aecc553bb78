"""Detect what a folder without a manifest is, and how it is installed and started.

Other packages use `Clues`, `detect` and `Detection`. A folder's contents are untrusted: `Clues` is a bounded
part of them, and `detect` is a function of that part, without IO.
"""

from gateway.detection.clues import Clues, Detection
from gateway.detection.decision import detect

__all__ = ["Clues", "Detection", "detect"]
