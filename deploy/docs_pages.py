"""Adds to the docs' site what is made of the code, and the pages that lie outside docs/. A hook of mkdocs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from gateway.api import openapi, reference
from gateway.api.routes import ROUTES
from gateway.cli.main import app

ROOT = Path(__file__).parents[1]
# the pages outside docs/, with their places on the site
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    made = {"http.md": http(), "cli.md": cli()}
    for path, place in OUTSIDE.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / path).read_text())
        made[place] = text.replace("](deploy/quickstart)", "](index.md)")
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links out of docs/ to where those pages are here."""
    for path, place in OUTSIDE.items():
        markdown = markdown.replace(f"](../{path}", f"]({place}").replace(f"]({path}", f"]({place}")
    return markdown


def http() -> str:
    """Return the page of the HTTP API."""
    body = reference.body(openapi.document(ROUTES))
    return f"# HTTP API\n\n[The protocol](protocol.md) says what it means. Made from the code.\n\n{body}"


def cli() -> str:
    """Return the page of the command line."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="incus-gateway")
    told = "[Operations](operations.md#the-command-line) says what it is for. Made from the code."
    return "\n".join(("# Command line\n", f"{told}\n", *_commands(command, context, "")))


def _commands(group: Any, context: Any, before: str) -> Iterator[str]:
    for name in group.list_commands(context):
        entry = group.get_command(context, name)
        if hasattr(entry, "list_commands"):
            yield from _commands(entry, context, f"{before}{name} ")
            continue
        command = entry.loaded()
        inner = type(context)(command, info_name=name, parent=context)
        words = " ".join(command.collect_usage_pieces(inner))
        yield f"## {before}{name}\n\n```\nincus-gateway {before}{name} {words}\n```\n\n{command.help or ''}\n"
        for param in command.get_params(inner):
            if (record := param.get_help_record(inner)) is not None and param.name != "help":
                yield f"- `{record[0]}`: {record[1]}" if record[1] else f"- `{record[0]}`"
        yield ""
