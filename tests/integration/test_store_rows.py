"""Rows in a real PostgreSQL: equal to the table's whatever the order, never doubled by writers beside each other, dropped by month."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from agents import inbox
from agents.inbox import INBOX, NOTIFICATIONS, Notification
from agents.ports import KnownSource
from schemas.errors import DatabaseUnavailableError, RefusedValueError, SettingsError
from schemas.ids import partition_of, partition_of_notification
from schemas.messages import DecisionRecord
from schemas.status import Engagement, Status
from streams.embedded.postgres import PostgresServer
from streams.embedded.processes import choose_port
from streams.store.database import Database
from streams.store.history import History
from streams.store.migrate import FOLDER, HEAD, migrate
from streams.store.months import MONTHS_AHEAD, MONTHS_BACK, Month, keep_months
from streams.store.rows import TEXT_CHARACTERS, Kept, count, keep, remove
from streams.store.tables import is_part, metadata
from tests.stories import START, Record, a_change, a_decision, a_story, an_engagement, an_id

USER = "user-1"
PARTITION, PARTITIONS = 1, 3
SOURCE = KnownSource(topic="status", partition=0, offset=0, at=START)
MakeUrl = Callable[[], str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    running = PostgresServer(tmp_path_factory.mktemp("postgres") / "postgres", port=choose_port(), env=os.environ)
    asyncio.run(running.start())
    yield running
    asyncio.run(running.stop())


@pytest.fixture
def url(server: PostgresServer) -> str:
    return server.make_database(f"t{uuid4().hex}")


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """Give a database with the tables of this release."""
    made = Database(url, application="test", connections=4)
    await migrate(made, kept_months=1_200)
    yield made
    await made.close()


async def kept(database: Database, records: Sequence[Record]) -> Kept:
    async with database.begin() as connection:
        return await keep(connection, PARTITION, records)


async def rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    async with database.begin() as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


async def stored(database: Database) -> dict[str, bytes]:
    found = await rows(database, "SELECT notification_id, document FROM notification")
    assert len(dict(found)) == len(found), "an id has two rows"
    return dict(found)


def projected(records: Sequence[Record]) -> dict[str, bytes]:
    """Return the rows that the views' table would have."""
    tables: dict[str, dict[bytes, bytes]] = {NOTIFICATIONS: {}, INBOX: {}}
    for record in records:
        decide: Any = inbox.decide_decision if isinstance(record, DecisionRecord) else inbox.decide_status
        for row in decide(record, SOURCE, tables).rows:
            tables[row.table][row.key] = row.value
    return {key.decode(): value for key, value in tables[NOTIFICATIONS].items()}


def told(event: str = "e1", user: str = USER, **more: Any) -> list[Record]:
    decision, changes = a_story(event, user, **more)
    return [decision, *changes]


# ---- merging


async def test_a_row_is_the_tables_row_and_its_columns_say_the_same(database: Database) -> None:
    records = told(is_read=True)
    await kept(database, records)
    assert await stored(database) == projected(records)
    shown = await rows(database, "SELECT created_at, user_id, shelf, outcome, event_id, lane, is_read, read_at FROM notification")
    assert shown == [(START, USER, "inbox", "notified", "e1", "normal", True, START + timedelta(minutes=1))]
    assert await rows(database, "SELECT channel, status, attempt, provider FROM delivery ORDER BY channel") == [
        ("email", "sent", 1, "smtp"),
        ("in_app", "delivered", 1, None),
    ]


async def test_a_batch_that_is_replayed_writes_nothing(database: Database) -> None:
    records = told("e1") + told("e2", is_read=True)
    await kept(database, records)
    versions = "SELECT xmin::text, ctid::text FROM notification UNION ALL SELECT xmin::text, ctid::text FROM delivery ORDER BY 1, 2"
    before = await rows(database, versions)
    again = await kept(database, records)
    assert (again.notifications, again.deliveries, dict(again.outcomes)) == (0, 0, {"unchanged": len(records)})
    assert await rows(database, versions) == before


async def test_a_status_read_before_its_decision_moves_to_the_decisions_month(database: Database) -> None:
    decision, changes = a_story("e1", USER, at=START)
    late = a_change("e1", USER, Status.BOUNCED, channel="email", at=START + timedelta(days=40))
    await kept(database, [*changes, late])
    assert await rows(database, "SELECT shelf, outcome, created_at FROM notification") == [("pending", None, late.at)]
    await kept(database, [decision])
    assert await stored(database) == projected([*changes, late, decision])
    assert await rows(database, "SELECT shelf, outcome, created_at FROM notification") == [("inbox", "notified", START)]
    assert await rows(database, "SELECT created_at, status FROM delivery ORDER BY status") == [(START, "bounced"), (START, "delivered")]


_users = st.sampled_from(["user-1", "user-1\0", "ü" * 600])
_records = st.one_of(
    st.builds(
        a_change,
        st.sampled_from(["e1", "e2"]),
        _users,
        st.sampled_from(list(Status)),
        channel=st.sampled_from(["in_app", "email"]),
        attempt=st.integers(0, 2),
        generation=st.integers(0, 1),
        at=st.integers(0, 90).map(lambda days: START + timedelta(days=days)),
        reason=st.sampled_from([None, "refused", "a\0b"]),
    ),
    st.builds(an_engagement, st.sampled_from(["e1", "e2"]), _users, st.sampled_from(list(Engagement))),
    st.builds(
        a_decision,
        st.sampled_from(["e1", "e2"]),
        _users,
        at=st.integers(0, 90).map(lambda days: START + timedelta(days=days)),
        outcome=st.sampled_from(["notified", "skipped"]),
        event_id=st.just("x" * 5_000),
    ),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_records, max_size=30), st.randoms(use_true_random=False), st.integers(1, 7))
def test_any_order_in_any_batches_ends_in_the_tables_rows(server: PostgresServer, records: list[Record], random: Any, size: int) -> None:
    shuffled = [*records, *records]
    random.shuffle(shuffled)

    async def play() -> tuple[dict[str, bytes], list[tuple[Any, ...]]]:
        database = Database(server.make_database("shuffled"), application="test", connections=1)
        try:
            await migrate(database, kept_months=1_200)
            await rows(database, "DELETE FROM notification RETURNING 1")
            await rows(database, "DELETE FROM delivery RETURNING 1")
            for begin in range(0, len(shuffled), size):
                await kept(database, shuffled[begin : begin + size])
            return await stored(database), await rows(database, "SELECT created_at, notification_id, delivery_id FROM delivery")
        finally:
            await database.close()

    found, deliveries = asyncio.run(play())
    assert found == projected(records)
    assert sorted(deliveries) == sorted(
        (inbox.moment_of(row.place[1]), notification, delivery)
        for notification, row in ((each, Notification.decode(raw)) for each, raw in found.items())
        for delivery in row.deliveries
    )


async def test_writers_beside_each_other_lose_and_double_nothing(database: Database) -> None:
    records = [record for number in range(30) for record in told(f"e{number}", at=START + timedelta(days=number))]
    # an owner that was fenced and does not know it, its successor, and a rebuild: everybody with his own batches
    parts = [records[begin::7] for begin in range(7)] + [records[begin::3] for begin in range(3)]
    await asyncio.gather(*(kept(database, part) for part in parts))
    assert await stored(database) == projected(records)
    assert len(await rows(database, "SELECT 1 FROM delivery")) == 60


async def test_what_is_no_record_of_this_user_is_refused_and_its_neighbours_are_stored(database: Database) -> None:
    stranger = a_change("e1", USER)
    wrong = type(stranger)(**{name: getattr(stranger, name) for name in stranger.__slots__} | {"user_id": "somebody"})
    done = await kept(database, [*told("e1"), wrong, *told("e2")])
    assert [(number, error.reason) for number, error in done.refused] == [(5, "invalid_event")]
    assert await stored(database) == projected([*told("e1"), *told("e2")])


async def test_texts_that_postgresql_would_refuse_are_stored_whole_in_the_document(database: Database) -> None:
    user = "u\0" + "ü" * 3_000
    decision = a_decision("e1", user, event_id="e\0" + "x" * 10_000)
    await kept(database, [decision, a_change("e1", user, reason="\0")])
    ((shown_user, shown_event),) = await rows(database, "SELECT user_id, event_id FROM notification")
    assert (len(shown_user), len(shown_event)) == (TEXT_CHARACTERS, TEXT_CHARACTERS)
    (document,) = (await stored(database)).values()
    row = Notification.decode(document)
    assert row.user_id == user
    assert row.decision is not None
    assert row.decision["eventId"] == decision.event_id


# ---- reading


async def test_pages_are_in_the_inboxes_order_and_hold_one_users(database: Database, url: str) -> None:
    records = [record for n in range(12) for record in told(f"e{n}", at=START + timedelta(minutes=n // 3), is_read=n % 2 == 0)]
    await kept(database, [*records, *told("e1", "user-2"), a_decision("e99", USER, outcome="skipped")])
    tables: dict[str, dict[bytes, bytes]] = {NOTIFICATIONS: {}, INBOX: {}}
    for record in records:
        decide: Any = inbox.decide_decision if isinstance(record, DecisionRecord) else inbox.decide_status
        for row in decide(record, SOURCE, tables).rows:
            tables[row.table][row.key] = row.value
    listed = inbox.Inbox.decode(tables[INBOX][USER.encode()]).listed()
    history = History(url, application="test")
    try:
        whole = await history.page(USER, only_unread=False, before=None, offset=0, limit=100)
        assert [(row.place[1], each) for each, row in whole] == listed
        later = await history.page(USER, only_unread=False, before=listed[4], offset=1, limit=3)
        assert [each for each, _ in later] == [each for _, each in listed[6:9]]
        unread = await history.page(USER, only_unread=True, before=None, offset=0, limit=100)
        assert len(unread) == 6
        assert not any(row.engaged.is_read for _, row in unread)
        found = await history.find(an_id("e3", USER))
        assert found is not None
        assert found.encode() == projected(records)[an_id("e3", USER)]
        assert await history.find("0" * 32) is None
    finally:
        await history.close()


async def test_the_views_need_no_more_than_to_read_one_table(database: Database, url: str) -> None:
    await kept(database, told())
    name = f"reader_{uuid4().hex}"
    async with database.begin() as connection:
        await connection.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD 'word'"))
        await connection.execute(text(f"GRANT SELECT ON notification TO {name}"))
    history = History(f"postgresql://{name}:word@{url.partition('@')[2]}", application="test")
    assert len(await history.page(USER, only_unread=False, before=None, offset=0, limit=5)) == 1
    assert await history.find(an_id("e1", USER)) is not None
    await history.close()


async def test_before_any_store_ran_there_is_no_history(url: str) -> None:
    history = History(url, application="test")
    assert await history.page(USER, only_unread=False, before=None, offset=0, limit=5) == []
    assert await history.find("0" * 32) is None
    await history.close()


async def test_a_server_that_is_not_there_says_so_without_a_value_or_password() -> None:
    history = History(f"postgresql://me:secret-word@127.0.0.1:{choose_port()}/x", application="test")
    with pytest.raises(DatabaseUnavailableError) as caught:
        await history.page("user-with-a-name", only_unread=False, before=None, offset=0, limit=5)
    assert "secret-word" not in str(caught.value)
    assert "user-with-a-name" not in str(caught.value)
    await history.close()


async def test_a_refused_value_is_told_from_a_server_that_is_away(database: Database) -> None:
    async with database.begin() as connection:
        await connection.execute(text("ALTER TABLE notification ALTER COLUMN rule TYPE varchar(3)"))
    with pytest.raises(RefusedValueError, match="22001"):
        await kept(database, told())


# ---- rebuilding


async def test_what_is_removed_is_one_partitions_from_a_moment_on(database: Database) -> None:
    for user in (f"user-{number}" for number in range(9)):
        for number in range(4):
            await kept(database, told(f"e{number}", user, at=START + timedelta(days=number)))
    everything = await stored(database)
    partition = partition_of(USER.encode(), PARTITIONS)
    here = {each for each in everything if partition_of_notification(each, PARTITIONS) == partition}
    assert set() < here < set(everything)
    async with database.begin() as connection:
        assert await count(connection, partition, partitions=PARTITIONS) == len(here)
        await remove(connection, partition, partitions=PARTITIONS, since=START + timedelta(days=2))
    left = await stored(database)
    since = inbox.millis(START + timedelta(days=2))
    assert set(everything) - set(left) == {each for each in here if Notification.decode(everything[each]).place[1] >= since}


# ---- migrations and months


async def test_migrations_from_empty_make_what_the_models_say(database: Database) -> None:
    def difference(connection: Connection) -> Any:
        options = {"include_object": lambda _o, name, kind, *_: kind != "table" or not is_part(name or ""), "compare_type": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    async with database.begin() as connection:
        assert await connection.run_sync(difference) == []


def test_the_newest_migration_is_the_one_that_workers_expect() -> None:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


async def test_workers_that_start_together_migrate_once(url: str) -> None:
    databases = [Database(url, application="test", connections=1) for _ in range(4)]
    found = await asyncio.gather(*(migrate(each, kept_months=13) for each in databases))
    assert sorted(str(revision) for revision, _ in found) == [HEAD] * 3 + ["None"]
    for each in databases:
        await each.close()


async def test_tables_of_a_newer_release_stop_the_worker_with_a_sentence(database: Database) -> None:
    async with database.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SettingsError, match="revision 9999"):
        await migrate(database, kept_months=13)


async def test_months_are_made_ahead_filed_into_and_dropped(url: str) -> None:
    database = Database(url, application="test", connections=1)
    names = "SELECT inhrelid::regclass::text FROM pg_inherits JOIN pg_class ON oid = inhparent WHERE relname = 'notification' ORDER BY 1"
    long_ago, now = datetime(2025, 11, 30, 23, 59, 59, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    try:
        await migrate(database, kept_months=1_200)
        await kept(database, [*told("e1", at=long_ago), *told("e2", at=now), *told("e3", at=datetime(9999, 12, 31, tzinfo=UTC))])
        assert await rows(database, "SELECT DISTINCT tableoid::regclass::text FROM notification") == [("notification_rest",)]
        before = await stored(database)
        async with database.begin() as connection:
            assert await keep_months(connection, kept=13, now=now) == []
        found = [name for (name,) in await rows(database, names)]
        assert {"notification_2025_11", "notification_2026_02", f"notification_2026_0{2 + MONTHS_AHEAD}"} <= set(found)
        assert Month(Month.of(now) - MONTHS_BACK).name == "2025_11"
        where = await rows(database, "SELECT tableoid::regclass::text, event_id FROM notification ORDER BY created_at")
        assert where == [("notification_2025_11", "e1"), ("notification_2026_02", "e2"), ("notification_rest", "e3")]
        assert await stored(database) == before
        async with database.begin() as connection:
            dropped = await keep_months(connection, kept=3, now=now)
        assert {"notification_2025_11", "delivery_2025_11"} <= set(dropped)
        assert [event for (event,) in await rows(database, "SELECT event_id FROM notification ORDER BY 1")] == ["e2", "e3"]
    finally:
        await database.close()


async def test_what_is_older_than_the_kept_months_is_swept_away(database: Database) -> None:
    await kept(database, told("e1", at=datetime(2020, 5, 1, tzinfo=UTC)))
    async with database.begin() as connection:
        await keep_months(connection, kept=1, now=START)
    assert await stored(database) == {}
