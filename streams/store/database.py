"""Connections to PostgreSQL, and what its errors mean. The only module that knows how it is reached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from schemas.errors import DatabaseUnavailableError, RefusedValueError

CONNECT_SECONDS = 5.0
# what the server may take over one statement; the client waits a little longer, for a server that does not answer
STATEMENT_SECONDS = 10.0
LOCK_SECONDS = 5.0
# a transaction of a process that was frozen ends on its own: nobody waits for its locks longer
IDLE_SECONDS = 15.0
# SQLSTATE classes that say no to a value, at every try: data exception, program limit exceeded
_REFUSED_CLASSES = ("22", "54")


class Database:
    """A pool of connections. Connects when first used.

    `statement_seconds` 0: statements, and waiting for locks, may take as long as they like. `transaction_seconds` bounds a
    whole transaction, None: nothing does.
    """

    def __init__(
        self,
        url: str,
        *,
        application: str,
        connections: int,
        statement_seconds: float = STATEMENT_SECONDS,
        transaction_seconds: float | None = None,
    ) -> None:
        self._transaction_seconds = transaction_seconds
        self._options: dict[str, Any] = {
            "dsn": url,
            "timeout": CONNECT_SECONDS,
            "command_timeout": statement_seconds + 2 if statement_seconds else None,
            "server_settings": {
                "application_name": application,
                "statement_timeout": _milliseconds(statement_seconds),
                "lock_timeout": _milliseconds(LOCK_SECONDS if statement_seconds else 0),
                "idle_in_transaction_session_timeout": _milliseconds(IDLE_SECONDS if statement_seconds else 0),
                "timezone": "UTC",
                "jit": "off",  # compiling costs more than these statements take
            },
        }
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connect,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=transaction_seconds or STATEMENT_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
        )

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        # asyncpg reads the URL itself: it knows sslmode and its like, as libpq does
        return await asyncpg.connect(**self._options)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction, committed at the end. Raises DatabaseUnavailableError, RefusedValueError; it is rolled back then."""
        try:
            async with asyncio.timeout(self._transaction_seconds), self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:  # TimeoutError included
            raise _translated(error) from error

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _translated(error: BaseException) -> DatabaseUnavailableError | RefusedValueError:
    """Return what the caller should know. The text of the server is left out: it may quote a value."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    state = str(getattr(cause, "sqlstate", None) or "")
    name = type(cause.__cause__ or cause).__name__
    if state[:2] in _REFUSED_CLASSES:
        return RefusedValueError(f"PostgreSQL refuses a value: {name}, SQLSTATE {state}")
    return DatabaseUnavailableError(f"{name}{f', SQLSTATE {state}' if state else ''}", state=state)
