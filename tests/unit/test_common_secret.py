"""One secret for all gateways of a cluster, whichever of them starts first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.auth.issuing import existing_secret, load_secret
from gateway.cluster.identity import KEY, common_secret, digest
from gateway.errors import Unavailable
from tests.shared_memory import MemoryKeys

SECRET = "s" * 40


class Gateways:
    """Gateways by name, each with a state dir. Those in `serving` give their secret to the others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, MemoryKeys()
        self.serving: list[str] = []

    def state_dir(self, name: str) -> Path:
        return self.folder / name

    async def start(self, name: str, configured: str | None = None) -> str:
        async def fetch() -> str | None:
            known = [existing_secret(None, self.state_dir(other)) for other in self.serving]
            return next(filter(None, known), None)

        secret = await common_secret(self.keys, configured, self.state_dir(name), fetch)
        self.serving.append(name)
        return secret


@pytest.fixture
async def gateways(tmp_path: Path) -> Gateways:
    return Gateways(tmp_path)


async def test_the_first_gateways_secret_is_that_of_all(gateways: Gateways) -> None:
    secret = await gateways.start("m1")
    assert await gateways.start("m2") == secret
    assert await gateways.start("m3") == secret
    assert load_secret(None, gateways.state_dir("m3")) == secret
    assert (gateways.state_dir("m3") / "secret").stat().st_mode & 0o777 == 0o600
    assert gateways.keys.values == {KEY: digest(secret)}
    assert secret not in str(gateways.keys.values)
    gateways.serving.clear()
    assert await gateways.start("m2") == secret, "its own is kept"


async def test_a_server_that_founds_the_cluster_keeps_its_secret(gateways: Gateways) -> None:
    secret = load_secret(None, gateways.state_dir("m1"))
    assert await gateways.start("m1") == secret


async def test_of_gateways_that_start_at_once_one_gives_the_secret(gateways: Gateways) -> None:
    """The other one has none that is not the cluster's, also if it cannot get it yet."""
    names = ("m1", "m2", "m3")
    results = await asyncio.gather(*(gateways.start(name) for name in names), return_exceptions=True)
    secrets = {result for result in results if isinstance(result, str)}
    assert len(secrets) == 1, results
    for name in names:
        assert await gateways.start(name) in secrets


async def test_a_gateway_that_was_killed_before_it_kept_the_secret_has_it(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("gateway.cluster.identity.keep_secret", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await gateways.start("m1")
    assert KEY in gateways.keys.values
    secret = await gateways.start("m1")
    assert digest(secret) == gateways.keys.values[KEY]
    assert [path.name for path in gateways.state_dir("m1").iterdir()] == ["secret"]


async def test_another_secret_is_refused_with_what_to_do(gateways: Gateways) -> None:
    await gateways.start("m1")
    load_secret(None, gateways.state_dir("m2"))
    with pytest.raises(Unavailable, match="move `secret`") as refused:
        await gateways.start("m2")
    assert refused.value.facts["reason"] == "secret_differs"
    with pytest.raises(Unavailable, match="GATEWAY_SECRET"):
        await gateways.start("m3", SECRET)
    (gateways.state_dir("m2") / "secret").unlink()
    assert await gateways.start("m2") == await gateways.start("m1")


async def test_a_configured_secret_is_written_nowhere(gateways: Gateways) -> None:
    assert await gateways.start("m1", SECRET) == SECRET
    assert await gateways.start("m2", SECRET) == SECRET
    assert not gateways.state_dir("m2").exists()


async def test_a_secret_that_nobody_gives_is_not_made_up(gateways: Gateways) -> None:
    await gateways.start("m1")
    gateways.serving.clear()
    with pytest.raises(Unavailable) as refused:
        await gateways.start("m2")
    assert refused.value.facts["reason"] == "secret_missing"
    assert existing_secret(None, gateways.state_dir("m2")) is None


async def test_without_a_quorum_a_gateway_starts_with_the_secret_that_it_has(gateways: Gateways) -> None:
    secret = await gateways.start("m1")
    gateways.keys.quorum = False
    assert await gateways.start("m1") == secret
    with pytest.raises(Unavailable):
        await gateways.start("m2")
    assert existing_secret(None, gateways.state_dir("m2")) is None
