"""The routes that Caddy looks up, while two set them right."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from gateway.caddy import Caddy
from gateway.caddy.caddy import Admin
from gateway.caddy.routes import CaddyFailed
from gateway.errors import InvalidParams
from gateway.hostnames import PROBE, DomainReserved
from gateway.settings import Settings


async def test_a_route_that_is_set_while_others_are_put_right_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever puts routes right removes targets that no route has, and may not take a new one's for such."""
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        setting = threading.Thread(target=caddy.set, args=("a.test", "127.0.0.1:9"))
        listed = caddy.listed

        def looked() -> dict[str, str]:
            found = listed()
            setting.start()
            setting.join(0.2)  # it has to wait
            return found

        monkeypatch.setattr(caddy, "listed", looked)
        await asyncio.to_thread(caddy.reconcile, {}, {"a.test"})
        setting.join()
        assert (caddy.routes / "a.test" / "127.0.0.1:9").exists()


async def test_routes_are_put_right_and_what_none_has_is_removed(tmp_path: Path) -> None:
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        targets = caddy.folder / "targets"
        for domain, target in (
            ("a.test", "10.0.0.1:80"),
            ("b.test", "10.0.0.2:80"),
            ("c.test", "10.0.0.3:80"),
        ):
            caddy.set(domain, target)
        (caddy.routes / PROBE).symlink_to("../targets/127.0.0.1:9")
        caddy._route("d.test", "127.0.0.1:9")
        caddy.unset("d.test")
        (targets / "10.0.0.2:80" / "10.0.0.2:80").unlink()
        (targets / ".new-0").symlink_to("../targets/10.0.0.1:80")  # of a gateway that was killed
        wanted = {"a.test": "10.0.0.1:80", "b.test": "10.0.0.2:80"}
        assert caddy.reconcile(wanted, ()) == ["b.test", "c.test"]
        assert caddy.reconcile(wanted, ()) == []
        assert caddy.listed() == wanted  # without the probe's
        assert (caddy.routes / "b.test" / "10.0.0.2:80").exists()
        assert {path.name for path in targets.iterdir()} == {*wanted.values(), "127.0.0.1:9"}


async def test_the_page_of_a_site_that_hangs_stays_whoever_else_speaks_to_caddy(tmp_path: Path) -> None:
    """As the command line does beside a gateway; only the next gateway begins without any."""
    settings = Settings(state_dir=tmp_path)
    async with Caddy(settings) as caddy:
        caddy.show_error_page("shop.example.com", True)
        caddy.show_error_page("../out", True)
        async with Caddy(settings):
            pass
        away = caddy.folder / "away"
        assert [path.name for path in away.iterdir()] == ["shop.example.com"]
        caddy.show_error_page("other.example.com", False)  # there was none
        caddy.show_error_page("shop.example.com", False)
        assert list(away.iterdir()) == []
        caddy.show_error_page("shop.example.com", True)
        caddy.clear_error_pages()
        assert list(away.iterdir()) == []


async def test_no_tenant_is_led_to_by_the_gateways_own_names(tmp_path: Path) -> None:
    """Not when asked for it, nor when Incus says so; and what an earlier version let through goes."""
    settings = Settings(state_dir=tmp_path, domain="GW.example.com", origins=("https://edit.example.com",))
    async with Caddy(settings) as caddy:
        caddy.route_own_domain()
        for name in ("gw.example.com", "Gw.Example.com.", "edit.example.com", "probe.invalid", "localhost"):
            with pytest.raises(DomainReserved):
                caddy.set(name, "10.0.0.9:3000")
        caddy._route("edit.example.com", "10.0.0.9:3000")
        wanted = dict.fromkeys(("gw.example.com", "edit.example.com", "shop.example.com"), "10.0.0.9:3000")
        assert sorted(caddy.reconcile(wanted, ())) == ["edit.example.com", "shop.example.com"]
        assert caddy.listed() == {"gw.example.com": "127.0.0.1:8080", "shop.example.com": "10.0.0.9:3000"}


@pytest.mark.parametrize("name", ["../out", "a/b.example.com", "Shop.example.com", "shop.example.com.", "x"])
async def test_what_is_no_name_as_caddy_looks_it_up_makes_no_link(tmp_path: Path, name: str) -> None:
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        with pytest.raises((InvalidParams, ValueError)):
            caddy.set(name, "10.0.0.9:3000")
        assert caddy.reconcile({name: "10.0.0.9:3000"}, ()) == []
        assert [*caddy.routes.iterdir()] == []


@pytest.mark.parametrize("cut", [1, 2, 3])
async def test_an_api_that_is_just_being_replaced_is_asked_again(tmp_path: Path, cut: int) -> None:
    """Another configuration, by whomever, cuts off what is asked then; one that stays away is told."""
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        if asked > cut:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    place = str(tmp_path / "admin.sock")
    async with await asyncio.start_unix_server(serve, place):
        admin = Admin(place)
        admin.open()
        try:
            if cut == 3:
                with pytest.raises(CaddyFailed, match="does not answer"):
                    await admin.ask("POST", "/load", {})
            else:
                assert await admin.ask("POST", "/load", {}) == {}
        finally:
            await admin.close()
    assert asked == min(cut + 1, 3)
