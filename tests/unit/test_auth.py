"""Tokens, the secret and origins: who gets in and who does not."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import pwd
import stat
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from gateway.auth import issuing, tokens
from gateway.errors import Forbidden, InvalidParams, Unauthorized, Unavailable
from gateway.protocol.maxima import TOKEN_MAX
from gateway.settings import Settings

SECRET = "s" * 32
OTHER = "o" * 32


def claims(**changes: Any) -> dict[str, Any]:
    good = {
        "sub": "ann",
        "tenants": ["shop"],
        "scope": "exec files:read",
        "exp": int(time.time()) + 86_400,
        "jti": "j1",
    }
    good.update(changes)
    return {key: value for key, value in good.items() if value is not None}


def signed(**changes: Any) -> str:
    return jwt.encode(claims(**changes), SECRET, algorithm="HS256")


def test_a_token_says_what_was_issued() -> None:
    before = int(time.time())
    token = tokens.verify(SECRET, tokens.issue(SECRET, "ann", ["shop", "blog"], ["exec", "events"], 60))
    assert (token.subject, token.tenants, token.scopes) == (
        "ann",
        frozenset({"shop", "blog"}),
        frozenset({"exec", "events"}),
    )
    assert before + 60 <= token.expires <= time.time() + 60
    assert len(token.id) == 32


def test_deploying_includes_managing_only_in_tokens_from_before_that_scope() -> None:
    issued = tokens.verify(SECRET, tokens.issue(SECRET, "ann", ["shop"], ["deploy"], 60))
    assert not issued.allows("manage")
    assert tokens.verify(SECRET, signed(scope="deploy")).scopes == {"deploy", "manage"}
    for scope, ver in (("deploy", 2), ("deploy", 3), ("exec files:read", None), ("exec files:read", 1)):
        assert not tokens.verify(SECRET, signed(scope=scope, ver=ver)).allows("manage")
    assert tokens.verify(SECRET, signed(scope="manage", ver=2)).scopes == {"manage"}


def test_two_tokens_have_two_ids() -> None:
    raws = [tokens.issue(SECRET, "ann", ["*"], ["exec"], 60) for _ in range(2)]
    first, second = (tokens.verify(SECRET, raw) for raw in raws)
    assert first.id != second.id


@pytest.mark.parametrize(
    ("tenants", "scopes", "ttl", "subject"),
    [
        ([], ["exec"], 60, "ann"),
        (["Shop"], ["exec"], 60, "ann"),
        (["shop/../x"], ["exec"], 60, "ann"),
        (["-shop"], ["exec"], 60, "ann"),
        (["shop\n"], ["exec"], 60, "ann"),
        (["shop"], [], 60, "ann"),
        (["shop"], ["root"], 60, "ann"),
        (["shop"], ["exec events"], 60, "ann"),
        (["shop"], ["exec"], 0, "ann"),
        (["shop"], ["exec"], 10**12, "ann"),
        (["shop"], ["exec"], 60, ""),
    ],
)
def test_nonsense_is_not_issued(tenants: list[str], scopes: list[str], ttl: int, subject: str) -> None:
    with pytest.raises(InvalidParams):
        tokens.issue(SECRET, subject, tenants, scopes, ttl)


def test_a_token_says_which_domains_it_may_give() -> None:
    given = ["*.Sites.example.com", "shop.example.com."]
    token = tokens.verify(SECRET, tokens.issue(SECRET, "ann", ["shop"], ["deploy"], 60, given))
    assert token.domains == frozenset({"*.sites.example.com", "shop.example.com"})
    assert tokens.verify(SECRET, tokens.issue(SECRET, "ann", ["shop"], ["deploy"], 60)).domains is None
    for wrong in ("*", "shop", "https://shop.example.com", "*.*.com"):
        with pytest.raises(InvalidParams):
            tokens.issue(SECRET, "ann", ["shop"], ["deploy"], 60, [wrong])
    for claim in ("shop.example.com", [1], {"a": 1}):
        with pytest.raises(Unauthorized):
            tokens.verify(SECRET, signed(domains=claim))


def test_a_short_secret_signs_nothing() -> None:
    with pytest.raises(InvalidParams):
        tokens.issue("short", "ann", ["shop"], ["exec"], 60)


def _unsigned() -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims())}."


def _tampered() -> str:
    head, _, signature = signed().split(".")
    body = base64.urlsafe_b64encode(json.dumps(claims(tenants=["*"])).encode()).rstrip(b"=").decode()
    return f"{head}.{body}.{signature}"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(_unsigned(), id="alg none"),
        pytest.param(_tampered(), id="tampered"),
        pytest.param(jwt.encode(claims(), SECRET * 2, algorithm="HS512"), id="wrong algorithm"),
        pytest.param(jwt.encode(claims(), OTHER, algorithm="HS256"), id="wrong key"),
        *(
            pytest.param(signed(**{name: None}), id=f"no {name}")
            for name in ("sub", "tenants", "scope", "exp", "jti")
        ),
        pytest.param(signed(tenants="*"), id="tenants is a string"),
        pytest.param(signed(tenants=[1]), id="tenants of numbers"),
        pytest.param(signed(scope=["exec"]), id="scope is a list"),
        pytest.param(signed(jti=""), id="empty jti"),
        pytest.param(signed(nbf=int(time.time()) + 86_400), id="not yet"),
        pytest.param(signed(sub="x" * TOKEN_MAX), id="huge"),
        pytest.param("a.b.c", id="no jwt"),
        pytest.param("ü.ü.ü", id="not ascii"),
        pytest.param("\udc80", id="lone surrogate"),
    ],
)
def test_a_bad_token_is_invalid_and_no_more_is_said(raw: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        tokens.verify(SECRET, raw)
    assert caught.value.message == "this token is not valid"
    assert caught.value.facts == {}


def test_the_base_of_the_bad_ones_is_good() -> None:
    assert tokens.verify(SECRET, signed()).subject == "ann"


def test_a_signature_is_computed_once_and_all_else_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was verified still expires, can be revoked, and counts for its own secret alone."""
    raw = signed(jti="remembered")
    token = tokens.verify(SECRET, raw)
    computed: list[Any] = []
    decode = jwt.decode

    def counted(*given: Any, **more: Any) -> Any:
        computed.append(given)
        return decode(*given, **more)

    monkeypatch.setattr(jwt, "decode", counted)
    assert tokens.verify(SECRET, raw) == token
    assert not computed
    with pytest.raises(Unauthorized, match="not valid"):
        tokens.verify(SECRET, raw, {"remembered"}.__contains__)
    with pytest.raises(Unauthorized, match="not valid"):
        tokens.verify(OTHER, raw)
    monkeypatch.setattr(time, "time", lambda: float(token.expires))
    with pytest.raises(Unauthorized, match="expired"):
        tokens.verify(SECRET, raw)


@pytest.mark.parametrize("raw", [None, ""])
def test_no_token_says_how_to_send_one(raw: str | None) -> None:
    with pytest.raises(Unauthorized, match="Bearer"):
        tokens.verify(SECRET, raw)


def test_expired_says_so_but_only_to_who_has_a_real_token() -> None:
    with pytest.raises(Unauthorized, match="expired"):
        tokens.verify(SECRET, signed(exp=int(time.time()) - 1))
    forged = jwt.encode(claims(exp=1), OTHER, algorithm="HS256")
    with pytest.raises(Unauthorized, match="not valid"):
        tokens.verify(SECRET, forged)


def test_a_revoked_id_is_refused() -> None:
    assert tokens.verify(SECRET, signed(jti="j2"), {"j1"}.__contains__).id == "j2"
    with pytest.raises(Unauthorized):
        tokens.verify(SECRET, signed(jti="j1"), {"j1"}.__contains__)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"USER": "ann"}, "ann"),
        ({"USER": "root", "LOGNAME": "root", "SUDO_USER": "ann"}, "ann"),
        ({"LOGNAME": "ann"}, "ann"),
        ({"USER": ""}, pwd.getpwuid(os.getuid()).pw_name),
    ],
)
def test_a_token_is_for_whoever_asks_for_it(
    environment: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SUDO_USER", "USER", "LOGNAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert issuing.caller() == name


# --- a token for an agent --------------------------------------------------------------------------------


def test_an_agents_token_opens_one_tenant_with_an_agents_scopes_and_its_own_name() -> None:
    person = tokens.verify(SECRET, tokens.issue(SECRET, "ann", ["*"], ["admin"], 7200))
    raw, granted = tokens.for_agent(SECRET, person, "shop", 600.0)
    assert tokens.verify(SECRET, raw) == granted
    assert granted.subject == "ann (agent)"
    assert granted.tenants == {"shop"}
    assert granted.scopes == {"files:read", "files:write", "exec", "events"}
    assert granted.domains is None and not granted.operates
    assert 590 < granted.expires - time.time() <= 600


def test_an_agents_token_ends_with_that_of_the_person() -> None:
    person = tokens.verify(SECRET, tokens.issue(SECRET, "ann", ["shop"], ["files:read"], 60))
    raw, granted = tokens.for_agent(SECRET, person, "shop", 3600.0)
    assert granted.expires <= person.expires and granted.scopes == {"files:read"}
    with pytest.raises(Unauthorized):
        tokens.verify(SECRET, raw, {person.id}.__contains__)
    again, last = tokens.for_agent(SECRET, granted, "shop", 3600.0)
    assert last.expires <= person.expires, "one that is made by an agent's token is no way to live longer"
    with pytest.raises(Unauthorized):
        tokens.verify(SECRET, again, {person.id}.__contains__)


def test_who_may_only_deploy_has_nothing_for_an_agent() -> None:
    person = tokens.verify(SECRET, tokens.issue(SECRET, "a" * 200, ["shop"], ["deploy"], 60))
    with pytest.raises(Forbidden):
        tokens.for_agent(SECRET, person, "shop", 60.0)
    person = tokens.verify(SECRET, tokens.issue(SECRET, "a" * 200, ["shop"], ["exec"], 60))
    _, granted = tokens.for_agent(SECRET, person, "shop", 60.0)
    assert len(granted.subject) == 200 and granted.subject.endswith(" (agent)")


def test_covers_compares_whole_names() -> None:
    token = tokens.verify(SECRET, signed(tenants=["shop"]))
    assert token.covers("shop")
    for twin in ("shop-2", "sho", "shop.", "SHOP", "", "*"):
        assert not token.covers(twin)
    assert token.coverage == frozenset({"shop"})


def test_the_star_covers_every_tenant_and_no_pattern_does() -> None:
    everyone = tokens.verify(SECRET, signed(tenants=["*"]))
    assert everyone.covers("any")
    assert everyone.coverage is None
    assert not tokens.verify(SECRET, signed(tenants=["sh*"])).covers("shop")


def test_require_wants_the_very_scope_and_admin_implies_all() -> None:
    token = tokens.verify(SECRET, signed(scope="files:read later:thing"))
    token.require("files:read")
    assert token.scopes == {"files:read"}
    for scope in ("files:write", "exec", "admin"):
        with pytest.raises(Forbidden):
            token.require(scope)
    admin = tokens.verify(SECRET, signed(scope="admin"))
    for scope in tokens.SCOPES:
        admin.require(scope)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30d", 2592000),
        ("12h", 43200),
        ("15m", 900),
        ("3600", 3600),
        ("5s", 5),
        ("2w", 1209600),
        (" 1h ", 3600),
    ],
)
def test_ttl(text: str, seconds: int) -> None:
    assert tokens.parse_ttl(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0d", "-1", "1y", "1.5h", "h", "1h30m", "٣", "99999d", "9" * 5000])
def test_ttl_refused(text: str) -> None:
    with pytest.raises(InvalidParams):
        tokens.parse_ttl(text)


def settings(folder: Path, **values: Any) -> Settings:
    return Settings(state_dir=folder, **values)


def test_a_configured_secret_is_used_and_nothing_written(tmp_path: Path) -> None:
    assert tokens.load_secret(settings(tmp_path / "s", secret=SECRET)) == SECRET
    assert not (tmp_path / "s").exists()


def test_a_short_configured_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="at least 32"):
        tokens.load_secret(settings(tmp_path, secret="x" * 31))


def test_the_made_secret_is_private_and_stays(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    made = tokens.load_secret(settings(state))
    assert len(made) == 64
    assert tokens.load_secret(settings(state)) == made
    assert stat.S_IMODE((state / "secret").stat().st_mode) == 0o600
    assert [entry.name for entry in state.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    ("content", "mode"), [("x" * 40, 0o644), ("x" * 40, 0o640), ("short", 0o600), ("", 0o600)]
)
def test_a_kept_secret_that_is_readable_or_short_is_refused(tmp_path: Path, content: str, mode: int) -> None:
    (tmp_path / "secret").write_text(content)
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(InvalidParams):
        tokens.load_secret(settings(tmp_path))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x" * 40)
    (tmp_path / "elsewhere").chmod(0o600)
    (tmp_path / "secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable):
        tokens.load_secret(settings(tmp_path))


def _load(folder: str, barrier: Any, answers: Any) -> None:
    barrier.wait(30)
    answers.put(tokens.load_secret(settings(Path(folder))))


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_load, args=(str(tmp_path), barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)
    assert len(found) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    ("authorization", "cookie", "raw"),
    [
        ("Bearer abc", None, "abc"),
        ("bearer  abc ", None, "abc"),
        ("Bearer abc", "gateway_session=def", "abc"),
        ("Basic abc", "gateway_session=def", "def"),
        ("Bearer ", None, None),
        ("Bearerabc", None, None),
        (None, "a=b; gateway_session=def; c=d", "def"),
        (None, 'gateway_session="def"', "def"),
        (None, "xgateway_session=def", None),
        (None, "gateway_session=", None),
        (None, None, None),
    ],
)
def test_where_a_token_is_found(authorization: str | None, cookie: str | None, raw: str | None) -> None:
    assert tokens.raw_token(authorization, cookie) == raw


@pytest.mark.parametrize(
    ("cookie", "slot", "secure", "raw"),
    [
        ("gateway_session=a; gateway_session_x=b", None, False, "a"),
        ("gateway_session=a; gateway_session_x=b", "x", False, "b"),
        ("gateway_session=a", "x", False, None),
        ("gateway_session_x=b", None, False, None),
        ("gateway_session_x=b", "X", False, None),
        ("gateway_session=a; __Host-gateway_session=h", None, False, "h"),
        ("gateway_session=a; gateway_session=a; __Host-gateway_session=h", None, True, "h"),
        ("gateway_session=a", None, True, None),
        ("__Host-gateway_session_x=h", "x", True, "h"),
        ("__Host-gateway_session=h", "x", True, None),
        ("__host-gateway_session=h", None, True, None),
        ("__Host-gateway_session=", None, False, None),
    ],
)
def test_which_cookie_is_taken(cookie: str, slot: str | None, secure: bool, raw: str | None) -> None:
    assert tokens.cookie_token(cookie, slot, secure=secure) == raw


def test_two_cookies_of_one_name_are_refused() -> None:
    twice = "gateway_session=first; gateway_session=second"
    with pytest.raises(Unauthorized, match="delete this site's cookies"):
        tokens.raw_token(None, twice)
    assert tokens.raw_token("Bearer abc", twice) == "abc"
    assert tokens.raw_token(None, f"{twice}; gateway_session_x=b", "x") == "b"


@pytest.mark.parametrize(
    ("origin", "host", "scheme", "proto", "allowed"),
    [
        (None, "gw", "http", None, True),
        ("http://gw:8080", "gw:8080", "http", None, True),
        ("http://gw", "gw:80", "ws", None, True),
        ("https://GW", "gw", "wss", None, True),
        ("https://gw", "gw", "http", "https", True),
        ("https://gw", "gw", "http", "https, http", True),
        ("http://[::1]:8080", "[::1]:8080", "http", None, True),
        ("https://listed.example", "gw", "http", None, True),
        ("https://listed.example:443", "gw", "http", None, True),
        ("http://gw", "gw", "https", None, False),
        ("https://gw", "gw", "http", None, False),
        ("http://gw:8081", "gw:8080", "http", None, False),
        ("http://gw.evil.example", "gw", "http", None, False),
        ("https://listed.example.evil.example", "gw", "http", None, False),
        ("http://listed.example", "gw", "http", None, False),
        ("http://user@gw", "gw", "http", None, False),
        ("http://gw/", "gw", "http", None, False),
        ("http://gw:99999", "gw", "http", None, False),
        ("http://gw", None, "http", None, False),
        ("null", "gw", "http", None, False),
        ("null", "null", "http", None, False),
        ("", "gw", "http", None, False),
        ("*", "gw", "http", None, False),
        ("file://", "gw", "http", None, False),
        ("http://[", "gw", "http", None, False),
    ],
)
def test_origins(origin: str | None, host: str | None, scheme: str, proto: str | None, allowed: bool) -> None:
    listed = ("https://listed.example", "*", "null")
    assert tokens.origin_allowed(origin, host, scheme, listed, proto) is allowed
