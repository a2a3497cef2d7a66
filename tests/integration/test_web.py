"""The web as a client meets it: real Faust web servers on loopback ports, without Kafka, over tables in memory."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import faust
import pytest
from aiohttp import web
from jsonschema import Draft7Validator, FormatChecker
from prometheus_client import CollectorRegistry, Counter
from yarl import URL

import schemas
from agents import inbox, signals
from agents.inbox import INBOX, NOTIFICATIONS
from agents.ports import Effects, KnownSource
from schemas import topics
from schemas.codec import pack
from schemas.errors import RetryableError
from schemas.ids import notification_id, partition_of
from schemas.messages import ChannelChoice, DecisionRecord, EngagementSignal, Headline, Message, Origin, StatusChange
from schemas.sealed import seal
from schemas.status import Axis, Engagement, Status
from streams.tokens import issue
from streams.views.pages import MAX_USER_ID_CHARACTERS, Health, OperationsContext, WebContext, install, install_operations
from streams.views.proxy import FORWARDED, MAX_ANSWER_BYTES

USER, OTHER = "user-1", "user-2"
PARTITIONS = 4
START = datetime(2026, 1, 15, 9, 30, 0, 125_000, tzinfo=UTC)
SOURCE = KnownSource(topic="status", partition=0, offset=0, at=START)
TOKEN_KEY = b"t" * 32
USER_KEY = b"u" * 32
TITLE, MESSAGE = "Payment received", "We received 12.50 EUR for order o-1"
FAUST_PAGES = ("/table/", "/router/", "/router/notifications/", "/graph", "/graph/", "/stats", "/stats/", "/assignment/", "/performance/")


@cache
def contract(name: str) -> Draft7Validator:
    text = (Path(schemas.__file__).parent / "contracts" / f"{name}.response.schema.json").read_text()
    return Draft7Validator(json.loads(text), format_checker=FormatChecker())


def an_id(event: str = "e1", user: str = USER) -> str:
    return notification_id(producer="payments", event_id=event, rule="payment", user_id=user)


@dataclass(kw_only=True)
class Worker:
    """Tables in memory, fed by the real projection; `publish` is the way of a signal through the topics, at once."""

    partitions: set[int] = field(default_factory=lambda: set(range(PARTITIONS)))
    keys: dict[str, bytes] = field(default_factory=lambda: {USER: USER_KEY})
    owners: dict[int, str] = field(default_factory=dict)
    health: Health = field(default_factory=lambda: Health(is_live=True, is_ready=True))
    refusal: Exception | None = None
    published: list[tuple[str, bytes, Message]] = field(default_factory=list)
    rows: dict[str, dict[bytes, bytes]] = field(default_factory=lambda: {NOTIFICATIONS: {}, INBOX: {}})
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def shard(self, table: str, partition: int) -> Mapping[bytes, bytes] | None:
        return self.rows[table] if partition in self.partitions else None

    async def key_of(self, user_id: str) -> bytes | None:
        return self.keys.get(user_id)

    async def publish(self, topic: str, key: bytes, message: Message) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.published.append((topic, key, message))
        assert isinstance(message, EngagementSignal)
        for output in signals.decide(message, SOURCE, {}).outputs:
            assert isinstance(output.value, StatusChange)
            self.apply(inbox.decide_status(output.value, SOURCE, self.rows))

    def apply(self, effects: Effects) -> None:
        for row in effects.rows:
            if row.value is not None:
                self.rows[row.table][row.key] = row.value

    def decided(
        self, event: str = "e1", *, user: str = USER, minute: int = 0, outcome: str = "notified", metadata: Mapping[str, str] | None = None
    ) -> str:
        """Put a decision into the tables and return the notification's id."""
        notification, at = an_id(event, user), START + timedelta(minutes=minute)
        headline = seal(USER_KEY, pack(Headline(title=TITLE, message=MESSAGE)), user_id=user, purpose="headline")
        record = DecisionRecord(
            decision_id=f"{outcome}-{notification}-{minute}",
            notification_id=notification,
            user_id=user,
            outcome=outcome,
            rule="payment",
            rule_version="3",
            category="payments",
            lane="normal",
            type="payment",
            event_id=event,
            producer="payments",
            origin=Origin(topic="payments", partition=1, offset=7),
            request=Origin(topic="requests.normal", partition=0, offset=9),
            occurred_at=at,
            accepted_at=at,
            decided_at=at,
            preference_version=2,
            template_version="5",
            channels=[
                ChannelChoice(channel="in_app", is_chosen=True, reason="wanted", delivery_id=f"{notification}-in_app"),
                ChannelChoice(channel="email", is_chosen=False, reason="opted_out"),
            ],
            metadata={"orderId": "o-1", "paymentMethod": "card"} if metadata is None else metadata,
            sealed=headline if outcome == "notified" else None,
        )
        self.apply(inbox.decide_decision(record, SOURCE, self.rows))
        return notification

    def delivered(self, event: str = "e1", *, user: str = USER, minute: int = 0) -> str:
        """Put a notification delivered in the app into the tables and return its id."""
        notification = self.decided(event, user=user, minute=minute)
        for number, status in enumerate((Status.QUEUED, Status.SENDING, Status.DELIVERED)):
            change = StatusChange(
                notification_id=notification,
                delivery_id=f"{notification}-in_app",
                user_id=user,
                axis=Axis.DELIVERY,
                status=status,
                channel="in_app",
                provider="in_app" if number else None,
                attempt=min(number, 1),
                at=START + timedelta(minutes=minute, seconds=number),
            )
            self.apply(inbox.decide_status(change, SOURCE, self.rows))
        return notification

    def engaged(self, engagement: Engagement, *, event: str = "e1", minute: int) -> None:
        change = StatusChange(
            notification_id=an_id(event), user_id=USER, axis=Axis.ENGAGEMENT, status=engagement, at=START + timedelta(minutes=minute)
        )
        self.apply(inbox.decide_status(change, SOURCE, self.rows))

    def context(self) -> WebContext:
        return WebContext(
            health=lambda: self.health,
            registry=self.registry,
            tables=self,
            partitions=PARTITIONS,
            owner=self.owners.get,
            key_of=self.key_of,
            publish=self.publish,
            token_key=TOKEN_KEY,
            now=lambda: START + timedelta(hours=1),
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A worker with its web server, and a client of it."""

    worker: Worker
    url: str
    session: aiohttp.ClientSession

    async def ask(self, path: str, *, method: str = "GET", as_user: str | None = USER, headers: Mapping[str, str] | None = None) -> Reply:
        """Ask as a user; None: as a service."""
        token = {"Authorization": "Bearer " + issue(TOKEN_KEY, user_id=as_user)}
        return await self.ask_bare(path, method=method, headers=token | dict(headers or {}))

    async def ask_bare(self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> Reply:
        async with self.session.request(method, URL(self.url + path, encoded=True), headers=headers) as answer:
            return Reply(status=answer.status, headers=dict(answer.headers), body=await answer.read())


StartSite = Callable[..., Awaitable[Site]]


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


@asynccontextmanager
async def served(add_pages: Callable[[faust.App], None], *, faust_pages: bool = False) -> AsyncIterator[str]:
    """Run the web server of a Faust app and give its base URL. `faust_pages`: every page of its own is switched on."""
    port = a_free_port()
    app = faust.App(
        f"web-{port}",
        broker="kafka://127.0.0.1:1",
        store="memory://",
        autodiscover=False,
        web_bind="127.0.0.1",
        web_port=port,
        debug=faust_pages,
        web_tables_enabled=faust_pages,
        web_router_enabled=faust_pages,
        web_graph_enabled=faust_pages,
        web_stats_enabled=faust_pages,
        web_metrics_enabled=faust_pages,
    )
    add_pages(app)
    await app.web.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await app.web.stop()


@pytest.fixture
async def start() -> AsyncIterator[StartSite]:
    """Give a function that starts a worker's web server with all pages."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def start_site(worker: Worker | None = None, *, faust_pages: bool = False) -> Site:
            chosen = worker or Worker()
            url = await stack.enter_async_context(served(lambda app: install(app, chosen.context()), faust_pages=faust_pages))
            return Site(worker=chosen, url=url, session=session)

        yield start_site


@pytest.fixture
async def site(start: StartSite) -> Site:
    return await start()


def assert_problem(reply: Reply, status: int, kind: str) -> Mapping[str, Any]:
    assert reply.status == status, reply.body
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.json["type"] == f"urn:flowmart:notifications:problem:{kind}"
    assert reply.json["status"] == status
    assert {"title", "detail", "instance"} <= reply.json.keys()
    assert b"Traceback" not in reply.body
    problem: Mapping[str, Any] = reply.json
    return problem


async def test_the_inbox_answers_as_its_contract_says(site: Site) -> None:
    older, newer = site.worker.delivered("e1"), site.worker.delivered("e2", minute=5)
    site.worker.engaged(Engagement.READ, event="e1", minute=1)

    reply = await site.ask(f"/users/{USER}/notifications")

    assert reply.status == 200
    assert reply.headers["Cache-Control"] == "no-store"
    contract("GetUserNotifications").validate(reply.json)
    assert reply.json["userId"] == USER
    assert reply.json["notifications"] == [
        {"notificationId": newer, "title": TITLE, "message": MESSAGE, "status": "unread", "createdAt": "2026-01-15T09:35:00.125Z"},
        {"notificationId": older, "title": TITLE, "message": MESSAGE, "status": "read", "createdAt": "2026-01-15T09:30:00.125Z"},
    ]


async def test_the_inbox_is_filtered_and_paged(site: Site) -> None:
    ids = [site.worker.delivered(f"e{number}", minute=number) for number in range(5)]
    site.worker.engaged(Engagement.READ, event="e3", minute=9)

    async def listed(query: str) -> list[str]:
        reply = await site.ask(f"/users/{USER}/notifications{query}")
        contract("GetUserNotifications").validate(reply.json)
        return [each["notificationId"] for each in reply.json["notifications"]]

    assert await listed("?status=all&limit=2") == [ids[4], ids[3]]
    assert await listed("?limit=2&offset=2") == [ids[2], ids[1]]
    assert await listed("?status=unread&limit=2&offset=1") == [ids[2], ids[1]]
    assert await listed("?offset=10000&limit=200") == []


async def test_unread_counts_are_right_however_reads_come(site: Site) -> None:
    for number in range(5):
        site.worker.delivered(f"e{number}", minute=number)

    async def unread() -> object:
        return (await site.ask(f"/users/{USER}/unread")).json

    assert await unread() == {"userId": USER, "unread": 5, "isWhole": True}
    # a read, again, one that was made before it, an unread between the two, a read of another: late and out of order
    for engagement, event, minute in (
        (Engagement.READ, "e3", 9),
        (Engagement.READ, "e3", 9),
        (Engagement.READ, "e3", 3),
        (Engagement.UNREAD, "e3", 5),
        (Engagement.READ, "e1", 2),
    ):
        site.worker.engaged(engagement, event=event, minute=minute)
    assert await unread() == {"userId": USER, "unread": 3, "isWhole": True}
    site.worker.engaged(Engagement.UNREAD, event="e3", minute=10)
    assert await unread() == {"userId": USER, "unread": 4, "isWhole": True}
    assert_problem(await site.ask("/users/somebody-else/unread"), 404, "not-found")


async def test_an_inbox_nobody_wrote_to_is_empty(site: Site) -> None:
    reply = await site.ask(f"/users/{USER}/notifications")

    assert reply.json == {"userId": USER, "notifications": []}


async def test_a_user_id_in_a_path_is_percent_decoded(site: Site) -> None:
    user = "a/b {c}%2Fü@example"
    site.worker.keys[user] = USER_KEY
    site.worker.delivered("e1", user=user)

    reply = await site.ask("/users/a%2Fb%20%7Bc%7D%252F%C3%BC%40example/notifications", as_user=user)

    assert reply.status == 200, reply.body
    assert reply.json["userId"] == user
    assert len(reply.json["notifications"]) == 1


@pytest.mark.parametrize(
    ("query", "parameter", "allowed"),
    [
        ("?limit=0", "limit", "1 to 200"),
        ("?limit=201", "limit", "1 to 200"),
        ("?limit=ten", "limit", "1 to 200"),
        ("?limit=", "limit", "1 to 200"),
        ("?limit=%D9%A1", "limit", "1 to 200"),
        ("?limit=1&limit=2", "limit", "given once"),
        ("?limit=" + "9" * 5000, "limit", "1 to 200"),
        ("?offset=-1", "offset", "0 to 10000"),
        ("?offset=10001", "offset", "0 to 10000"),
        ("?status=archived", "status", "all or unread"),
    ],
)
async def test_a_bad_parameter_is_named_with_what_is_allowed(site: Site, query: str, parameter: str, allowed: str) -> None:
    problem = assert_problem(await site.ask(f"/users/{USER}/notifications{query}"), 400, "bad-parameter")

    assert problem["parameter"] == parameter
    assert allowed in problem["allowed"]
    assert problem["instance"] == f"/users/{USER}/notifications"


async def test_a_user_id_has_a_longest_length(site: Site) -> None:
    longest = "u" * MAX_USER_ID_CHARACTERS
    assert (await site.ask(f"/users/{longest}/notifications", as_user=longest)).status == 200
    assert_problem(await site.ask(f"/users/{longest}u/notifications", as_user=None), 400, "bad-parameter")


async def test_the_details_answer_as_their_contract_says(site: Site) -> None:
    notification = site.worker.delivered()

    reply = await site.ask(f"/notifications/{notification}")

    assert reply.status == 200
    contract("GetNotificationDetails").validate(reply.json)
    assert reply.json == {
        "notificationId": notification,
        "title": TITLE,
        "message": MESSAGE,
        "status": "unread",
        "userId": USER,
        "createdAt": "2026-01-15T09:30:00.125Z",
        "type": "payment",
        "metadata": {"orderId": "o-1"},
    }


async def test_details_without_an_order_have_no_metadata(site: Site) -> None:
    reply = await site.ask(f"/notifications/{site.worker.decided(metadata={'shippingProvider': 'ship'})}")

    contract("GetNotificationDetails").validate(reply.json)
    assert "metadata" not in reply.json


@pytest.mark.parametrize("key", [None, b"n" * 32])
async def test_what_was_sealed_with_a_destroyed_key_is_erased(site: Site, key: bytes | None) -> None:
    notification = site.worker.delivered()
    site.worker.keys = {} if key is None else {USER: key}

    details, listed = await site.ask(f"/notifications/{notification}"), await site.ask(f"/users/{USER}/notifications")

    contract("GetNotificationDetails").validate(details.json)
    contract("GetUserNotifications").validate(listed.json)
    assert (details.json["title"], details.json["message"]) == ("erased", "erased")
    assert listed.json["notifications"][0]["title"] == "erased"


async def test_what_was_skipped_has_a_trail_but_no_details(site: Site) -> None:
    notification = site.worker.decided(outcome="skipped")

    assert_problem(await site.ask(f"/notifications/{notification}"), 404, "not-found")
    assert_problem(await site.ask(f"/notifications/{notification}/read", method="POST"), 404, "not-found")
    assert (await site.ask(f"/notifications/{notification}/trail")).json["decision"]["outcome"] == "skipped"


async def test_the_trail_says_why_and_how_it_ended_without_personal_data(site: Site) -> None:
    notification = site.worker.delivered()
    site.worker.engaged(Engagement.READ, minute=2)
    site.worker.decided(minute=60, outcome="duplicate_of")

    reply = await site.ask(f"/notifications/{notification}/trail", as_user=None)

    assert reply.status == 200
    assert reply.json["event"] == {
        "id": "e1",
        "producer": "payments",
        "topic": "payments",
        "partition": 1,
        "offset": 7,
        "occurredAt": "2026-01-15T09:30:00.125Z",
    }
    decision = reply.json["decision"]
    assert decision["versions"] == {"rule": "3", "template": "5", "preferences": 2}
    assert [(choice["channel"], choice["isChosen"], choice["reason"]) for choice in decision["channels"]] == [
        ("in_app", True, "wanted"),
        ("email", False, "opted_out"),
    ]
    [delivery] = reply.json["deliveries"]
    assert delivery["status"] == "delivered"
    assert [(change["status"], change["attempt"], change["provider"]) for change in delivery["changes"]] == [
        ("queued", 0, None),
        ("sending", 1, "in_app"),
        ("delivered", 1, "in_app"),
    ]
    assert reply.json["engagement"]["readAt"] == "2026-01-15T09:32:00.125Z"
    assert [(again["at"], again["outcome"]) for again in reply.json["again"]] == [("2026-01-15T10:30:00.125Z", "duplicate_of")]
    assert TITLE.encode() not in reply.body
    assert b"12.50" not in reply.body


async def test_a_status_whose_decision_is_not_known_yet_has_a_trail_only(site: Site) -> None:
    site.worker.engaged(Engagement.CLICKED, minute=1)

    trail = (await site.ask(f"/notifications/{an_id()}/trail")).json

    assert (trail["event"], trail["decision"]) == (None, None)
    assert trail["engagement"]["clickedAt"] == "2026-01-15T09:31:00.125Z"
    assert_problem(await site.ask(f"/notifications/{an_id()}"), 404, "not-found")


async def test_reading_publishes_one_signal_and_shows_in_the_inbox(site: Site) -> None:
    notification = site.worker.delivered()

    first = await site.ask(f"/notifications/{notification}/read", method="POST")
    second = await site.ask(f"/notifications/{notification}/read", method="POST")

    assert (first.status, second.status) == (202, 204)
    [(topic, key, signal)] = site.worker.published
    assert (topic, key) == (topics.SIGNALS, USER.encode())
    assert isinstance(signal, EngagementSignal)
    assert (signal.engagement, signal.at) == ("read", START + timedelta(hours=1))
    assert (await site.ask(f"/users/{USER}/notifications?status=unread")).json["notifications"] == []


async def test_reading_twice_before_the_inbox_follows_sends_the_same_signal(site: Site, start: StartSite) -> None:
    notification, late = site.worker.delivered(), Worker()
    late.delivered()
    other = await start(late)

    await site.ask(f"/notifications/{notification}/read", method="POST")
    await other.ask(f"/notifications/{notification}/read", method="POST")

    assert site.worker.published == other.worker.published


class NotStoredError(RetryableError):
    """Kafka did not confirm."""


@pytest.mark.parametrize("refusal", [TimeoutError(), NotStoredError()])
async def test_a_signal_that_kafka_does_not_confirm_is_no_success(site: Site, refusal: Exception) -> None:
    site.worker.refusal = refusal

    reply = await site.ask(f"/notifications/{site.worker.delivered()}/read", method="POST")

    assert_problem(reply, 503, "unavailable")
    assert int(reply.headers["Retry-After"]) > 0


async def test_an_unforeseen_error_is_a_problem_without_its_cause(site: Site) -> None:
    site.worker.refusal = RuntimeError("secret detail")

    reply = await site.ask(f"/notifications/{site.worker.delivered()}/read", method="POST")

    assert_problem(reply, 500, "internal")
    assert b"secret" not in reply.body


PROTECTED = (
    ("GET", f"/users/{USER}/notifications"),
    ("GET", f"/notifications/{an_id()}"),
    ("GET", f"/notifications/{an_id()}/trail"),
    ("POST", f"/notifications/{an_id()}/read"),
)


@pytest.mark.parametrize(("method", "path"), PROTECTED)
async def test_without_a_valid_token_nothing_is_told(site: Site, method: str, path: str) -> None:
    site.worker.delivered()
    expired = issue(TOKEN_KEY, user_id=USER, lifetime_seconds=-60)

    bare = await site.ask_bare(path, method=method)
    bad = await site.ask_bare(path, method=method, headers={"Authorization": f"Bearer {expired}"})

    assert_problem(bare, 401, "unauthorized")
    assert bare.headers["WWW-Authenticate"] == 'Bearer realm="notifications"'
    assert_problem(bad, 401, "unauthorized")
    assert 'error="invalid_token"' in bad.headers["WWW-Authenticate"]
    assert site.worker.published == []


@pytest.mark.parametrize(("method", "path"), PROTECTED[1:])
async def test_what_belongs_to_another_looks_as_if_it_did_not_exist(site: Site, method: str, path: str) -> None:
    missing = await site.ask(path, method=method, as_user=OTHER)
    site.worker.delivered()
    another = await site.ask(path, method=method, as_user=OTHER)

    assert_problem(another, 404, "not-found")
    assert another.body == missing.body
    assert site.worker.published == []
    assert (await site.ask(path, method=method, as_user=None)).status in {200, 202}


async def test_another_users_inbox_does_not_exist(site: Site) -> None:
    site.worker.delivered()

    assert_problem(await site.ask(f"/users/{USER}/notifications", as_user=OTHER), 404, "not-found")
    assert (await site.ask(f"/users/{USER}/notifications", as_user=None)).status == 200


@pytest.mark.parametrize(
    "path", ["/notifications/n1", f"/notifications/{an_id('never')}", "/notifications/%20", "/users//notifications", "/x"]
)
async def test_what_does_not_exist_is_not_found(site: Site, path: str) -> None:
    assert_problem(await site.ask(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", f"/users/{USER}/notifications", {"GET", "HEAD"}),
        ("DELETE", f"/notifications/{an_id()}", {"GET", "HEAD"}),
        ("GET", f"/notifications/{an_id()}/read", {"POST"}),
        ("PUT", "/metrics", {"GET", "HEAD"}),
        ("OPTIONS", "/", {"GET", "HEAD"}),
    ],
)
async def test_another_method_is_not_allowed(site: Site, method: str, path: str, allowed: set[str]) -> None:
    reply = await site.ask(path, method=method)

    assert_problem(reply, 405, "method-not-allowed")
    assert set(reply.headers["Allow"].replace(" ", "").split(",")) == allowed


@pytest.mark.parametrize("faust_pages", [False, True])
async def test_the_pages_of_faust_itself_are_closed(start: StartSite, *, faust_pages: bool) -> None:
    site = await start(faust_pages=faust_pages)

    for path in FAUST_PAGES:
        assert_problem(await site.ask(path, as_user=None), 404, "not-found")
    # the path that Faust's index takes is ours
    assert (await site.ask_bare("/")).json["service"] == "flowmart-notifications"


async def test_the_index_lists_every_page(site: Site) -> None:
    reply = await site.ask_bare("/")

    assert reply.status == 200
    assert [(page["method"], page["path"]) for page in reply.json["pages"]] == [
        ("GET", "/"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/metrics"),
        ("GET", "/users/{userId}/notifications"),
        ("GET", "/users/{userId}/unread"),
        ("GET", "/notifications/{notificationId}"),
        ("POST", "/notifications/{notificationId}/read"),
        ("GET", "/notifications/{notificationId}/trail"),
    ]


async def test_health_follows_the_worker(site: Site) -> None:
    assert [(await site.ask_bare(path)).status for path in ("/health/live", "/health/ready")] == [200, 200]

    site.worker.health = Health(is_live=True, is_ready=False, details={"recovering": [0, 3]})
    live, ready = await site.ask_bare("/health/live"), await site.ask_bare("/health/ready")
    assert (live.status, ready.status) == (200, 503)
    assert ready.json == {"status": "not ready", "details": {"recovering": [0, 3]}}

    site.worker.health = Health(is_live=False, is_ready=False)
    assert (await site.ask_bare("/health/live")).status == 503


async def test_metrics_are_prometheus_text(site: Site) -> None:
    Counter("notify_records", "Records.", registry=site.worker.registry).inc(3)

    reply = await site.ask_bare("/metrics")

    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    assert b"notify_records_total 3.0" in reply.body


async def test_other_roles_have_health_and_metrics_only() -> None:
    context = OperationsContext(health=lambda: Health(is_live=True, is_ready=True), registry=CollectorRegistry())
    async with served(lambda app: install_operations(app, context)) as url, aiohttp.ClientSession() as session:
        site = Site(worker=Worker(), url=url, session=session)

        for path in ("/", "/health/live", "/health/ready", "/metrics"):
            assert (await site.ask_bare(path)).status == 200
        for path in (*FAUST_PAGES, f"/users/{USER}/notifications", f"/notifications/{an_id()}"):
            assert_problem(await site.ask(path), 404, "not-found")


def others_of(partition: int) -> set[int]:
    return set(range(PARTITIONS)) - {partition}


PARTITION = partition_of(USER.encode(), PARTITIONS)


@pytest.fixture
async def two(start: StartSite) -> tuple[Site, Site]:
    """Give the owner of the user's partition, and another worker that knows it."""
    owner = await start(Worker(partitions={PARTITION}))
    return owner, await start(Worker(partitions=others_of(PARTITION), owners={PARTITION: owner.url + "/"}))


async def test_any_worker_answers_for_the_owner(two: tuple[Site, Site]) -> None:
    owner, other = two
    notification = owner.worker.delivered()
    owner.worker.delivered("e2", minute=1)

    listed = await other.ask(f"/users/{USER}/notifications?limit=1&offset=1")
    details = await other.ask(f"/notifications/{notification}")
    trail = await other.ask(f"/notifications/{notification}/trail")
    read = await other.ask(f"/notifications/{notification}/read", method="POST")
    again = await other.ask(f"/notifications/{notification}/read", method="POST")
    head = await other.ask(f"/notifications/{notification}", method="HEAD")

    contract("GetUserNotifications").validate(listed.json)
    assert [each["notificationId"] for each in listed.json["notifications"]] == [notification]
    contract("GetNotificationDetails").validate(details.json)
    assert details.headers["Content-Type"] == "application/json"
    assert trail.json["notificationId"] == notification
    assert (read.status, again.status, head.status) == (202, 204, 200)
    assert len(owner.worker.published) == 1
    assert other.worker.published == []


async def test_the_owner_judges_the_token_again(two: tuple[Site, Site]) -> None:
    owner, other = two
    notification = owner.worker.delivered()

    assert_problem(await other.ask(f"/notifications/{notification}", as_user=OTHER), 404, "not-found")
    assert_problem(await other.ask_bare(f"/notifications/{notification}"), 401, "unauthorized")
    assert_problem(await other.ask(f"/notifications/{an_id('never')}"), 404, "not-found")


async def test_a_forwarded_user_id_arrives_as_it_was_sent(start: StartSite) -> None:
    user = "a/b {c}%2Fü"
    partition = partition_of(user.encode(), PARTITIONS)
    owner = await start(Worker(partitions={partition}))
    other = await start(Worker(partitions=others_of(partition), owners={partition: owner.url}))
    owner.worker.delivered(user=user)

    reply = await other.ask("/users/a%2Fb%20%7Bc%7D%252F%C3%BC/notifications", as_user=user)

    assert reply.json["userId"] == user
    assert len(reply.json["notifications"]) == 1


async def test_while_nobody_owns_the_partition_the_client_is_told_to_come_back(start: StartSite) -> None:
    site = await start(Worker(partitions=others_of(PARTITION)))

    for method, path in PROTECTED:
        reply = await site.ask(path, method=method)
        assert_problem(reply, 503, "unavailable")
        assert int(reply.headers["Retry-After"]) > 0


async def test_an_owner_that_does_not_answer_is_as_good_as_none(start: StartSite) -> None:
    site = await start(Worker(partitions=others_of(PARTITION), owners={PARTITION: f"http://127.0.0.1:{a_free_port()}"}))

    assert_problem(await site.ask(f"/users/{USER}/notifications"), 503, "unavailable")


async def test_two_workers_that_name_each_other_do_not_ask_in_a_circle(start: StartSite) -> None:
    first, second = await start(Worker(partitions=set())), await start(Worker(partitions=set()))
    first.worker.owners[PARTITION] = second.url
    second.worker.owners[PARTITION] = first.url

    async with asyncio.timeout(5):
        reply = await first.ask(f"/users/{USER}/notifications")

    assert_problem(reply, 503, "unavailable")
    assert "Retry-After" in reply.headers


async def test_a_forwarded_request_is_answered_by_who_has_the_rows(site: Site) -> None:
    site.worker.delivered()

    assert (await site.ask(f"/users/{USER}/notifications", headers={FORWARDED: "1"})).status == 200


async def test_an_answer_without_end_is_cut_off(start: StartSite) -> None:
    async def answer_for_ever(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65_536)
        except ConnectionError:
            return response

    application = web.Application()
    application.router.add_get("/{path:.*}", answer_for_ever)
    runner = web.AppRunner(application)
    await runner.setup()
    port = a_free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        site = await start(Worker(partitions=set(), owners={PARTITION: f"http://127.0.0.1:{port}"}))
        problem = assert_problem(await site.ask(f"/users/{USER}/notifications"), 502, "bad-answer")
    finally:
        await runner.cleanup()
    assert str(MAX_ANSWER_BYTES) in problem["detail"]


async def test_pages_cannot_be_added_to_a_running_server() -> None:
    apps: list[faust.App] = []

    def keep(app: faust.App) -> None:
        apps.append(app)
        install(app, Worker().context())

    async with served(keep):
        with pytest.raises(RuntimeError, match="before"):
            install_operations(apps[0], Worker().context())
