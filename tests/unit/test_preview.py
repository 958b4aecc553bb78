"""What of a page is changed for the editor's preview, and who gets such a page."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from gateway.api import preview
from gateway.errors import InvalidParams

SECRET = "s" * 32
ORIGIN = "https://gateway.example.com:8443"


def made(**changes: object) -> str:
    said = {"secret": SECRET, "domain": "shop.localhost", "origin": ORIGIN, "ends": int(time.time()) + 60}
    return preview.key(**{**said, **changes})  # type: ignore[arg-type]


def test_a_key_opens_the_pages_of_its_domain_for_its_editor() -> None:
    assert preview.opened(SECRET, "shop.localhost", made()) == ORIGIN


OTHERS: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "one-point": lambda: ".",
    "two-points": lambda: "..",
    "no-number": lambda: "x.y.z",
    "another-domain": lambda: made(domain="other.localhost"),
    "another-secret": lambda: made(secret="o" * 32),
    "ended": lambda: made(ends=int(time.time()) - 1),
    "a-path": lambda: made(origin="https://evil.example/"),
    "a-script": lambda: made(origin='https://a"-alert(1)-"'),
    "cut-off": lambda: made()[:-1],
    "another-mark": lambda: made().replace(".", "!", 1),
    "long": lambda: "9" * 400,
    "not-ascii": lambda: "é.é.é",
    "not-ascii-signed": lambda: made() + "é",
}


@pytest.mark.parametrize("given", OTHERS.values(), ids=OTHERS)
def test_no_other_key_opens_them(given: Callable[[], str]) -> None:
    assert preview.opened(SECRET, "shop.localhost", given()) is None


def test_only_a_page_gets_a_key() -> None:
    assert preview.origin_of("http://[::1]:8080") == "http://[::1]:8080"
    for given in (None, "", "null", "https://a.example/path", "https://a.example;x", "file://"):
        with pytest.raises(InvalidParams):
            preview.origin_of(given)


@pytest.mark.parametrize(
    ("uri", "left"),
    [
        ("/?__gateway_preview=K", "/"),
        ("/a?__gateway_preview=K&b=1", "/a?b=1"),
        ("/a?b=%20&__gateway_preview=K", "/a?b=%20"),
        ("/a?b&__gateway_preview=K&c", "/a?b&c"),
    ],
)
def test_a_site_does_not_see_the_parameter(uri: str, left: str) -> None:
    assert preview.without(uri) == (left, "K")
    assert preview.without(left) == (left, "")


@pytest.mark.parametrize(
    ("page", "before"),
    [
        ("<!doctype html><html><head><title>x</title>", "<!doctype html><html><head>"),
        (
            '<!DOCTYPE html>\n<HTML lang=en><HEAD data-a="b">',
            '<!DOCTYPE html>\n<HTML lang=en><HEAD data-a="b">',
        ),
        ("<!doctype html><header>x</header>", "<!doctype html>"),
        ("<p>words", ""),
        (f"<html><head {'x' * 1990}>", f"<html><head {'x' * 1990}>"),
        (f"<html><head {'x' * 3000}><head>", f"<html><head {'x' * 3000}><head>"),
        (f"<!doctype html><head {'x' * 3000}>", "<!doctype html>"),
        ("", ""),
    ],
)
def test_the_script_comes_before_all_that_a_page_runs(page: str, before: str) -> None:
    """And never before its doctype, without which it would be laid out as pages were in the nineties."""
    shown = preview.with_script(page.encode(), ORIGIN).decode()
    assert shown.startswith(f"{before}<script>") and shown.endswith(f"</script>{page[len(before) :]}")
    assert shown.count("</script>") == 1 + page.count("</script>") and f'"{ORIGIN}"' in shown


@pytest.mark.parametrize(
    ("location", "kept"),
    [
        ("/en/", "/en/?__gateway_preview=K"),
        ("?a=1#b", "?a=1&__gateway_preview=K#b"),
        ("http://shop.localhost:8080/x", "http://shop.localhost:8080/x?__gateway_preview=K"),
        ("https://elsewhere.example/", "https://elsewhere.example/"),
        ("//elsewhere.example/", "//elsewhere.example/"),
        ("http://[", "http://["),
    ],
)
def test_a_redirect_within_the_site_keeps_the_parameter(location: str, kept: str) -> None:
    assert preview._kept(location, "shop.localhost:8080", "/a", "K") == kept
