"""What the web reads from PostgreSQL: what is older than the tables of the views keep."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Select, func, select, tuple_

from agents.inbox import Notification, Shelf, moment_of
from schemas.errors import DatabaseUnavailableError
from streams.store.database import Database
from streams.store.rows import clean
from streams.store.tables import NOTIFICATION

CONNECTIONS = 4
# less than a worker waits for another one's answer; ending a connection to a server that hangs takes two more
ANSWER_SECONDS = 2.5
_NO_TABLE = "42P01"

_SHELF = Shelf.INBOX.name.lower()
_ROW = select(NOTIFICATION.c.notification_id, NOTIFICATION.c.document)


class History:
    """Notifications as PostgreSQL has them. It follows the log: what happened a moment ago may not be there yet."""

    def __init__(self, url: str, *, application: str) -> None:
        self._database = Database(
            url, application=application, connections=CONNECTIONS, statement_seconds=ANSWER_SECONDS, transaction_seconds=ANSWER_SECONDS
        )

    async def page(
        self, user_id: str, *, only_unread: bool, before: tuple[int, str] | None, offset: int, limit: int
    ) -> list[tuple[str, Notification]]:
        """Return (notification id, row) of a user's inbox, newest first, ids descending: the order of the table `inbox`.

        `before`: only what comes after this (milliseconds, notification id) of an earlier page. Raises
        DatabaseUnavailableError.
        """
        columns = NOTIFICATION.c
        wanted = _ROW.where(columns.user_id == clean(user_id), columns.shelf == _SHELF)
        if only_unread:
            wanted = wanted.where(~columns.is_read)
        if before is not None:
            place: tuple[datetime, str] = (moment_of(before[0]), before[1])
            wanted = wanted.where(tuple_(columns.created_at, columns.notification_id) < place)
        wanted = wanted.order_by(columns.created_at.desc(), columns.notification_id.desc()).offset(offset).limit(limit)
        # two absurd user ids may be cut to the same text
        return [each for each in await self._rows(wanted) if each[1].user_id == user_id]

    async def unread(self, user_id: str, *, upto: tuple[int, str]) -> int:
        """Return how many unread ones of a user's inbox are at (milliseconds, notification id) or after it in its order.

        Raises DatabaseUnavailableError.
        """
        columns = NOTIFICATION.c
        place: tuple[datetime, str] = (moment_of(upto[0]), upto[1])
        wanted = (
            select(func.count())
            .select_from(NOTIFICATION)
            .where(columns.user_id == clean(user_id), columns.shelf == _SHELF, ~columns.is_read)
            .where(tuple_(columns.created_at, columns.notification_id) <= place)
        )
        try:
            async with self._database.begin() as connection:
                return int((await connection.execute(wanted)).scalar_one())
        except DatabaseUnavailableError as error:
            if error.state == _NO_TABLE:
                return 0
            raise

    async def find(self, notification_id: str) -> Notification | None:
        """Return a notification by its id, None when there is none. Raises DatabaseUnavailableError."""
        found = await self._rows(_ROW.where(NOTIFICATION.c.notification_id == notification_id))
        return found[0][1] if found else None

    async def _rows(self, wanted: Select[str, bytes]) -> list[tuple[str, Notification]]:
        try:
            async with self._database.begin() as connection:
                rows = await connection.execute(wanted)
                return [(notification_id, Notification.decode(document)) for notification_id, document in rows]
        except DatabaseUnavailableError as error:
            if error.state == _NO_TABLE:  # no store has run yet: there is no history
                return []
            raise

    async def close(self) -> None:
        """Close every connection."""
        await self._database.close()
