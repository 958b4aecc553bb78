"""Shell completion for bash, zsh and fish."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from typer import completion as typers

from gateway.cli.options import PROGRAM, VARIABLE
from gateway.terminal import out


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish")],
) -> None:
    """Print a completion script, for commands, options and tenants.

    bash: incus-gateway completion bash >/etc/bash_completion.d/incus-gateway

    zsh: source <(incus-gateway completion zsh), in .zshrc after compinit

    fish: incus-gateway completion fish >~/.config/fish/completions/incus-gateway.fish
    """
    # typer does not declare this one and the next as exported
    script = typers.get_completion_script  # type: ignore[attr-defined]
    out.say(script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value))


def answer_shells() -> None:
    """Register the answers to the completion scripts, which set `VARIABLE` when they ask."""
    typers.completion_init()  # type: ignore[attr-defined]
