"""Pages that ask for something: one notification for a user (a service asks), and news of a product that he watches.

Each is a record in Kafka once it is answered with 202; the router decides. What a request says travels sealed with the
user's key, so the worker that follows his keys publishes it: any other one forwards to it. Nothing is ever sent plain
instead: without a key in time the answer is 503.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from secrets import token_hex
from typing import Any

import faust
import orjson
from aiohttp import web

from agents.inbox import NOTIFICATIONS
from agents.router import Renderer, missing_data
from agents.stock import product_audience
from agents.triggers import RULES, Rule
from schemas import topics
from schemas.errors import NotifyError, TemplateError
from schemas.ids import digest, notification_id, partition_of
from schemas.messages import Command, Message, NotificationRequested
from schemas.sealed import sealed_request
from streams.tokens import Caller
from streams.views.pages import (
    KEY_TIMEOUT_SECONDS,
    MAX_USER_ID_CHARACTERS,
    PRODUCT_ID,
    PUBLISH_TIMEOUT_SECONDS,
    SITE,
    USER_ID,
    Page,
    Site,
    WebContext,
    add_pages,
    application_of,
    body_of,
    caller_of,
    json_answer,
)
from streams.views.problems import ProblemError, ProblemType, bad_parameter, invalid_field, unavailable

MAX_BODY_BYTES = 64 * 1024
MAX_KEY_CHARACTERS = 200
MAX_NAME_CHARACTERS = 100
MAX_PRODUCT_ID_CHARACTERS = 200
_FIRST_YEAR, _LAST_YEAR = 2000, 2199
MAX_SUBJECTS = 10_000  # whose rate is remembered; whoever has been silent longest is forgotten first
# so long a new user's key may take; the router makes it in milliseconds
NEW_KEY_SECONDS = 3.0
NEW_KEY_LOOK_SECONDS = 0.05
PRODUCER = "http"
# metadata is readable in the log and in decisions, so it holds ids that the answers show, and nothing else
METADATA = ("orderId", "shippingProvider")
_FIELDS = ("userId", "rule", "data", "metadata", "idempotencyKey", "occurredAt")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_VISIBLE = re.compile(r"[\x21-\x7e]+")


@dataclass(slots=True)
class Rates:
    """A token bucket for each subject: so many requests a second, and a second's worth at once."""

    per_second: float
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)  # what is left, as of when

    def take(self, subject: str) -> float:
        """Return 0 and take one of the subject's tokens; if none is left, how many seconds until there is."""
        now = self.clock()
        left, since = self._buckets.pop(subject, (self.per_second, now))
        left = min(self.per_second, left + (now - since) * self.per_second)
        allowed = left >= 1
        self._buckets[subject] = (left - 1 if allowed else left, now)
        if len(self._buckets) > MAX_SUBJECTS:
            del self._buckets[next(iter(self._buckets))]
        return 0.0 if allowed else (1 - left) / self.per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What these pages need besides the site. `templates`: to see that a request says all that they name."""

    templates: Renderer
    rates: Rates
    new_key_seconds: float = NEW_KEY_SECONDS


_ASKING = web.AppKey("asking", Asking)


def install_requests(app: faust.App, asking: Asking) -> None:
    """Add the pages to `app`, after `pages.install` and before its web server starts."""
    application_of(app)[_ASKING] = asking
    add_pages(app, (Ask, Watch))


class Ask(Page):
    """Asks for a notification."""

    view_name, view_path, methods_shown = "ask", "/notifications", "POST"
    about = "ask for a notification to a user; JSON {userId, rule, data, metadata, occurredAt}; header Idempotency-Key; services only"

    async def post(self, request: web.Request) -> web.Response:
        """Answer 202 with the notification's id once Kafka has the request."""
        site, caller, asking = request.app[SITE], caller_of(request), request.app[_ASKING]
        if not caller.is_service:
            raise ProblemError(ProblemType.FORBIDDEN, "only a service's token may ask for notifications")
        _limit(asking.rates, caller)
        if request.content_type != "application/json":
            raise ProblemError(ProblemType.UNSUPPORTED_TYPE, "the content type must be application/json")
        body = await body_of(request, most=MAX_BODY_BYTES)
        wish = parse(body, header=_idempotency_key(request), templates=asking.templates, now=site.context.now())
        partition = partition_of(wish.user_id.encode(), site.context.partitions)
        if site.context.tables.shard(NOTIFICATIONS, partition) is None:
            return await site.proxy.forward(request, partition, body=body)
        producer = f"{PRODUCER}:{caller.service}" if caller.service else PRODUCER
        event_id = wish.key or digest(producer, wish.user_id, str(time.time_ns()), token_hex(8), size=12)
        key = await _key(site, wish.user_id, new_key_seconds=asking.new_key_seconds)
        asked = NotificationRequested(
            event_id=event_id,
            producer=producer,
            rule=wish.rule.name,
            user_id=wish.user_id,
            data=wish.data,
            metadata=wish.metadata,
            occurred_at=wish.occurred_at,
        )
        await _publish(site.context, topics.requests(wish.rule.lane), wish.user_id, sealed_request(key, asked))
        identity = notification_id(producer=producer, event_id=event_id, rule=wish.rule.name, user_id=wish.user_id)
        headers = {"Location": f"/notifications/{identity}"}
        return json_answer({"notificationId": identity}, status=HTTPStatus.ACCEPTED, headers=headers)


class Watch(Page):
    """A product that a user wants to hear of when it is back in stock."""

    view_name, view_path, methods_shown = "watch", f"/users/{USER_ID}/watches/{PRODUCT_ID}", "PUT, DELETE"
    about = "tell the user when the product is back in stock, or no more; 202 accepted; repeating it changes nothing"

    async def put(self, request: web.Request, user_id: str, product_id: str) -> web.Response:
        """Answer 202 once Kafka has the command to watch."""
        return await self._ask(request, "watch", user_id, product_id)

    async def delete(self, request: web.Request, user_id: str, product_id: str) -> web.Response:
        """Answer 202 once Kafka has the command to watch no more."""
        return await self._ask(request, "unwatch", user_id, product_id)

    async def _ask(self, request: web.Request, kind: str, user_id: str, product_id: str) -> web.Response:
        site, caller = request.app[SITE], caller_of(request)
        if len(user_id) > MAX_USER_ID_CHARACTERS or _CONTROL.search(user_id):
            raise bad_parameter("userId", f"1 to {MAX_USER_ID_CHARACTERS} characters, none of them a control character")
        if not caller.may_see(user_id):
            raise ProblemError(ProblemType.NOT_FOUND, "there is no such user")
        if len(product_id) > MAX_PRODUCT_ID_CHARACTERS or _CONTROL.search(product_id):
            raise bad_parameter("productId", f"1 to {MAX_PRODUCT_ID_CHARACTERS} characters, none of them a control character")
        _limit(request.app[_ASKING].rates, caller)
        now = site.context.now()
        audience = product_audience(product_id)
        command = Command(
            command_id=digest("http", kind, user_id, audience, now.isoformat(), size=12),
            user_id=user_id,
            kind=kind,
            audience=audience,
            issued_at=now,
        )
        await _publish(site.context, topics.COMMANDS, user_id, command)
        return json_answer({"userId": user_id, "productId": product_id, "isWatched": kind == "watch"}, status=HTTPStatus.ACCEPTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the body of a request asks for. `key` None: it is an event of its own."""

    user_id: str
    rule: Rule
    data: Mapping[str, str] = field(repr=False)
    metadata: Mapping[str, str]
    key: str | None
    occurred_at: datetime


def parse(body: bytes, *, header: str | None, templates: Renderer, now: datetime) -> Wish:
    """Return what `body` asks for; `header` is its Idempotency-Key. `now`: when it happened, unless it says so itself.

    Raises ProblemError: 400 for what is no JSON object; 422, naming the field and never its value, for everything else.
    """
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProblemError(
            ProblemType.BAD_REQUEST, f"the body is no JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    if not isinstance(given, dict):
        raise ProblemError(ProblemType.BAD_REQUEST, "the body must be a JSON object")
    unknown = next((name for name in given if name not in _FIELDS), None)
    if unknown is not None:
        raise invalid_field(unknown[:MAX_NAME_CHARACTERS], f"is not a field; there are {', '.join(_FIELDS)}")
    user_id = _text(given, "userId", most=MAX_USER_ID_CHARACTERS)
    if user_id is None:
        raise invalid_field("userId", "is missing")
    rule = RULES.get(name) if (name := _text(given, "rule", most=MAX_NAME_CHARACTERS)) is not None else None
    if rule is None:
        raise invalid_field("rule", f"is missing or none of {', '.join(RULES)}", allowed=list(RULES))
    metadata = _texts(given, "metadata")
    for name in metadata:
        if name not in METADATA or len(metadata[name]) > MAX_KEY_CHARACTERS:
            raise invalid_field(
                f"metadata.{name}", f"is none of {', '.join(METADATA)} with up to {MAX_KEY_CHARACTERS} characters; use data"
            )
    key = _text(given, "idempotencyKey", most=MAX_KEY_CHARACTERS)
    if key is not None and header is not None and key != header:
        raise invalid_field("idempotencyKey", "is another one than the header Idempotency-Key")
    data = _texts(given, "data")
    _require_complete(rule, data, templates)
    return Wish(user_id=user_id, rule=rule, data=data, metadata=metadata, key=header or key, occurred_at=_moment(given) or now)


def _text(given: Mapping[str, Any], name: str, *, most: int) -> str | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or len(value) > most or _CONTROL.search(value):
        raise invalid_field(name, f"is no text of 1 to {most} characters, none of them a control character")
    return value


def _texts(given: Mapping[str, Any], name: str) -> dict[str, str]:
    value = given.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid_field(name, "is no object of texts")
    for key, each in value.items():
        if not key or len(key) > MAX_NAME_CHARACTERS or not isinstance(each, str):
            raise invalid_field(f"{name}.{key[:MAX_NAME_CHARACTERS]}", "is no text, or its name is empty or too long")
    return value


def _moment(given: Mapping[str, Any]) -> datetime | None:
    text = _text(given, "occurredAt", most=40)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
        raise invalid_field("occurredAt", f"is no time such as 2026-01-15T09:30:00Z, of the years {_FIRST_YEAR} to {_LAST_YEAR}")
    return moment


def _require_complete(rule: Rule, data: Mapping[str, str], templates: Renderer) -> None:
    """Raise ProblemError that names what the rule's templates need and `data` lacks."""
    try:
        missing = missing_data(rule, data, templates)
    except TemplateError as error:
        raise invalid_field("data", f"does not fit the template: {error}") from None
    if missing:
        names = ", ".join(f"data.{name}" for name in missing)
        raise invalid_field(f"data.{missing[0]}", f"is missing; the template of {rule.name} needs {names}", missing=missing)


def _limit(rates: Rates, caller: Caller) -> None:
    """Count a request of `caller`. Raises ProblemError above the rate: on each worker, so forwarding opens no way around."""
    seconds = rates.take(caller.subject)
    if seconds:
        headers = {"Retry-After": str(math.ceil(seconds))}
        raise ProblemError(ProblemType.TOO_MANY, f"this token may ask {rates.per_second:g} times a second", headers=headers)


def _idempotency_key(request: web.Request) -> str | None:
    given = request.headers.getall("Idempotency-Key", [])
    if not given:
        return None
    if len(given) > 1 or len(given[0]) > MAX_KEY_CHARACTERS or not _VISIBLE.fullmatch(given[0]):
        raise bad_parameter("Idempotency-Key", f"given once, 1 to {MAX_KEY_CHARACTERS} visible ASCII characters")
    return given[0]


async def _key(site: Site, user_id: str, *, new_key_seconds: float) -> bytes:
    """Return the user's key; the router makes it for a user without one. Raises ProblemError when it does not in time."""
    context = site.context
    try:
        async with asyncio.timeout(KEY_TIMEOUT_SECONDS):
            key = await context.key_of(user_id)
            if key is not None:
                return key
            now = context.now()
            command_id = digest("http", "ensure_key", user_id, now.isoformat(), size=12)
            await _publish(
                context, topics.COMMANDS, user_id, Command(command_id=command_id, user_id=user_id, kind="ensure_key", issued_at=now)
            )
            async with asyncio.timeout(new_key_seconds):
                while (key := await context.key_of(user_id)) is None:  # noqa: ASYNC110 - it reads the topic to its end: no event
                    await asyncio.sleep(NEW_KEY_LOOK_SECONDS)
            return key
    except TimeoutError as error:
        raise unavailable("the user's key is not there in time, so nothing was published; ask again", retry_after_seconds=2) from error


async def _publish(context: WebContext, topic: str, user_id: str, message: Message) -> None:
    try:
        async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
            await context.publish(topic, user_id.encode(), message)
    except (TimeoutError, NotifyError) as error:
        detail = "Kafka did not confirm in time; asking again with the same Idempotency-Key is safe"
        raise unavailable(detail, retry_after_seconds=5) from error
