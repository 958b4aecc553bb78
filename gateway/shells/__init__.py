"""The tools Bash, BashOutput and KillShell, on `execs` and `tools`. Other packages use `Shells`."""

from gateway.shells.shells import Shells

__all__ = ["Shells"]
