"""Requests from anywhere: over HTTP, from the command line and by users' actions, down to the mailbox; and watches."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp
import pytest
from standardwebhooks import Webhook

from agents.control import Control
from schemas import topics
from schemas.errors import ProviderUnavailableError
from schemas.ids import is_notification_id, notification_id, partition_of
from schemas.messages import Command, DecisionRecord, DeliveryReport, Message, NotificationRequested
from schemas.topics import Lane, requests
from streams.embedded.stack import Stack
from streams.tokens import issue
from streams.unsubscribe import open_token
from streams.views.pages import install
from streams.views.requests import MAX_BODY_BYTES, Asking, Rates, install_requests
from templates.render import Templates
from tests.harness import PARTITIONS, System, system, wait_for
from tests.integration.test_web import TOKEN_KEY, Worker, served

ROLES = ("ingest", "router", "sender-critical", "sender-normal", "views")
WORDS = "Collect it by Friday at the harbour"
PUBLIC = "https://notifications.flowmart.example"
SECRET, ANOTHER_SECRET = ("whsec_" + base64.b64encode(letter * 32).decode() for letter in (b"a", b"b"))


@pytest.fixture(scope="module")
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    variables = {"NOTIFY_PUBLIC_URL": PUBLIC, "NOTIFY_CALLBACK_SECRETS": f"{ANOTHER_SECRET} {SECRET}"}
    with system(stack, tmp_path_factory.mktemp("requests"), variables=variables) as made:
        for role in ROLES:
            made.start(role)
        made.start("views", name="b")
        made.await_ready(seconds=120)
        yield made


def a_request(user: str, **changes: object) -> dict[str, object]:
    return {"userId": user, "rule": "message", "data": {"title": "Your parcel", "message": WORDS}, **changes}


def people(*users: str) -> list[dict[str, object]]:
    return [{"userId": user, "name": f"Name of {user}", "email": f"{user}@example.com"} for user in users]


def insisted(made: System, body: dict[str, object], worker: str) -> tuple[Mapping[str, str], Any] | None:
    """Ask as a service does that comes back when it is told to; None: it was told to."""
    status, headers, answer = made.ask("/notifications", body, service=worker, worker=worker)
    if status == 503:
        assert int(headers["Retry-After"]) > 0
        return None
    assert status == 202, answer
    return headers, answer


def decisions(made: System, notification: str) -> list[DecisionRecord]:
    found = made.messages("decisions", DecisionRecord)
    return [record for record in found if record.notification_id == notification]


def outcomes(made: System, notification: str) -> list[str]:
    return [record.outcome for record in decisions(made, notification)]


def watches(made: System) -> set[bytes]:
    return set(made.rows("watches"))


# ---- the public's pages: no token


def post_bare(made: System, path: str, body: bytes, headers: Mapping[str, str]) -> int:
    address = f"http://127.0.0.1:{made.workers['views-a'].port}{path}"
    with urllib.request.urlopen(urllib.request.Request(address, body, dict(headers), method="POST"), timeout=10) as answer:
        return int(answer.status)


def test_a_providers_call_is_a_record_of_the_topic_of_receipts_when_it_is_answered(running: System) -> None:
    report = {"provider": "smtp", "reference": "called", "status": "bounced", "at": "2026-01-15T09:30:00Z", "suppresses": "hard_bounce"}
    body, now = json.dumps({"reports": [report]}), datetime.now(UTC)
    headers = {"webhook-id": "1", "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": Webhook(SECRET).sign("1", now, body)}
    assert post_bare(running, "/callbacks/receipts", body.encode(), headers) == 204
    (record,) = running.read("receipts")
    found = running.decode(record, DeliveryReport)
    assert (record.key(), found.reference, found.suppresses) == (b"smtp called", "called", "hard_bounce")
    assert running.workers["views-a"].metric("notify_callbacks_total", source="receipts", outcome="published") == 1


def test_the_link_of_a_mail_ends_the_next_one(running: System) -> None:
    running.load_preferences(people("leaver"))
    running.ask("/notifications", a_request("leaver"))
    scope = Control(lambda _scope: None, seal_key=running.settings.seal_key).scope_of("email", "leaver@example.com")
    link = wait_for(lambda: leaving(running, scope), seconds=60, what="the mail with its link")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert post_bare(running, link.removeprefix(PUBLIC), b"List-Unsubscribe=One-Click", form) == 200

    def reasons() -> list[str]:
        asked = running.ask("/notifications", a_request("leaver"))[2]["notificationId"]
        wait_for(lambda: decisions(running, asked), seconds=30, what="a decision")
        return [choice.reason for choice in decisions(running, asked)[0].channels if choice.channel == "email"]

    wait_for(lambda: reasons() == ["suppressed: unsubscribed"], seconds=30, what="the next one skipped")


def leaving(made: System, scope: str) -> str | None:
    """Return the link of a mail to the address of `scope`, as its header List-Unsubscribe says it; None: there is none yet."""
    with urllib.request.urlopen(f"{made.stack.mail_http}/api/counts?header=List-Unsubscribe", timeout=30) as answer:
        links: list[str] = [header.strip("<> ") for header in json.loads(answer.read()) if PUBLIC in header]
    for link in links:
        token = link.removeprefix(f"{PUBLIC}/unsubscribe/")
        if open_token(made.settings.token_key, token, now=datetime.now(UTC)).scope == scope:
            return link
    return None


# ---- POST /notifications


def test_a_posted_request_reaches_the_mailbox_and_its_words_are_readable_nowhere_in_kafka(running: System) -> None:
    running.load_preferences(people("posted"))
    status, headers, answer = running.ask("/notifications", a_request("posted", metadata={"orderId": "ord_1"}))
    found = answer["notificationId"]
    assert (status, headers["Location"]) == (202, f"/notifications/{found}")
    assert is_notification_id(found)
    wait_for(lambda: running.mails()[f"{found}-email"] == 1, seconds=30, what="the mail")
    page = wait_for(lambda: (seen := running.web(headers["Location"], user="posted"))[0] == 200 and seen[1], seconds=20, what="the page")
    assert (page["message"], page["metadata"]) == (WORDS, {"orderId": "ord_1"})
    for topic in (*(requests(lane) for lane in Lane), "commands", "decisions", "deliver.email.normal", "deliver.in_app.normal"):
        assert not [message for message in running.read(topic) if WORDS.encode() in (message.value() or b"")], topic


def test_each_of_the_views_workers_may_be_asked_and_a_new_user_gets_a_key(running: System) -> None:
    users = [f"anywhere-{number}" for number in range(2 * PARTITIONS)]
    assert {partition_of(user.encode(), PARTITIONS) for user in users} == set(range(PARTITIONS))
    for worker in ("views-a", "views-b"):
        for user in users:
            asked = partial(insisted, running, a_request(user, idempotencyKey="k"), worker)
            headers, answer = wait_for(asked, seconds=30, what=f"a request for {user} taken by {worker}")
            assert headers["Location"] == f"/notifications/{answer['notificationId']}"
    assert {key.decode() for key in running.rows("keys")} >= set(users)


def test_the_same_idempotency_key_is_one_notification_of_that_service_and_other_words_are_a_conflict(running: System) -> None:
    running.load_preferences(people("once"))

    def asked(words: str, service: str | None = None) -> str:
        body = a_request("once", data={"title": "t", "message": words})
        status, _, answer = running.ask("/notifications", body, service=service, headers={"Idempotency-Key": "order-7"})
        assert status == 202
        return str(answer["notificationId"])

    first, again, other, elsewhere = asked("a"), asked("a"), asked("b"), asked("a", service="orders")
    assert first == again == other == notification_id(producer="http", event_id="order-7", rule="message", user_id="once")
    assert elsewhere == notification_id(producer="http:orders", event_id="order-7", rule="message", user_id="once")
    wait_for(lambda: sorted(outcomes(running, first)) == ["conflict", "duplicate_of", "notified"], seconds=30, what="three decisions")
    wait_for(lambda: outcomes(running, elsewhere) == ["notified"], seconds=30, what="the other service's own")
    wait_for(lambda: running.mails()[f"{first}-email"] == 1, seconds=20, what="one mail")


def test_without_a_key_every_request_is_an_event_of_its_own(running: System) -> None:
    running.load_preferences(people("twice"))
    found = {running.ask("/notifications", a_request("twice"))[2]["notificationId"] for _ in range(2)}
    assert len(found) == 2


def test_only_a_service_may_ask(running: System) -> None:
    status, _, problem = running.ask("/notifications", a_request("u"), user="u")
    assert (status, problem["type"].rpartition(":")[2]) == (403, "forbidden")
    status, headers, _ = running.ask("/notifications", a_request("u"), headers={"Authorization": "Bearer nonsense"})
    assert (status, headers["WWW-Authenticate"].partition(" ")[0]) == (401, "Bearer")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b'{"userId": "\xff"}'])
def test_a_body_that_is_no_json_object_is_a_bad_request(running: System, body: bytes) -> None:
    status, _, problem = running.ask("/notifications", body)
    assert (status, problem["type"].rpartition(":")[2]) == (400, "bad-request")


def test_a_body_above_64_kib_is_refused_whether_its_size_was_said_or_not(running: System) -> None:
    body = json.dumps(a_request("u", data={"title": "t", "message": "x" * MAX_BODY_BYTES})).encode()
    status, _, problem = running.ask("/notifications", body)
    assert (status, problem["limit"]) == (413, MAX_BODY_BYTES)
    chunked = urllib.request.Request(
        f"http://127.0.0.1:{running.workers['views-a'].port}/notifications",
        iter([body]),
        {"Authorization": f"Bearer {issue(running.settings.token_key, user_id=None)}", "Content-Type": "application/json"},
        method="POST",
    )
    with pytest.raises(urllib.request.HTTPError) as caught:
        urllib.request.urlopen(chunked, timeout=10)
    assert caught.value.code == 413


def test_another_content_type_is_refused(running: System) -> None:
    status, _, _ = running.ask("/notifications", a_request("u"), headers={"Content-Type": "text/plain"})
    assert status == 415


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"userId": None}, "userId"),
        ({"userId": ""}, "userId"),
        ({"userId": "x" * 201}, "userId"),
        ({"userId": "a\nb"}, "userId"),
        ({"rule": None}, "rule"),
        ({"rule": "no_such_rule"}, "rule"),
        ({"rule": ""}, "rule"),
        ({"data": {"title": "t"}}, "data.message"),
        ({"data": {}}, "data.message"),
        ({"data": None, "rule": "password_reset"}, "data.code"),
        ({"data": {"title": 7, "message": "m"}}, "data.title"),
        ({"data": "words"}, "data"),
        ({"metadata": {"email": "ada@example.com"}}, "metadata.email"),
        ({"metadata": {"orderId": "x" * 201}}, "metadata.orderId"),
        ({"idempotencyKey": "x" * 201}, "idempotencyKey"),
        ({"occurredAt": "yesterday"}, "occurredAt"),
        ({"occurredAt": "2026-01-15T09:30:00"}, "occurredAt"),
        ({"occurredAt": "9999-12-31T23:59:59-14:00"}, "occurredAt"),
        ({"occurredAt": "0001-01-01T00:00:00+14:00"}, "occurredAt"),
        ({"usrId": "u"}, "usrId"),
    ],
)
def test_a_field_that_does_not_fit_is_named_and_nothing_is_published(running: System, changes: dict[str, object], field: str) -> None:
    before = running.count("requests.normal")
    status, _, problem = running.ask("/notifications", a_request("u", **changes))
    assert (status, problem["type"].rpartition(":")[2], problem["field"]) == (422, "invalid-field", field)
    assert "ada@example.com" not in json.dumps(problem)
    assert running.count("requests.normal") == before


def test_all_that_a_template_misses_is_named_at_once(running: System) -> None:
    _, _, problem = running.ask("/notifications", a_request("u", rule="new_sign_in", data={"device": "Firefox"}))
    assert problem["missing"] == ["location", "occurredAt"]


def test_a_header_and_a_field_that_name_different_keys_are_refused(running: System) -> None:
    status, _, problem = running.ask("/notifications", a_request("u", idempotencyKey="a"), headers={"Idempotency-Key": "b"})
    assert (status, problem["field"]) == (422, "idempotencyKey")
    status, _, problem = running.ask("/notifications", a_request("u"), headers={"Idempotency-Key": "two words"})
    assert (status, problem["parameter"]) == (400, "Idempotency-Key")


def test_above_its_rate_a_token_is_told_when_to_come_back_and_others_are_not_kept_waiting(running: System) -> None:
    running.load_preferences(people("calm"))
    answers = [running.ask("/notifications", b"{", service="hasty") for _ in range(200)]
    refused = [headers for status, headers, _ in answers if status == 429]
    assert refused, "200 requests took longer than 4 s"
    assert {headers["Retry-After"] for headers in refused} == {"1"}
    assert {status for status, _, _ in answers} == {400, 429}
    assert running.ask("/notifications", a_request("calm"), service="calm")[0] == 202


def test_a_bucket_fills_up_with_time_and_no_further() -> None:
    now = [0.0]
    rates = Rates(per_second=2, clock=lambda: now[0])
    assert [rates.take("a") for _ in range(3)] == [0, 0, 0.5]
    assert rates.take("b") == 0
    now[0] = 0.5
    assert [rates.take("a"), rates.take("a")] == [0, 0.5]
    now[0] = 3_600
    assert [rates.take("a") for _ in range(3)] == [0, 0, 0.5]


# without Kafka, which can be told to refuse


class Refusing(Worker):
    """A worker whose Kafka takes nothing that `refused` says."""

    refused: type[Message] | None = None

    async def publish(self, topic: str, key: bytes, message: Message) -> None:
        if self.refused is not None and isinstance(message, self.refused):
            raise ProviderUnavailableError("Kafka did not acknowledge", code="kafka")
        self.published.append((topic, key, message))


@pytest.fixture
async def refusing() -> AsyncIterator[tuple[Refusing, str]]:
    worker = Refusing()

    def add(app: Any) -> None:
        install(app, worker.context())
        install_requests(app, Asking(templates=Templates(), rates=Rates(per_second=1_000), new_key_seconds=0.2))

    async with served(add) as url:
        yield worker, url


async def post(url: str, user: str) -> tuple[int, dict[str, str]]:
    headers = {"Authorization": f"Bearer {issue(TOKEN_KEY, user_id=None)}"}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/notifications", json=a_request(user), headers=headers) as answer:
        return answer.status, dict(answer.headers)


async def test_when_kafka_does_not_take_it_the_answer_is_to_come_back(refusing: tuple[Refusing, str]) -> None:
    worker, url = refusing
    worker.refused = NotificationRequested
    status, headers = await post(url, "user-1")
    assert (status, int(headers["Retry-After"]) > 0) == (503, True)
    worker.refused = None
    assert (await post(url, "user-1"))[0] == 202


async def test_without_a_key_in_time_nothing_is_published_in_plain_words(refusing: tuple[Refusing, str]) -> None:
    worker, url = refusing
    assert (await post(url, "nobody-knows"))[0] == 503
    assert [(topic, type(message)) for topic, _, message in worker.published] == [(topics.COMMANDS, Command)]


# ---- the command line


def test_what_is_sent_from_the_command_line_is_sealed_and_arrives(running: System) -> None:
    running.load_preferences(people("sent"))
    done = running.notify("send", "--user", "sent", "--title", "Hello", "--message", f"{WORDS}, Ada")
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip()
    wait_for(lambda: running.mails()[f"{found}-email"] == 1, seconds=30, what="the mail")
    assert not [message for message in running.read("requests.normal") if WORDS.encode() in (message.value() or b"")]


def test_an_unknown_action_of_a_user_is_the_decision_that_no_rule_matched(running: System) -> None:
    line = {"actionId": "act-2", "userId": "dancer", "action": "danced", "occurredAt": datetime.now(UTC).isoformat()}
    assert running.notify("produce", "actions", "-", stdin=json.dumps(line)).returncode == 0
    wait_for(lambda: "no_rule_matched: user-actions: danced" in running.notify("why", "dancer", "act-2").stdout, seconds=30, what="why")


def test_a_password_reset_reaches_the_mailbox_by_the_critical_lane(running: System) -> None:
    running.load_preferences(people("locked-out"))
    line = {
        "actionId": "act-1",
        "userId": "locked-out",
        "action": "password_reset_requested",
        "data": {"code": "481 205", "expiresInMinutes": "15"},
        "occurredAt": datetime.now(UTC).isoformat(),
    }
    done = running.notify("produce", "actions", "-", stdin=json.dumps(line))
    assert done.returncode == 0, done.stderr
    found = notification_id(producer="user-actions", event_id="act-1", rule="password_reset", user_id="locked-out")
    wait_for(lambda: running.mails()[f"{found}-email"] == 1, seconds=30, what="the mail")
    (record,) = decisions(running, found)
    assert (record.lane, record.outcome, [choice.channel for choice in record.channels]) == ("critical", "notified", ["email", "sms"])
    title = wait_for(lambda: running.web(f"/notifications/{found}", user="locked-out")[1], seconds=20, what="the page")
    assert "481" not in json.dumps(title)


# ---- watches


def test_a_user_watches_a_product_and_stops_and_repeating_it_changes_nothing(running: System) -> None:
    key = b"product:prod 7/x\0watcher"
    for _ in range(2):
        status, _, answer = running.ask("/users/watcher/watches/prod%207%2Fx", user="watcher", method="PUT")
        assert (status, answer) == (202, {"userId": "watcher", "productId": "prod 7/x", "isWatched": True})
    wait_for(lambda: key in watches(running), seconds=20, what="the watch")
    for _ in range(2):
        assert running.ask("/users/watcher/watches/prod%207%2Fx", method="DELETE")[0] == 202  # a service may, too
    wait_for(lambda: key not in watches(running), seconds=20, what="no watch any more")


def test_nobody_watches_for_somebody_else_and_ids_have_bounds(running: System) -> None:
    assert running.ask("/users/watcher/watches/p", user="somebody-else", method="PUT")[0] == 404
    assert running.ask(f"/users/watcher/watches/{'p' * 201}", user="watcher", method="PUT")[2]["parameter"] == "productId"
    assert running.ask("/users/watcher/watches/a%0Ab", user="watcher", method="PUT")[2]["parameter"] == "productId"
    assert running.ask(f"/users/{'u' * 201}/watches/p", method="PUT")[2]["parameter"] == "userId"
    assert running.ask("/users/watcher/watches/p", user="watcher", method="POST")[0] == 405


def test_the_command_line_waits_until_the_router_has_a_watch_and_says_what_was_so_before(running: System) -> None:
    done = running.notify("watch", "shopper", "prod_1129", "--json")
    assert (done.returncode, json.loads(done.stdout)["isChanged"]) == (0, True), done.stderr
    assert b"product:prod_1129\0shopper" in watches(running)
    assert "watches already" in running.notify("watch", "shopper", "prod_1129").stderr
    assert running.notify("watch", "shopper", "--warehouse", "wh_east_01").returncode == 0
    assert b"warehouse:wh_east_01\0shopper" in watches(running)
    done = running.notify("watch", "shopper", "prod_1129", "--remove")
    assert "watches no more" in done.stderr
    assert b"product:prod_1129\0shopper" not in watches(running)
    assert running.notify("watch", "shopper").returncode == 2


def test_a_watch_that_the_router_refuses_is_told_with_its_reason(running: System) -> None:
    done = running.notify("watch", "shopper", "p" * 300)
    assert done.returncode == 1
    assert "The router refused: audience" in done.stderr
