"""The role store as it runs: the rows of the views' tables, whatever dies, and pages beyond what the tables keep."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from agents.inbox import SHELF_SIZES, Inbox, Notification, Shelf, after_decision, after_status
from schemas import topics
from schemas.codec import Codec
from schemas.messages import DecisionRecord, Message, NotificationRequested
from streams.embedded.stack import Stack
from streams.registry import Registry
from streams.tokens import issue
from streams.topology import all_topics
from streams.transport.admin import learn_leaders
from tests.harness import System, WorkerProcess, system, wait_for
from tests.stories import START, Record, a_story, an_id

SECONDS = 60


@pytest.fixture
def world(stack: Stack, tmp_path: Path) -> Iterator[System]:
    with system(stack, tmp_path) as made:
        made.use_database()
        yield made


@pytest.fixture
def codec(world: System, tmp_path: Path) -> Codec:
    async def registered() -> Codec:
        registry = Registry(world.stack.registry, tmp_path / "codec")
        try:
            return await registry.codec(world.name, all_topics())
        finally:
            await registry.close()

    return asyncio.run(registered())


def ask(world: System, query: str) -> list[tuple[Any, ...]]:
    async def fetch() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(world.variables["NOTIFY_POSTGRES_URL"])
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return asyncio.run(fetch())


def stored(world: System) -> dict[str, bytes]:
    """Return the rows of PostgreSQL, none while there are no tables; each id once."""
    try:
        found = ask(world, "SELECT notification_id, document FROM notification")
    except asyncpg.UndefinedTableError:
        return {}
    assert len(dict(found)) == len(found), "an id has two rows"
    return dict(found)


def in_table(world: System) -> dict[str, bytes]:
    return {key.decode(): value for key, value in world.table("views.project", "notifications").items()}


def listed(world: System, user: str) -> list[str]:
    """Return the ids on the shelf inbox of a user's row in the table."""
    return [each for _, each in Inbox.decode(world.table("views.project", "inbox").get(user.encode())).listed()]


# by environment and id: what was published of each notification, merged
_told: dict[str, dict[str, Notification]] = {}


def publish(world: System, codec: Codec, records: Iterable[Record]) -> None:
    """Write decisions and statuses into the log, as router and senders do."""
    by_topic: dict[str, list[tuple[bytes, bytes]]] = {topics.DECISIONS: [], topics.STATUS: []}
    rows = _told.setdefault(world.name, {})
    for record in records:
        row = rows.get(record.notification_id)
        merged = after_decision(row, record) if isinstance(record, DecisionRecord) else after_status(row, record)
        assert merged is not None
        rows[record.notification_id] = merged
        topic = topics.DECISIONS if isinstance(record, DecisionRecord) else topics.STATUS
        by_topic[topic].append((record.user_id.encode(), codec.encode(record)))
    for topic, values in by_topic.items():
        world.produce(topic, values)


def stories(users: Sequence[str], each: int, *, first: int = 0) -> list[Record]:
    told: list[Record] = []
    for number in range(first, first + each):
        for user in users:
            decision, changes = a_story(f"e{number}", user, at=START + timedelta(minutes=number), is_read=number % 3 == 0)
            told += [decision, *changes]
    return told


def await_rows(world: System, count: int, worker: WorkerProcess) -> None:
    """Wait until PostgreSQL has everything that was published, of `count` notifications, and nothing else."""
    expected = {notification: row.encode() for notification, row in _told[world.name].items()}
    assert len(expected) == count
    wait_for(lambda: stored(world) == expected, seconds=SECONDS, what=f"{count} rows in PostgreSQL\n{worker.log_text()[-2000:]}")


def held(worker: WorkerProcess) -> list[str]:
    details = json.loads(worker.get("/health/ready")[1] or b"{}").get("details", {})
    return list(details.get("held", []))


def users(count: int) -> list[str]:
    return [f"user-{number}" for number in range(count)]


# ---- the same rows


def test_postgresql_has_the_rows_of_the_views_table_and_sets_aside_what_they_set_aside(world: System, codec: Codec) -> None:
    views, store = world.start("views"), world.start("store")
    records = stories(users(8), 6)
    publish(world, codec, records[::-1])  # statuses before their decisions, in part
    world.produce(topics.STATUS, [(b"user-1", b"no message of ours"), (b"user-1", codec.encode(_of_somebody_else(records)))])
    publish(world, codec, stories(users(8), 2, first=6))
    await_rows(world, 64, store)
    wait_for(lambda: in_table(world) == stored(world), seconds=SECONDS, what="the same rows in both")
    assert ask(world, "SELECT status, count(*) FROM delivery GROUP BY 1 ORDER BY 1") == [("delivered", 64), ("sent", 64)]
    assert ask(world, "SELECT is_read, count(*) FROM notification GROUP BY 1 ORDER BY 1") == [(False, 40), (True, 24)]

    def set_aside() -> Counter[tuple[bytes, bytes]]:
        headers = [dict(record.headers() or ()) for record in world.read(topics.DEAD)]
        return Counter((each["role"], each["error"]) for each in headers)

    expected = {(role, error): 1 for role in (b"views", b"store") for error in (b"undecodable", b"invalid_event")}
    wait_for(lambda: set_aside() == expected, seconds=SECONDS, what="each bad record set aside once by each of the two")
    assert views.exits == store.exits == []


def _of_somebody_else(records: Sequence[Record]) -> Message:
    change = next(record for record in records if not isinstance(record, DecisionRecord))
    return type(change)(**{name: getattr(change, name) for name in change.__slots__} | {"user_id": "somebody"})


def test_a_value_that_postgresql_refuses_is_set_aside_alone(world: System, codec: Codec) -> None:
    store = world.start("store")
    publish(world, codec, stories(["user-1"], 3))
    await_rows(world, 3, store)
    ask(world, "ALTER TABLE notification ALTER COLUMN producer TYPE varchar(8)")
    good = stories(["user-1"], 40, first=3)
    bad = next(record for record in good if isinstance(record, DecisionRecord))
    wrong = type(bad)(**{name: getattr(bad, name) for name in bad.__slots__} | {"producer": "somebody far too long"})
    world.produce(topics.DECISIONS, [(wrong.user_id.encode(), codec.encode(wrong))])
    publish(world, codec, [record for record in good if record is not bad])
    await_rows(world, 43, store)
    assert [dict(record.headers() or ())["error"] for record in world.read(topics.DEAD)] == [b"refused_value"]
    assert ask(world, "SELECT count(*) FROM notification WHERE shelf = 'pending'") == [(1,)]


# ---- what dies


def test_a_store_killed_on_its_way_loses_and_doubles_nothing(world: System, codec: Codec) -> None:
    store = world.start("store")
    world.await_ready(store)
    # no user has more than the views' table keeps, so that all can be compared
    lives, each = 4, 15
    for life in range(lives):
        publish(world, codec, stories(users(40), each, first=each * life))
        wait_for(partial(_has_more_than, world, 40 * each * life), seconds=SECONDS, what="some of them stored")
        store.kill()
    publish(world, codec, stories(users(40), each, first=each * lives))
    await_rows(world, 40 * each * (lives + 1), store)
    assert store.exits == [-9] * lives
    views = world.start("views")
    world.await_ready(views)
    wait_for(lambda: in_table(world) == stored(world), seconds=SECONDS, what="the views have the same rows")
    assert ask(world, "SELECT count(*) FROM delivery") == [(2 * 40 * each * (lives + 1),)]


def _has_more_than(world: System, count: int) -> bool:
    return len(stored(world)) > count


@pytest.mark.parametrize(("how", "seconds"), [("killed", 10), ("frozen", 0)])
def test_while_postgresql_is_away_sending_and_queries_go_on_and_the_projection_catches_up(
    world: System, codec: Codec, how: str, seconds: float
) -> None:
    workers = [world.start(role) for role in ("router", "sender-normal", "views", "store")]
    store = world.workers["store-a"]
    world.await_ready(*workers)
    send(world, codec, 0, 20)
    wait_for(lambda: len(stored(world)) == 20, seconds=SECONDS, what="the first ones stored")
    server = world.stack.postgres_process
    assert server is not None
    away(server, how)
    over = time.monotonic() + seconds
    try:
        for begin in range(20, 120, 20):
            send(world, codec, begin, begin + 20)
            wait_for(partial(_are_in_table, world, begin + 20), seconds=SECONDS, what="decided and projected")
        wait_for(lambda: _delivered(world) == 120, seconds=SECONDS, what="all delivered while PostgreSQL is away")
        wait_for(lambda: held(store) == ["postgres"], seconds=SECONDS, what="the pause shown in the health details")
        wait_for(lambda: store.metric("notify_store_paused_partitions") >= 1, seconds=SECONDS, what="the pause in the metrics")
        assert world.web("/users/user-1/notifications", user="user-1")[0] == 200
        status, problem = world.web(f"/notifications/{an_id('unknown', 'user-1')}", user="user-1")
        assert (status, "PostgreSQL" in problem["detail"]) == (503, True)
        assert world.workers["views-a"].is_ready()
        assert store.get("/health/live")[0] == 200
        wait_for(lambda: time.monotonic() > over, seconds=seconds + 1, what="the end of the outage")
    finally:
        back(server, how)
    wait_for(lambda: in_table(world) == stored(world), seconds=SECONDS, what="caught up by itself")
    wait_for(lambda: held(store) == [], seconds=SECONDS, what="the pause is over")
    assert store.exits == []
    text = store.log_text()
    # told once, not at every try of every partition; on a busy machine an answer may be slow again afterwards
    assert 1 <= text.count("store.paused") == text.count("store.resumed") <= 3
    assert world.web(f"/notifications/{an_id('unknown', 'user-1')}", user="user-1")[0] == 404


def _are_in_table(world: System, count: int) -> bool:
    return len(in_table(world)) == count


def away(server: Any, how: str) -> None:
    if how == "killed":
        asyncio.run(server.kill())
    else:
        _signal_all(server, 19)  # SIGSTOP


def back(server: Any, how: str) -> None:
    if how == "killed":
        asyncio.run(server.start())
    else:
        _signal_all(server, 18)  # SIGCONT


def _signal_all(server: Any, number: int) -> None:
    import psutil

    postmaster = psutil.Process(server.pid)
    for process in (postmaster, *postmaster.children()):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that wakes up may find its client gone, and end
            process.send_signal(number)


def send(world: System, codec: Codec, first: int, end: int) -> None:
    """Ask for notifications, as other services do."""
    requests = [
        NotificationRequested(
            event_id=f"asked-{number}",
            producer="tests",
            rule="message",
            user_id=f"user-{number % 7}",
            data={"title": f"Title {number}", "message": "Hello"},
            occurred_at=START,
        )
        for number in range(first, end)
    ]
    world.produce(topics.requests("normal"), [(each.user_id.encode(), codec.encode(each)) for each in requests])


def _delivered(world: System) -> int:
    rows = (Notification.decode(raw) for raw in in_table(world).values())
    return sum(any(state.delivered_at for state in row.deliveries.values()) for row in rows)


# ---- pages


def page(world: System, path: str) -> tuple[int, Any, str | None]:
    """Return status, body, and the path of the next page."""
    token = issue(world.settings.token_key, user_id="user-1")
    port = world.workers["views-a"].port
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            link = answer.headers.get("Link")
            assert link is None or link.endswith('>; rel="next"')
            return answer.status, json.loads(answer.read()), link and link[1:].partition(">")[0]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), None


def ids_of(body: Any) -> list[str]:
    return [each["notificationId"] for each in body["notifications"]]


def test_250_notifications_are_paged_through_with_and_without_a_cursor(world: System, codec: Codec) -> None:
    count, inbox = 250, "/users/user-1/notifications"
    # five share a moment: the id decides
    records: list[Record] = []
    for number in range(count):
        decision, changes = a_story(f"e{number}", "user-1", at=START + timedelta(minutes=number // 5), is_read=number % 2 == 0)
        records += [decision, *changes]
    publish(world, codec, records)
    world.await_ready(world.start("views"), world.start("store"))
    await_rows(world, count, world.workers["store-a"])
    wait_for(lambda: len(listed(world, "user-1")) == SHELF_SIZES[Shelf.INBOX], seconds=SECONDS, what="the table holds its newest")
    expected = sorted((START + timedelta(minutes=number // 5), an_id(f"e{number}", "user-1")) for number in range(count))[::-1]
    newest_first = [notification for _, notification in expected]

    by_cursor: list[str] = []
    following: str | None = f"{inbox}?limit=30"
    sizes = []
    while following is not None:
        status, body, following = page(world, following)
        assert status == 200
        by_cursor += ids_of(body)
        sizes.append(len(body["notifications"]))
    assert by_cursor == newest_first
    assert sizes == [30] * 8 + [10]

    by_offset = [each for offset in range(0, count, 50) for each in ids_of(page(world, f"{inbox}?limit=50&offset={offset}")[1])]
    assert by_offset == newest_first
    assert ids_of(page(world, f"{inbox}?limit=20&offset=90")[1]) == newest_first[90:110]  # across the table's end
    assert ids_of(page(world, f"{inbox}?limit=200")[1]) == newest_first[:200]
    assert page(world, f"{inbox}?limit=50&offset=200")[2] is None
    unread = [an_id(f"e{number}", "user-1") for number in range(count) if number % 2]
    assert ids_of(page(world, f"{inbox}?status=unread&limit=200")[1]) == [each for each in newest_first if each in unread]
    # counted across the table's end
    assert world.web("/users/user-1/unread")[1] == {"userId": "user-1", "unread": len(unread), "isWhole": True}

    # a new one moves offsets, not cursors
    _, first, following = page(world, f"{inbox}?limit=100")
    assert following is not None
    decision, changes = a_story("newer", "user-1", at=START + timedelta(days=1))
    newer_id = decision.notification_id
    publish(world, codec, [decision, *changes])
    wait_for(lambda: ids_of(page(world, f"{inbox}?limit=1")[1]) == [decision.notification_id], seconds=SECONDS, what="the new one shown")
    assert ids_of(first) + ids_of(page(world, following)[1]) == newest_first[:200]

    # what only PostgreSQL has is explained and can be read as well
    oldest = next(each for each in newest_first[::-1] if each in unread)
    assert oldest not in listed(world, "user-1")
    assert world.web(f"/notifications/{oldest}", user="user-1")[1]["notificationId"] == oldest
    assert world.web(f"/notifications/{oldest}/trail", user="user-1")[1]["decision"]["outcome"] == "notified"
    assert world.web(f"/notifications/{oldest}", user="user-2")[0] == 404

    # while the store is away: the newest are shown all the same, and the pages after them go on in PostgreSQL
    world.stop(world.workers["store-a"])
    late: list[str] = []
    for number in range(60):
        decision, changes = a_story(f"late{number}", "user-1", at=START + timedelta(days=2, minutes=number))
        publish(world, codec, [decision, *changes])
        late.insert(0, decision.notification_id)
    wait_for(lambda: listed(world, "user-1")[:60] == late, seconds=SECONDS, what="the table holds the late ones")
    newer = [*late, newer_id]
    _, first, following = page(world, f"{inbox}?limit=200")
    assert (ids_of(first), following is not None) == ([*newer, *newest_first][:100], True)
    assert ids_of(page(world, str(following))[1]) == [*newer, *newest_first][100:300]
    assert ids_of(page(world, f"{inbox}?limit=50&offset=120")[1]) == [*newer, *newest_first][120:170]
    _, first, following = page(world, f"{inbox}?status=unread&limit=200")
    expected_unread = [*newer, *(each for each in newest_first if each in unread)]
    assert ids_of(first) == [each for each in expected_unread if each in listed(world, "user-1")]
    assert ids_of(first) + ids_of(page(world, str(following))[1]) == expected_unread

    for wrong in ("cursor=x", "cursor=1-2", f"cursor=1-{oldest}&offset=5", "cursor=999999999999999-" + oldest):
        assert page(world, f"{inbox}?{wrong}")[0] == 400


def test_without_a_database_pages_end_with_the_table_and_say_so(world: System, codec: Codec) -> None:
    publish(world, codec, stories(["user-1"], 120))
    del world.variables["NOTIFY_POSTGRES_URL"]
    world.await_ready(world.start("views"))
    inbox = "/users/user-1/notifications"
    wait_for(lambda: len(listed(world, "user-1")) == SHELF_SIZES[Shelf.INBOX], seconds=SECONDS, what="the table holds its newest")
    status, body, following = page(world, f"{inbox}?limit=200")
    assert (status, len(body["notifications"]), following) == (200, 100, None)
    status, problem, _ = page(world, f"{inbox}?limit=10&offset=100")
    assert (status, problem["detail"]) == (503, "older notifications are kept in PostgreSQL, which these views have not been given")
    assert world.web(f"/notifications/{an_id('e0', 'user-1')}", user="user-1")[0] == 404


# ---- rebuilding


def test_a_rebuild_gives_the_same_rows_while_the_store_runs(world: System, codec: Codec) -> None:
    store = world.start("store")
    publish(world, codec, stories(users(10), 30))
    await_rows(world, 300, store)
    before = sorted(ask(world, "SELECT notification::text FROM notification"))
    deliveries = sorted(ask(world, "SELECT delivery::text FROM delivery"))
    ask(
        world,
        "UPDATE notification SET document = convert_to(replace(convert_from(document, 'UTF8'), 'payment', 'nonsense'), 'UTF8'), lane = '?'",
    )
    ask(world, "DELETE FROM delivery WHERE status = 'sent'")
    ask(
        world,
        "INSERT INTO notification SELECT created_at, 'f' || substr(notification_id, 2), user_id, shelf, outcome, reason, rule, category, "
        "lane, type, event_id, producer, accepted_at, is_read, read_at, archived_at, clicked_at, document FROM notification LIMIT 1",
    )
    refused = world.notify("rebuild", "postgres")
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    done = world.notify("rebuild", "postgres", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"records": 1_600, "made": 300, "kept": 0, "passedOver": 0}
    assert sorted(ask(world, "SELECT notification::text FROM notification")) == before
    assert sorted(ask(world, "SELECT delivery::text FROM delivery")) == deliveries
    publish(world, codec, stories(users(10), 1, first=30))
    await_rows(world, 310, store)
    assert store.exits == []


def test_a_rebuild_keeps_what_is_older_than_the_log_and_says_so(world: System, codec: Codec) -> None:
    store = world.start("store")
    publish(world, codec, stories(users(4), 10))
    await_rows(world, 40, store)
    before = stored(world)
    for topic in (topics.DECISIONS, topics.STATUS):
        forget(world, topic)
    publish(world, codec, stories(users(4), 2, first=8))  # said again: of two the log holds everything
    done = world.notify("rebuild", "postgres", "--yes")
    assert done.returncode == 0, done.stderr
    assert "40 were kept" in done.stderr
    assert stored(world) == before


def forget(world: System, topic: str) -> None:
    """Delete every record that a topic has now, as retention does."""
    from confluent_kafka import TopicPartition

    name = world.topic(topic)
    ends = {record.partition(): record.offset() + 1 for record in world.read(topic)}
    asked = [TopicPartition(name, partition, end) for partition, end in ends.items()]
    learn_leaders(world.admin, [name])
    for future in world.admin.delete_records(asked).values():
        future.result()


def test_migrate_by_hand_says_what_it_did(world: System) -> None:
    first = world.notify("store", "migrate")
    assert (first.returncode, "they were of none" in first.stderr) == (0, True)
    again = world.notify("store", "migrate", "--json")
    assert json.loads(again.stdout) == {"before": "0001", "now": "0001", "dropped": []}
    away_for = partial(world.notify, "store", "migrate")
    world.variables["NOTIFY_POSTGRES_URL"] = "postgresql://nobody:word@127.0.0.1:9/notify"
    refused = away_for()
    assert (refused.returncode, "NOTIFY_POSTGRES_URL" in refused.stderr, "word" in refused.stderr) == (1, True, False)
