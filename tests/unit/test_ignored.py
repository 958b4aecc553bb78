"""What of a folder is sent to be deployed, by each way to pack one; TypeScript has the same table."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.sites import packed_site, read_site
from gateway.deployments.template import Overrides
from gateway.settings import Settings
from gateway_client.deployments import template_body

FOLDERS = json.loads((Path(__file__).parents[1] / "wire" / "ignored.json").read_text())["folders"]


def files_of(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return sorted(member.name for member in tar if not member.isdir())


@pytest.fixture(params=FOLDERS, ids=lambda one: one["why"])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    said: dict[str, Any] = request.param
    for name, text in said["files"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, newline="")
    return tmp_path, sorted(said["sent"])


def test_the_client_sends_what_no_ignore_file_names(one: tuple[Path, list[str]]) -> None:
    folder, sent = one
    body = template_body(folder)
    assert isinstance(body, dict)
    assert files_of(base64.b64decode(body["archive"])) == sent


def test_the_command_line_sends_the_same(one: tuple[Path, list[str]]) -> None:
    folder, sent = one
    template, _ = read_site(folder, Settings(), Overrides(start=("true",), install=()))
    assert files_of(packed_site(template)) == sent


def test_git_would_commit_the_same(
    one: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """But for what is left out of every folder."""
    folder, sent = one
    apart = tmp_path_factory.mktemp("git")
    git = ("git", "--git-dir", str(apart), "--work-tree", str(folder))
    subprocess.run(("git", "init", "--quiet", "--bare", str(apart)), check=True)
    words = (*git, "ls-files", "-z", "--others", "--exclude-per-directory=.gitignore")
    listed = subprocess.run(words, cwd=folder, capture_output=True, check=True).stdout.decode()
    names = [name for name in listed.split("\0") if name]
    left_out = {"node_modules", ".venv", "__pycache__", ".git", ".DS_Store"}
    assert sorted(name for name in names if left_out.isdisjoint(name.split("/"))) == sent
