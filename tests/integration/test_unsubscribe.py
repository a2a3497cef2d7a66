"""The link of a mail to leave a category, as mail programs, scanners and people use it; and that the router obeys it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import aiohttp
import pytest

from agents.control import Control
from schemas import topics
from schemas.errors import ProviderUnavailableError
from schemas.messages import ControlEntry, Delivery, Message
from schemas.topics import Lane
from streams.unsubscribe import (
    LIFETIME,
    MAX_TOKEN_CHARACTERS,
    ExpiredLinkError,
    InvalidLinkError,
    Unsubscribe,
    open_token,
    token_of,
    unsubscribe_url,
)
from streams.views.pages import install
from streams.views.unsubscribe import MAX_BODY_BYTES, install_unsubscribe
from tests.deliveries import a_delivery
from tests.integration.test_web import START, TOKEN_KEY, Worker, served

NOW = START + timedelta(hours=1)  # as the worker's clock says
CONTROL = Control(lambda _scope: None, seal_key=bytes(32))
ADDRESS = "ada@example.com"
SCOPE = CONTROL.scope_of("email", ADDRESS)
LINK = Unsubscribe(scope=SCOPE, category="payments", expires_at=NOW.replace(microsecond=0) + timedelta(days=1))
ONE_CLICK = {"List-Unsubscribe": "One-Click"}


class Recorder(Worker):
    """A worker whose publishing is looked at."""

    async def publish(self, topic: str, key: bytes, message: Message) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.published.append((topic, key, message))


@pytest.fixture
def worker() -> Recorder:
    return Recorder()


@pytest.fixture
async def page(worker: Recorder) -> AsyncIterator[str]:
    def add(app: Any) -> None:
        install(app, worker.context())
        install_unsubscribe(app)

    async with served(add) as base:
        yield f"{base}/unsubscribe/"


# ---- the token


def test_a_token_says_what_it_ends_and_shows_nothing_of_it() -> None:
    token = token_of(TOKEN_KEY, LINK)
    assert open_token(TOKEN_KEY, token, now=NOW) == LINK
    assert len(token) < 200
    assert "payments" not in token
    assert SCOPE.rpartition(":")[2] not in token


def test_a_token_that_was_cut_or_changed_opens_nothing() -> None:
    token = token_of(TOKEN_KEY, LINK)
    changed = "B" if token[0] == "A" else "A"
    for broken in (token[:-2], changed + token[1:], "", "ü", "A" * (MAX_TOKEN_CHARACTERS + 1), token[:7] + "." + token[8:]):
        with pytest.raises(InvalidLinkError):
            open_token(TOKEN_KEY, broken, now=NOW)


def test_a_token_of_another_deployment_opens_nothing() -> None:
    with pytest.raises(InvalidLinkError):
        open_token(b"x" * 32, token_of(TOKEN_KEY, LINK), now=NOW)


def test_a_token_ends() -> None:
    token = token_of(TOKEN_KEY, LINK)
    assert open_token(TOKEN_KEY, token, now=LINK.expires_at)
    with pytest.raises(ExpiredLinkError):
        open_token(TOKEN_KEY, token, now=LINK.expires_at + timedelta(seconds=1))


def test_a_delivery_has_the_same_link_at_each_attempt_and_one_that_is_critical_has_none() -> None:
    delivery = a_delivery("ada", "event")
    found = unsubscribe_url("https://flowmart.example/", TOKEN_KEY, delivery, SCOPE)
    assert found is not None
    assert found == unsubscribe_url("https://flowmart.example", TOKEN_KEY, replace(delivery, attempt=2), SCOPE)
    base, _, token = found.rpartition("/")
    assert base == "https://flowmart.example/unsubscribe"
    opened = open_token(TOKEN_KEY, token, now=delivery.created_at)
    assert (opened.scope, opened.category) == (SCOPE, "payments")
    assert abs(opened.expires_at - delivery.created_at - LIFETIME) < timedelta(seconds=1)
    critical: Delivery = replace(delivery, lane=Lane.CRITICAL)
    assert unsubscribe_url("https://flowmart.example", TOKEN_KEY, critical, SCOPE) is None
    assert unsubscribe_url("", TOKEN_KEY, delivery, SCOPE) is None


# ---- the page


async def test_looking_at_the_page_changes_nothing_and_shows_a_button(worker: Recorder, page: str) -> None:
    async with aiohttp.ClientSession() as client, client.get(page + token_of(TOKEN_KEY, LINK)) as answer:
        text = await answer.text()
        assert (answer.status, answer.content_type) == (200, "text/html")
        assert "Stop e-mails about payments?" in text
        assert '<form method="post">' in text
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    async with aiohttp.ClientSession() as client, client.head(page + token_of(TOKEN_KEY, LINK)) as answer:
        assert answer.status == 200
    assert worker.published == []


@pytest.mark.parametrize("is_multipart", [False, True])
async def test_one_click_suppresses_the_category_at_the_address_without_a_login(worker: Recorder, page: str, *, is_multipart: bool) -> None:
    body: Any = ONE_CLICK
    if is_multipart:
        body = aiohttp.MultipartWriter("form-data")
        body.append("One-Click", {"Content-Disposition": 'form-data; name="List-Unsubscribe"'})
    async with aiohttp.ClientSession() as client:
        for _ in range(2):
            async with client.post(page + token_of(TOKEN_KEY, LINK), data=body, allow_redirects=False) as answer:
                assert answer.status == 200
                assert "Done" in await answer.text()
    (topic, key, order), again = worker.published
    assert (topic, key) == (topics.CONTROL, f"{SCOPE}:payments".encode())
    assert again[:2] == (topic, key)
    assert isinstance(order, ControlEntry)
    assert order.reason == "unsubscribed"
    obeyed = Control({order.scope: order}.get, seal_key=bytes(32))
    assert obeyed.suppressed("email", "Ada@example.com", "payments") is order
    assert obeyed.suppressed("email", ADDRESS, "orders") is None
    assert obeyed.suppressed("sms", ADDRESS, "payments") is None


async def test_a_post_that_does_not_say_one_click_changes_nothing(worker: Recorder, page: str) -> None:
    url = page + token_of(TOKEN_KEY, LINK)
    async with aiohttp.ClientSession() as client:
        for data, status in (({"a": "b"}, 400), (b"{}", 415), ({"List-Unsubscribe": "x" * MAX_BODY_BYTES}, 413)):
            async with client.post(url, data=data) as answer:
                assert answer.status == status
    assert worker.published == []


@pytest.mark.parametrize("method", ["get", "post"])
async def test_a_link_that_ended_or_was_broken_says_so_to_people(worker: Recorder, page: str, method: str) -> None:
    old = token_of(TOKEN_KEY, replace(LINK, expires_at=NOW - timedelta(days=1)))
    async with aiohttp.ClientSession() as client:
        for token, status, words in (
            (old, 410, "has expired"),
            ("abc", 404, "does not work"),
            ("a" * (MAX_TOKEN_CHARACTERS + 1), 404, "not work"),
        ):
            async with client.request(method, page + token, data=ONE_CLICK if method == "post" else None) as answer:
                assert (answer.status, answer.content_type) == (status, "text/html")
                assert words in await answer.text()
    assert worker.published == []


async def test_nobody_is_told_that_it_is_done_before_kafka_has_it(worker: Recorder, page: str) -> None:
    worker.refusal = ProviderUnavailableError("no broker")
    async with aiohttp.ClientSession() as client, client.post(page + token_of(TOKEN_KEY, LINK), data=ONE_CLICK) as answer:
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
