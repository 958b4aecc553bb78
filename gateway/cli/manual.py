"""The manual page, generated from the texts of `--help`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from gateway.terminal import out


def man(context: typer.Context) -> None:
    """Print the manual page: incus-gateway man | man -l -

    incus-gateway man >/usr/local/share/man/man1/incus-gateway.1 installs it.
    """
    root = context.find_root()
    out.say("\n".join(_page(root.command, root)))


def _page(group: Any, context: Any) -> Iterator[str]:
    from gateway import __version__

    yield f'.TH INCUS\\-GATEWAY 1 "" "incus-gateway {_text(__version__)}"'
    yield from (".SH NAME", f"incus\\-gateway \\- {_text(group.help)}")
    yield from (".SH SYNOPSIS", ".B incus\\-gateway", "COMMAND [OPTION]... [ARGUMENT]...")
    yield ".SH COMMANDS"
    yield from _commands(group, context, "")
    yield ".SH EXIT STATUS"
    yield "0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 nobody read the output;"
    yield ".B exec\nends with the exit code of its command."
    yield ".SH ENVIRONMENT"
    for name, what in (
        ("GATEWAY_URL", "the gateway to ask, as --url"),
        ("GATEWAY_TOKEN", "the token, as --token"),
        ("GATEWAY_CONFIG", "the file of settings; default: /etc/incus-gateway/gateway.toml"),
    ):
        yield from (".TP", f".B {_text(name)}", _text(what))
    yield f"All settings of the gateway are listed by\n.B incus\\-gateway serve \\-\\-help{chr(10)}."


def _commands(group: Any, context: Any, before: str) -> Iterator[str]:
    for name in group.list_commands(context):
        entry = group.get_command(context, name)
        if hasattr(entry, "list_commands"):
            yield from _commands(entry, context, f"{before}{name} ")
            continue
        command = entry.loaded()
        inner = type(context)(command, info_name=name, parent=context)
        words = " ".join(command.collect_usage_pieces(inner))
        yield from (f".SS {_text(before + name)} {_text(words)}", *_paragraphs(command.help or ""))
        for param in command.get_params(inner):
            if (record := param.get_help_record(inner)) is not None and param.name != "help":
                yield from (".TP", f".B {_text(record[0])}", _text(record[1]) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    for number, part in enumerate(text.split("\n\n")):
        if number:
            yield ".PP"
        yield _text(" ".join(part.split()))


def _text(text: str) -> str:
    """Escape text for roff; see groff_char(7) and roff(7)."""
    safe = text.replace("\\", "\\e").replace("-", "\\-").replace("\n", " ")
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe
