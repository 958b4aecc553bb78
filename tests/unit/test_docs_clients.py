"""The examples of the docs: they are whole programs, and what they name is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from gateway_client import Client, Deployment, DeploymentRecord, Exec, Tenant, anthropic, claude, errors, sync
from gateway_client.files import Files

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "clients.md").read_text()
PAGES = [
    PAGE,
    *(page.read_text() for page in (*DOCS.glob("start/*.md"), DOCS / "cookbook.md", DOCS / "tutorial.md")),
]
EXAMPLES = re.findall(r"^```python(?: title=\S+)?\n(.*?)^```$", "\n".join(PAGES), re.M | re.S)
# what the examples call these, by module of the client
KINDS: dict[str, Any] = {
    "client": Client,
    "shop": Tenant,
    "writer": Tenant,
    "shop.files": Files,
    "build": Exec,
    "deployment": Deployment,
    "record": DeploymentRecord,
    "anthropic": anthropic,
    "claude": claude,
}
BLOCKING: dict[str, Any] = {"client": sync.Client, "shop": sync.Tenant, "install": sync.Exec}


def problems(source: str) -> list[str]:
    """Return which names of ours `source` uses that are not there, or calls by parameters that are not."""
    found: list[str] = []
    kinds = BLOCKING if "gateway_client.sync" in source else KINDS
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module)):
                place = importlib.import_module(module)
                found += [f"{module}.{name.name}" for name in node.names if not hasattr(place, name.name)]
            case ast.Attribute() if (kind := kinds.get(ast.unparse(node.value))) is not None:
                # an attribute of instances alone has its own entry
                if not hasattr(kind, node.attr) and ast.unparse(node) not in kinds:
                    found.append(ast.unparse(node))
            case ast.Call():
                found += unknown_parameters(node, kinds)
    return found


def unknown_parameters(call: ast.Call, kinds: dict[str, Any]) -> list[str]:
    named = call.func
    if isinstance(named, ast.Name) and named.id == "Client":
        target = kinds["client"]
    elif isinstance(named, ast.Attribute):
        target = getattr(kinds.get(ast.unparse(named.value)), named.attr, None)
    else:
        return []
    if target is None:
        return []
    known = inspect.signature(target).parameters
    return [f"{ast.unparse(named)}({word.arg}=)" for word in call.keywords if word.arg not in known]


@pytest.mark.parametrize("source", EXAMPLES)
def test_an_example_compiles_and_what_it_names_is_there(source: str) -> None:
    compile(source, "docs/clients.md", "exec")
    assert problems(source) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "from gateway_client import Nobody",
        "shop.reed('x')",
        "client.tenant('shop', sesion='x')",
        "Client('x', tokens='y')",
        "claude.option(shop)",
        "from gateway_client.sync import Client\nshop.reed('x')",
    ],
)
def test_a_wrong_name_would_be_found(wrong: str) -> None:
    assert problems(wrong)


def test_the_tree_of_errors_is_all_of_them() -> None:
    tree = PAGE.partition("## Errors")[2].partition("```\n")[2].partition("```")[0]
    told = set(re.findall(r"\b[A-Z][A-Za-z]+\b", tree))
    assert told == {name for name in errors.__all__ if not name.startswith("from_")}


def test_every_adapter_has_its_example() -> None:
    assert len(EXAMPLES) == sum(page.count("```python") for page in PAGES) >= 7 + 8
