"""Completion of what is typed in bash, zsh and fish."""

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
    """Print the script by which a shell completes commands, options and tenants.

    bash: incus-gateway completion bash >/etc/bash_completion.d/incus-gateway

    zsh: source <(incus-gateway completion zsh), in .zshrc after compinit

    fish: incus-gateway completion fish >~/.config/fish/completions/incus-gateway.fish
    """
    # typer exports it without saying so, as the next
    script = typers.get_completion_script  # type: ignore[attr-defined]
    out.say(script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value))


def answer_shells() -> None:
    """Have what the script asks answered as it expects; `VARIABLE` is set then."""
    typers.completion_init()  # type: ignore[attr-defined]
