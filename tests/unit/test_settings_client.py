"""What a client reads of the settings by itself is what all settings say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway.settings import ClientSettings, load, load_client

SECRET = "a secret of the tests, long enough to sign with"


@pytest.mark.parametrize(
    ("environment", "file"),
    [
        ({}, None),
        ({}, ""),
        ({"GATEWAY_LISTEN": "/run/gateway.sock", "GATEWAY_SECRET": SECRET}, None),
        ({"gateway_listen": "127.0.0.1:1", "LISTEN": "127.0.0.1:2"}, None),
        ({"GATEWAY_LISTEN": "", "GATEWAY_STATE_DIR": "state"}, None),
        ({}, f'listen = "127.0.0.1:9000"\nstate_dir = "/srv/gw"\nsecret = "{SECRET}"\nmax_tenants = 70'),
        ({"GATEWAY_LISTEN": "127.0.0.1:1"}, 'listen = "127.0.0.1:9000"\nstate_dir = "/srv/gw"'),
        ({}, 'LISTEN = "127.0.0.1:9000"'),
    ],
)
def test_it_is_what_all_settings_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], file: str | None
) -> None:
    config = tmp_path / "gateway.toml"
    if file is not None:
        config.write_text(file)
    for name in ("GATEWAY_LISTEN", "GATEWAY_STATE_DIR", "GATEWAY_SECRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "GATEWAY_CONFIG": str(config)}.items():
        monkeypatch.setenv(name, value)
    found, settings = ClientSettings.read(), load()
    secret = None if settings.secret is None else settings.secret.get_secret_value()
    assert found == ClientSettings(settings.listen, settings.state_dir, secret) == load_client()
    assert SECRET not in repr(found)


@pytest.mark.parametrize("file", ["listen = 8080", "listen = ", 'secret = ["a"]'])
def test_what_is_wrong_is_left_to_all_settings_to_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(file)
    monkeypatch.setenv("GATEWAY_CONFIG", str(config))
    assert ClientSettings.read() is None
    with pytest.raises((ValidationError, ValueError)):
        load_client()


def test_what_is_wrong_with_another_setting_is_no_matter_to_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MAX_TENANTS", "many")
    assert load_client().listen
