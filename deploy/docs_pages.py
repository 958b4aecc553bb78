"""Adds to the docs' site what is made of the code, and the pages that lie outside docs/. A hook of mkdocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from gateway.api import openapi
from gateway.api.routes import ROUTES
from gateway.cli.main import CommandHelp, app, command_helps

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
    """Point links out of docs/ to where those pages are here. Source files are not: their links go."""
    markdown = re.sub(r"\[([^]]+)\]\(\.\./gateway/[^)]+\)", r"\1", markdown)
    for path, place in OUTSIDE.items():
        markdown = markdown.replace(f"](../{path}", f"]({place}").replace(f"]({path}", f"]({place}")
    return markdown


def http() -> str:
    """Return the page of the HTTP API."""
    body = openapi.body(openapi.document(ROUTES))
    return f"# HTTP API\n\n[The protocol](protocol.md) says what it means. Made from the code.\n\n{body}"


def cli() -> str:
    """Return the page of the command line."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="incus-gateway")
    told = "[Operations](operations.md#the-command-line) says what it is for. Made from the code."
    return "\n".join(("# Command line\n", f"{told}\n", *map(_entry, command_helps(command, context))))


def _entry(entry: CommandHelp) -> str:
    options = "".join(f"- `{words}`: {what}\n" if what else f"- `{words}`\n" for words, what in entry.options)
    usage = f"```\nincus-gateway {entry.name} {entry.usage}\n```"
    return f"## {entry.name}\n\n{usage}\n\n{entry.help}\n\n{options}"
