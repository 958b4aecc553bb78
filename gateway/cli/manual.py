"""The manual page, generated from the texts of `--help`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    yield from _commands(group, context)
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


@dataclass(frozen=True, slots=True)
class Entry:
    """What `--help` says of one command: its name with that of its group, its arguments, its options."""

    name: str
    usage: str
    help: str
    options: list[tuple[str, str]]


def entries(group: Any, context: Any, before: str = "") -> Iterator[Entry]:
    """Yield every command, those of groups too."""
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if hasattr(found, "list_commands"):
            yield from entries(found, context, f"{before}{name} ")
            continue
        command = found.loaded()
        inner = type(context)(command, info_name=name, parent=context)
        records = [
            param.get_help_record(inner) for param in command.get_params(inner) if param.name != "help"
        ]
        usage = " ".join(command.collect_usage_pieces(inner))
        yield Entry(before + name, usage, command.help or "", [record for record in records if record])


def _commands(group: Any, context: Any) -> Iterator[str]:
    for entry in entries(group, context):
        yield from (f".SS {_text(entry.name)} {_text(entry.usage)}", *_paragraphs(entry.help))
        for words, what in entry.options:
            yield from (".TP", f".B {_text(words)}", _text(what) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    for number, part in enumerate(text.split("\n\n")):
        if number:
            yield ".PP"
        yield _text(" ".join(part.split()))


def _text(text: str) -> str:
    """Escape text for roff; see groff_char(7) and roff(7)."""
    safe = text.replace("\\", "\\e").replace("-", "\\-").replace("\n", " ")
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe
