"""The trail of every notification as it ends, printed while it happens; and every dead letter.

Decisions and dead letters are read from Kafka as they are written; how deliveries go on is asked of the web, as
`notify trail` does. Under load only a few at a time are followed, and the others are counted: a terminal shows a sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import aiohttp
import orjson
from confluent_kafka import KafkaException, Message
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from schemas import topics
from schemas.codec import Codec
from schemas.errors import NotifyError, UnknownSchemaError
from schemas.messages import DecisionRecord
from schemas.status import Status, is_terminal
from schemas.topics import Channel
from streams.cli import console
from streams.cli.kafka import Reader, partition_count
from streams.cli.letters import DeadLetter
from streams.cli.trail import panel
from streams.registry import Registry
from streams.settings import Settings
from streams.tokens import issue
from streams.topics import physical

T = TypeVar("T")
Show = Callable[[RenderableType], None]

LOOK_SECONDS: Final = 0.05
OPEN_LIMIT: Final = 12
BURST: Final = 20  # frames in BURST_SECONDS
BURST_SECONDS: Final = 10.0
PATIENCE_SECONDS: Final = 30.0  # then a trail is printed as far as it has come
COUNT_SECONDS: Final = 5.0
TIMEOUT: Final = aiohttp.ClientTimeout(total=5)
TOKEN_SECONDS: Final = 60
_KIND = "notified"


@dataclass(slots=True)
class _Open:
    decision: DecisionRecord
    since: float
    document: Mapping[str, Any] | None = None


async def in_thread(work: Callable[[], T]) -> T:
    """Return what blocking `work` returns. Cancelling waits for nothing: the thread is left behind, and dies with the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(cast("T", result))
        else:
            done.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="notify-blocking", daemon=True).start()
    return await done


class Trails:
    """Follows what is decided and set aside from the moment of `async with`, printing through `show`.

    `ended` and `dead` remember what became of the notifications and raw records that were named by `watch`.
    """

    def __init__(self, settings: Settings, web_url: str, show: Show, *, width: int) -> None:
        self.ended: dict[str, Mapping[str, Any]] = {}
        self.dead: dict[bytes, DeadLetter] = {}
        self._settings = settings
        self._web_url = web_url
        self._show = show
        self._width = width
        self._watched: set[str | bytes] = set()
        self._open: dict[str, _Open] = {}
        self._begun_at: deque[float] = deque(maxlen=BURST)
        self._not_shown = 0
        self._counted_at = 0.0
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Note where the topics end now, and connect."""
        self._registry = Registry(self._settings.registry_url, self._settings.data_dir / "schemas", self._settings.registry_security)
        self._codec = Codec({}, self._registry.schemas)
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(self._registry.close)
            self._session = await opened.enter_async_context(aiohttp.ClientSession(timeout=TIMEOUT))
            self._decisions = opened.enter_context(await self._from_the_end(topics.DECISIONS))
            self._dead = opened.enter_context(await self._from_the_end(topics.DEAD))
            self._stopping = opened.pop_all()
        self._task = asyncio.create_task(self._follow(), name="trails")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop following."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._stopping.aclose()

    def watch(self, wanted: Iterable[str | bytes]) -> None:
        """Remember in `ended` or `dead` what becomes of these notifications (by id) and records (by their bytes)."""
        self._watched.update(wanted)

    def forget(self) -> None:
        """Watch nothing any more; what has ended stays known."""
        self._watched.clear()

    async def all_ended(self, deadline_seconds: float) -> bool:
        """Return whether everything watched has ended within `deadline_seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                while self.missing():
                    self._news.clear()
                    await self._news.wait()
        return not self.missing()

    def missing(self) -> set[str | bytes]:
        """Return what is watched and has not ended."""
        return self._watched - self.ended.keys() - self.dead.keys()

    def state_of(self, notification: str) -> str:
        """Return how far a notification has come, in a few words."""
        opened = self._open.get(notification)
        if opened is None:
            return "not decided yet"
        deliveries = (opened.document or {}).get("deliveries") or []
        found = ", ".join(f"{each.get('channel') or 'delivery'} {each.get('status')}" for each in deliveries)
        return found or "decided, not delivered yet"

    async def _from_the_end(self, logical: str) -> Reader:
        topic = physical(self._settings.env, logical)

        def open_reader() -> Reader:
            partitions = list(range(partition_count(self._settings.cluster, topic)))
            with Reader(self._settings.cluster, topic, partitions) as probe:
                ends = {number: end for number, (_, end) in probe.sizes().items()}
            return Reader(self._settings.cluster, topic, ends)

        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await in_thread(open_reader)
            except KafkaException:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(1)  # the broker died a moment ago, and is being started again

    async def _follow(self) -> None:
        while True:
            try:
                await self._look()
            except (KafkaException, NotifyError, aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(1)  # a server is away; whoever keeps it says so
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        for message in self._dead.more(0):
            self._set_aside(message)
        for message in self._decisions.more(0):
            with contextlib.suppress(NotifyError):  # not shown, that is all
                await self._decided(message)
        if self._open:
            await asyncio.gather(*(self._ask(notification, opened) for notification, opened in list(self._open.items())))
        now = time.monotonic()
        if self._not_shown and now - self._counted_at > COUNT_SECONDS:
            self._counted_at = now
            self._show(Text(f"… and {self._not_shown:,} more that are not shown here: `notify trail ID`, `notify dlq list`", style="dim"))
            self._not_shown = 0

    async def _decided(self, message: Message) -> None:
        is_too_much = len(self._open) >= OPEN_LIMIT or self._is_burst()
        if is_too_much and not self._watched:
            self._not_shown += 1
            return
        try:
            decision = self._codec.decode(message.value(), DecisionRecord)
        except UnknownSchemaError as error:
            await self._registry.learn(error.schema_id)
            decision = self._codec.decode(message.value(), DecisionRecord)
        notification = decision.notification_id
        if is_too_much and notification not in self._watched:
            self._not_shown += 1
        else:
            self._open[notification] = _Open(decision, time.monotonic())
            self._begun_at.append(time.monotonic())

    def _is_burst(self) -> bool:
        return len(self._begun_at) == BURST and time.monotonic() - self._begun_at[0] < BURST_SECONDS

    async def _ask(self, notification: str, opened: _Open) -> None:
        token = issue(self._settings.token_key, user_id=None, lifetime_seconds=TOKEN_SECONDS)
        url = f"{self._web_url}/notifications/{notification}/trail"
        is_late = time.monotonic() - opened.since > PATIENCE_SECONDS
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.get(url, headers={"Authorization": f"Bearer {token}"}) as answer:
                if answer.status == HTTPStatus.OK:
                    opened.document = orjson.loads(await answer.read())
        document = opened.document
        if document is not None and (is_late or is_over(document)):
            del self._open[notification]
            self._end(notification, document)
        elif is_late:
            del self._open[notification]
            self._not_shown += 1

    def _end(self, notification: str, document: Mapping[str, Any]) -> None:
        frame = panel(document)
        decision = document.get("decision") or {}
        frame.title = Text(
            f" {decision.get('rule') or decision.get('outcome', '')} ", style="bold green" if succeeded(document) else "bold yellow"
        )
        frame.title_align, frame.width = "left", self._width
        frame.border_style = "green" if succeeded(document) else "yellow"
        self._show(frame)
        if notification in self._watched:
            self.ended[notification] = document
            self._news.set()

    def _set_aside(self, message: Message) -> None:
        letter = DeadLetter.of(message)
        is_watched = letter.value is not None and letter.value in self._watched
        if self._is_burst() and not is_watched:
            self._not_shown += 1
            return
        self._begun_at.append(time.monotonic())
        self._show(dead_panel(letter, width=self._width))
        if letter.value is not None and is_watched:
            self.dead[letter.value] = letter
            self._news.set()


def is_over(document: Mapping[str, Any]) -> bool:
    """Say whether every chosen channel of a trail has come to where it waits for nobody, or for the recipient only."""
    decision = document.get("decision")
    if decision is None:
        return False
    reached = {each.get("deliveryId"): each for each in document.get("deliveries") or []}
    chosen = [choice.get("deliveryId") for choice in decision.get("channels") or [] if choice.get("isChosen")]
    return all(each in reached and _is_over(reached[each]) for each in chosen)


def succeeded(document: Mapping[str, Any]) -> bool:
    """Say whether a trail ended as it should: in-app delivered where chosen, every other chosen channel at least accepted."""
    decision = document.get("decision") or {}
    reached = {each.get("deliveryId"): each for each in document.get("deliveries") or []}
    chosen = [choice for choice in decision.get("channels") or [] if choice.get("isChosen")]
    return (
        decision.get("outcome") == _KIND
        and bool(chosen)
        and all(_is_accepted(reached[each]) if (each := choice.get("deliveryId")) in reached else False for choice in chosen)
    )


def _is_over(delivery: Mapping[str, Any]) -> bool:
    status = Status(delivery["status"])
    return is_terminal(status) or status is Status.SCHEDULED or _is_accepted(delivery)


def _is_accepted(delivery: Mapping[str, Any]) -> bool:
    status = Status(delivery["status"])
    return status is Status.DELIVERED or (status is Status.SENT and delivery.get("channel") != Channel.IN_APP)


def dead_panel(letter: DeadLetter, *, width: int) -> Panel:
    """Return a dead letter in a frame."""
    headers = letter.headers
    key = "none" if letter.key is None else letter.key.decode(errors="backslashreplace")
    lines = [
        Text.assemble(("dead letter ", "dim"), (letter.id, "bold"), ("  key ", "dim"), console.cell(key)),
        Text.assemble(("why       ", "bold cyan"), console.cell(headers.get("message") or headers.get("error", "?"), "red")),
        Text.assemble(("read at   ", "bold cyan"), console.cell(letter.origin), ("   by ", "dim"), console.cell(headers.get("role", "?"))),
        Text.assemble(("see it    ", "bold cyan"), (f"notify dlq show {letter.id}", "")),
    ]
    title = Text(f" dead: {console.safe(headers.get('error', '?'))} ", style="bold red")
    return Panel(Group(*lines), title=title, title_align="left", border_style="red", padding=(0, 1), width=width)
