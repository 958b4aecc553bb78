"""A folder as `incus-gateway deploy` takes it: what is sent, and what is said of one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli.sites import read_site, write_manifest
from gateway.deployments.template import Overrides
from gateway.errors import GatewayError
from gateway.settings import Settings

NOTHING = Overrides()


def laid(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(GatewayError) as error:
        read_site(folder, Settings(), NOTHING)
    return error.value.message


def test_a_folder_of_three_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """It says how large it is, and of what."""
    laid(tmp_path, "index.html", "videos/a.mp4", "videos/b.mp4", "data.bin", "node_modules/x")
    for name, size in (("videos/a.mp4", 2 << 30), ("videos/b.mp4", 1 << 30), ("data.bin", 100 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert refused(tmp_path) == (
        f"{tmp_path} has 3.1 GiB in 5 files, and a site may have at most 64.0 MiB "
        "in "
        "10000 files. The largest are videos/ (3.0 GiB), data.bin (100.0 MiB), index.html "
        "(1 bytes): list what the site does not need in .gitignore, and keep large files elsewhere"
    )
    (tmp_path / ".gitignore").write_text("videos\n*.bin\n")
    template, left = read_site(tmp_path, Settings(), NOTHING)
    assert set(template.entries) == {"index.html", ".gitignore"}
    assert set(left) == {"data.bin", "videos/"}


def test_what_ignore_files_name_is_not_sent_and_is_told(tmp_path: Path) -> None:
    """By git's rules: the innermost file decides, and a rule may take another back."""
    laid(tmp_path, "index.html", ".env", ".env.example", "dist/a", "sub/keep.log", "sub/other.log", "a.log")
    laid(tmp_path, ".venv/bin/python", "lib/__pycache__/x.pyc")
    (tmp_path / ".gitignore").write_text(".env\n/dist/\n*.log\n")
    (tmp_path / "sub/.gitignore").write_text("!keep.log\n")
    template, left = read_site(tmp_path, Settings(), NOTHING)
    sent = {path for path, entry in template.entries.items() if entry.content is not None}
    assert sent == {"index.html", ".env.example", ".gitignore", "sub/.gitignore", "sub/keep.log"}
    assert set(left) == {".env", "dist/", "a.log", "sub/other.log"}


def test_a_link_out_of_the_folder_is_named(tmp_path: Path) -> None:
    laid(tmp_path, "index.html")
    (tmp_path / "secrets").symlink_to("/etc")
    assert refused(tmp_path) == "this template is refused: the link secrets points outside the template"


def test_of_a_folder_of_apps_the_command_is_named(tmp_path: Path) -> None:
    laid(tmp_path, "apps/web/package.json", "apps/docs/package.json", "package.json")
    (tmp_path / "package.json").write_text('{"workspaces": ["apps/*"]}')
    for app, name in (("web", "next"), ("docs", "astro")):
        (tmp_path / f"apps/{app}/package.json").write_text(f'{{"dependencies": {{"{name}": "1"}}}}')
    said = refused(tmp_path)
    assert "this folder holds 2 apps: apps/docs (Astro), apps/web (Next.js); deploy one" in said
    assert f"`incus-gateway deploy DOMAIN {tmp_path}/apps/docs`" in said


def test_an_empty_folder_one_without_what_is_served_and_none(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        "there are no files in this folder: name another one, or deploy a template "
        "(`incus-gateway templates` lists them)"
    )
    assert refused(tmp_path / "no") == f"{tmp_path}/no is not a folder"
    (tmp_path / "site.toml").write_text('static = "dist"')
    assert refused(tmp_path) == (
        "site.toml: static: there is no folder dist with files, and no `install` that makes it"
    )


def test_what_was_found_is_kept_once(tmp_path: Path) -> None:
    laid(tmp_path, "index.html")
    template, _ = read_site(tmp_path, Settings(), NOTHING)
    assert write_manifest(tmp_path, template).read_text() == (
        "# static files: there is index.html\n# install nothing: files need none\n"
        '# serve the files of the folder: the gateway\'s own file server\nstatic = "."\nport = 3000\n'
    )
    with pytest.raises(GatewayError, match="exists already"):
        write_manifest(tmp_path, template)
