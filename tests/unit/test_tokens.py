"""Bearer tokens: who may ask, and everything that is not a token of ours."""

from __future__ import annotations

import time
from typing import Any

import jwt
import pytest

from streams.tokens import AUDIENCE, ISSUER, LEEWAY_SECONDS, MAX_HEADER_CHARACTERS, Caller, UnauthorizedError, issue, verify

KEY = b"k" * 32


def claims(**changes: object) -> dict[str, object]:
    now = int(time.time())
    given = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 60, "sub": "user-1"} | changes
    return {name: value for name, value in given.items() if value is not None}


def signed(key: bytes = KEY, algorithm: str = "HS256", **changes: object) -> str:
    return "Bearer " + jwt.encode(claims(**changes), key, algorithm=algorithm)


def test_a_token_names_its_user() -> None:
    caller = verify(KEY, "Bearer " + issue(KEY, user_id="user-1"))

    assert caller == Caller(user_id="user-1", is_service=False)
    assert caller.may_see("user-1")
    assert not caller.may_see("user-2")


def test_a_token_without_a_user_is_a_service() -> None:
    caller = verify(KEY, "bearer " + issue(KEY, user_id=None))

    assert caller == Caller(user_id=None, is_service=True)
    assert caller.may_see("anybody")


def test_a_service_may_have_a_name_and_no_user_has_its_subject() -> None:
    orders = verify(KEY, "Bearer " + issue(KEY, user_id=None, service="orders"))

    assert orders == Caller(user_id=None, is_service=True, service="orders")
    assert (orders.subject, verify(KEY, "Bearer " + issue(KEY, user_id=None)).subject) == ("service:orders", "service:")
    assert verify(KEY, "Bearer " + issue(KEY, user_id="orders")).subject == "user:orders"


@pytest.mark.parametrize(("user", "name"), [("user-1", "orders"), (None, ""), (None, "a b"), (None, "x" * 64)])
def test_a_name_that_is_none_gets_no_token(user: str | None, name: str) -> None:
    with pytest.raises(ValueError, match="service's name"):
        issue(KEY, user_id=user, service=name)


@pytest.mark.parametrize("changes", [{"client_id": "orders"}, {"sub": None, "scope": "service", "client_id": "a b"}])
def test_a_token_whose_service_is_no_name_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnauthorizedError):
        verify(KEY, signed(**changes))


def test_clocks_may_differ_a_little() -> None:
    assert verify(KEY, "Bearer " + issue(KEY, user_id="user-1", lifetime_seconds=-LEEWAY_SECONDS + 3)).user_id == "user-1"


def test_an_expired_token_is_refused() -> None:
    with pytest.raises(UnauthorizedError, match="expired"):
        verify(KEY, "Bearer " + issue(KEY, user_id="user-1", lifetime_seconds=-60))


def test_an_empty_user_id_gets_no_token() -> None:
    with pytest.raises(ValueError, match="user id"):
        issue(KEY, user_id="")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic dXNlcjpwYXNz",
        "Bearer not-a-token",
        "Bearer a.b.c",
        "Bearer \udcff.b.c",
        signed() + "x",
        "Bearer " + issue(b"x" * 32, user_id="user-1"),
        "Bearer " + jwt.encode(claims(), "", algorithm="none"),
        signed(KEY * 2, "HS512"),
        signed(iss="somebody-else"),
        signed(aud="somebody-else"),
        signed(exp=None),
        signed(iat=None),
        signed(aud=None),
        signed(iss=None),
        signed(sub=None),
        signed(sub=""),
        signed(sub=7),
        signed(scope="service"),
        signed(sub=None, scope="admin"),
        signed(sub=None, scope=["service"]),
        signed(nbf=int(time.time()) + 600),
        signed(extra="x" * MAX_HEADER_CHARACTERS),
    ],
)
def test_what_is_no_token_of_ours_is_refused(header: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        verify(KEY, header)


def test_a_refusal_never_repeats_the_token() -> None:
    header = "Bearer " + issue(b"x" * 32, user_id="user-1")
    with pytest.raises(UnauthorizedError) as refused:
        verify(KEY, header)

    assert header[7:20] not in str(refused.value)
    assert refused.value.__cause__ is None
