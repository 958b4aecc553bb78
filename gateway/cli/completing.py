"""Shell completion for bash, zsh and fish."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import typer
from typer import completion as typers

from gateway.cli.options import PROGRAM, VARIABLE
from gateway.terminal import out

# typer's only registers itself, so that nothing is completed where zsh has just loaded it for the first word
_ZSH: Final = """if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _incus_gateway_completion "$@"
else
  compdef _incus_gateway_completion incus-gateway
fi"""


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish")],
) -> None:
    """Print a completion script, for commands, options and tenants.

    bash: incus-gateway completion bash >/etc/bash_completion.d/incus-gateway

    zsh: incus-gateway completion zsh >/usr/local/share/zsh/site-functions/_incus-gateway

    fish: incus-gateway completion fish >~/.config/fish/completions/incus-gateway.fish
    """
    # typer does not declare this one and the next as exported
    script = typers.get_completion_script  # type: ignore[attr-defined]
    said = script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value)
    if shell is Shell.ZSH:
        said, _, _ = said.rpartition("compdef ")
        said += _ZSH
    out.say(said)


def answer_shells() -> None:
    """Register the answers to the completion scripts, which set `VARIABLE` when they ask."""
    typers.completion_init()  # type: ignore[attr-defined]
