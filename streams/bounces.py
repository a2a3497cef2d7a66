"""Reads the mailbox that bounces and complaints come to (IMAP, RFC 3501), and publishes what they say.

A mail is removed only when its reports are durable: a crash in between publishes them again, and whoever matches reports
knows a repetition. What is not understood, or reports what nobody can prove, is moved aside or flagged, counted, and never removed.
"""

from __future__ import annotations

import asyncio
import imaplib
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from channels.bounces import read_reports
from channels.signing import BadSignatureError
from schemas.errors import InvalidEventError, ProviderUnavailableError
from schemas.messages import DeliveryReport
from streams.mailbox import Mailbox
from streams.metrics import Metrics

log = logging.getLogger(__name__)

_TURN_SECONDS: Final = 1.0  # between two looks whether it is our turn
LONGEST_WAIT_SECONDS: Final = 300.0
ASIDE: Final = "Not-understood"
_ANSWER_SECONDS: Final = 30.0
_BATCH_MAILS: Final = 50
# enough for any report; a mail that came back whole may end earlier
_MOST_BYTES: Final = 2**18


class Outcome(StrEnum):
    """What a mail that came back was: the label of `notify_bounces_total`."""

    REPORTED = "reported"
    NOTHING_FINAL = "nothing_final"
    NOT_UNDERSTOOD = "not_understood"
    UNSIGNED = "unsigned"  # a report that came to no return path of ours: anybody can write one


_KEPT: Final = frozenset({Outcome.NOT_UNDERSTOOD, Outcome.UNSIGNED})  # for people to look at


class BounceReader:
    """Looks into the mailbox every so often while `is_ours()`: one worker reads, whoever that is at the moment.

    `publish` returns when a report is durable. `domain`: of our Message-IDs. `key`: of our return paths.
    """

    def __init__(  # noqa: PLR0913 - its parts, each by name
        self,
        mailbox: Mailbox,
        *,
        domain: str,
        key: bytes,
        publish: Callable[[DeliveryReport], Awaitable[None]],
        is_ours: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        self._mailbox = mailbox
        self._domain = domain
        self._key = key
        self._publish = publish
        self._is_ours = is_ours
        self._metrics = metrics

    async def run(self) -> None:
        """Read until cancelled. A mailbox that does not answer is asked again, ever more seldom."""
        wait: float = self._mailbox.every_seconds
        while True:
            pause = _TURN_SECONDS
            if self._is_ours():
                try:
                    while await self.look() == _BATCH_MAILS:
                        pass
                    pause = wait = self._mailbox.every_seconds
                except (OSError, imaplib.IMAP4.error, UnicodeError, ProviderUnavailableError) as error:
                    # its text may quote the server, and so an address
                    log.warning("bounces.unavailable error=%s wait_seconds=%.0f", type(error).__name__, wait)
                    pause, wait = wait, min(2 * wait, LONGEST_WAIT_SECONDS)
            await asyncio.sleep(pause)

    async def look(self) -> int:
        """Read what is in the mailbox once, at most 50 mails; return how many they were.

        Raises OSError, imaplib.IMAP4.error: the mailbox does not answer; ProviderUnavailableError: Kafka takes nothing. What
        was not finished is read again.
        """
        mails = await asyncio.to_thread(self._fetch)
        done: list[bytes] = []
        aside: list[bytes] = []
        try:
            for uid, raw in mails:
                if not self._is_ours():
                    break
                outcome = await self._take(raw)
                (aside if outcome in _KEPT else done).append(uid)
                self._metrics.bounces.labels(outcome).inc()
        finally:
            if done or aside:
                await asyncio.to_thread(self._settle, done, aside)
        return len(mails)

    async def _take(self, raw: bytes) -> Outcome:
        try:
            reports = read_reports(raw, domain=self._domain, key=self._key, at=datetime.now(UTC))
        except BadSignatureError as error:
            log.warning("bounce.unsigned problem=%r", str(error))
            return Outcome.UNSIGNED
        except InvalidEventError as error:
            log.warning("bounce.not_understood problem=%r", str(error))
            return Outcome.NOT_UNDERSTOOD
        for report in reports:
            await self._publish(report)
        return Outcome.REPORTED if reports else Outcome.NOTHING_FINAL

    # ---- in a thread: imaplib blocks

    def _fetch(self) -> list[tuple[bytes, bytes]]:
        """Return (UID, mail) of the oldest mails that are neither deleted nor flagged."""
        with _session(self._mailbox) as imap:
            mails = []
            for uid in _unread(imap)[:_BATCH_MAILS]:  # one by one: a mail that vanished meanwhile is none, and memory stays small
                rows = _check(imap.uid("FETCH", uid.decode(), f"(UID BODY.PEEK[]<0.{_MOST_BYTES}>)"))
                mails += [(uid, row[1]) for row in rows if isinstance(row, tuple)]
            return mails

    def _settle(self, done: Iterable[bytes], aside: Iterable[bytes]) -> None:
        """Remove what is done, and move the others aside, or else flag them."""
        with _session(self._mailbox) as imap:
            moved = [uid for uid in aside if self._move_aside(imap, uid)]
            gone = b",".join([*done, *moved]).decode()
            if gone:
                _check(imap.uid("STORE", gone, "+FLAGS.SILENT", r"(\Deleted)"))
                if "UIDPLUS" in imap.capabilities:
                    _check(imap.uid("EXPUNGE", gone))  # ours only (RFC 4315)
                else:
                    _check(imap.expunge())

    def _move_aside(self, imap: imaplib.IMAP4, uid: bytes) -> bool:
        """Copy a mail to the folder for what is not understood; say whether it is there. It is flagged where it is not."""
        copied, _ = imap.uid("COPY", uid.decode(), ASIDE)
        if copied != "OK":
            imap.create(ASIDE)
            copied, _ = imap.uid("COPY", uid.decode(), ASIDE)
        if copied != "OK":
            _check(imap.uid("STORE", uid.decode(), "+FLAGS.SILENT", r"(\Flagged)"))
        return copied == "OK"


def waiting(mailbox: Mailbox) -> int:
    """Return how many mails wait to be read. Blocks. Raises OSError, imaplib.IMAP4.error."""
    with _session(mailbox) as imap:
        return len(_unread(imap))


def _unread(imap: imaplib.IMAP4) -> list[bytes]:
    (found,) = _check(imap.uid("SEARCH", "UNDELETED", "UNFLAGGED"))
    uids: list[bytes] = (found or b"").split()
    return uids


@contextmanager
def _session(mailbox: Mailbox) -> Iterator[imaplib.IMAP4]:
    context = None if mailbox.scheme == "imap" else ssl.create_default_context(cafile=mailbox.ca_file)
    imap: imaplib.IMAP4
    if mailbox.scheme == "imaps":
        imap = imaplib.IMAP4_SSL(mailbox.host, mailbox.port, ssl_context=context, timeout=_ANSWER_SECONDS)
    else:
        imap = imaplib.IMAP4(mailbox.host, mailbox.port, timeout=_ANSWER_SECONDS)
    try:
        if mailbox.scheme == "imap+starttls":
            imap.starttls(context)  # raises where it is not offered
        if mailbox.token_file is None:
            imap.login(mailbox.user, mailbox.password)
        else:
            token = mailbox.token_file.read_text("utf-8").strip()
            imap.authenticate("XOAUTH2", lambda _challenge: f"user={mailbox.user}\x01auth=Bearer {token}\x01\x01".encode())
        _check(imap.select(f'"{mailbox.folder}"'))
        yield imap
    finally:
        with suppress(OSError, imaplib.IMAP4.error):
            imap.logout()


def _check(answer: tuple[str, list[Any]]) -> list[Any]:
    """Return an answer's data. Raises imaplib.IMAP4.error, which does not quote it."""
    word, data = answer
    if word != "OK":
        raise imaplib.IMAP4.error(f"the server said {word}")
    return data
