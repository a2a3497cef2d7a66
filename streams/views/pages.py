"""The web's pages. `install` adds them all; `install_operations` health and metrics alone, for the other roles.

Faust's own pages (tables, router, graph, statistics) are never mounted: they answer without a token.

Pages about users need a bearer token (`streams.tokens`): a user sees his own, the service scope sees all. What belongs
to somebody else looks as if it did not exist. Health and metrics need none: they carry neither ids nor personal data,
and are meant for the orchestrator and for Prometheus on the inner network.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from typing import cast

import faust
import orjson
from aiohttp import web
from faust.web.base import BlueprintManager, Request
from faust.web.exceptions import WebError
from faust.web.views import View
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from schemas import topics
from schemas.errors import NotifyError
from schemas.ids import digest
from schemas.messages import EngagementSignal, Message
from schemas.status import Engagement
from streams import tokens
from streams.views import problems
from streams.views.problems import ProblemError, ProblemType, bad_parameter, unavailable
from streams.views.proxy import Proxy
from streams.views.queries import BeyondTablesError, Cursor, ElsewhereError, Found, History, Queries, Show, Tables, is_readable, trail

MAX_USER_ID_CHARACTERS = 200
MAX_LIMIT = 200
MAX_OFFSET = 10_000
DEFAULT_LIMIT = 50
PUBLISH_TIMEOUT_SECONDS = 10.0
KEY_TIMEOUT_SECONDS = 5.0
BEYOND_RETRY_SECONDS = 5

# anything but a slash, in aiohttp's form: its default refuses braces, which a user id may have
USER_ID = "{user_id:[^/]+}"
PRODUCT_ID = "{product_id:[^/]+}"
_NOTIFICATION_ID = "{notification_id:[^/]+}"
_NO_NOTIFICATION = "there is no such notification"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How the worker is. `details` says why, for operators: no ids, no personal data.

    Live: it makes progress or has nothing to do; restart it when not. Ready: it has partitions and recovered them.
    """

    is_live: bool
    is_ready: bool
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationsContext:
    """What health and metrics need."""

    health: Callable[[], Health]
    registry: CollectorRegistry


@dataclass(frozen=True, slots=True, kw_only=True)
class WebContext(OperationsContext):
    """What the pages need.

    `owner` gives the base URL of the worker that owns a partition of the users' topics, None when it is this one or
    unknown. `key_of` gives a user's unwrapped key. `publish(topic, key, message)` returns once the broker has
    acknowledged; it raises a NotifyError or TimeoutError when the message may not have been stored.
    """

    tables: Tables
    partitions: int
    owner: Callable[[int], str | None]
    key_of: Callable[[str], Awaitable[bytes | None]]
    publish: Callable[[str, bytes, Message], Awaitable[None]]
    token_key: bytes = field(repr=False)
    now: Callable[[], datetime]
    history: History | None = None  # what is older than the tables keep; None: there is no database


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the pages find in their application."""

    context: WebContext
    queries: Queries
    proxy: Proxy


_OPERATIONS = web.AppKey("operations", OperationsContext)
SITE = web.AppKey("site", Site)
_PAGES = web.AppKey("pages", list)


def install_operations(app: faust.App, context: OperationsContext) -> None:
    """Add the index, health and metrics to `app`, and close Faust's own pages. Before its web server starts."""
    _install(app, context, (Index, Live, Ready, Metrics))


def install(app: faust.App, context: WebContext) -> None:
    """Add all pages to `app`, and close Faust's own. Before its web server starts."""
    proxy = Proxy(context.owner)
    queries = Queries(tables=context.tables, partitions=context.partitions, key_of=_in_time(context.key_of), history=context.history)
    application = application_of(app)
    application[SITE] = Site(context=context, queries=queries, proxy=proxy)
    application.cleanup_ctx.append(proxy.connected)
    _install(app, context, (Index, Live, Ready, Metrics, UserNotifications, Unread, Details, Read, Trail))


def _install(app: faust.App, context: OperationsContext, pages: tuple[type[Page], ...]) -> None:
    server = app.web
    if server.blueprints.applied:
        raise RuntimeError("the pages must be installed before the web server starts")
    # the settings web_*_enabled close most of Faust's pages, but one of two index pages is always mounted
    server.blueprints = BlueprintManager()
    application = application_of(app)
    application.middlewares.append(problems.middleware)
    application[_OPERATIONS] = context
    application[_PAGES] = []
    add_pages(app, pages)


def add_pages(app: faust.App, pages: tuple[type[Page], ...]) -> None:
    """Add more `pages` to `app`, after `install`."""
    listed = application_of(app)[_PAGES]
    for page in pages:
        listed.append((page.methods_shown, _shown(page.view_path), page.about))
        app.web.add_view(page)


def _shown(path: str) -> str:
    return path.replace(USER_ID, "{userId}").replace(PRODUCT_ID, "{productId}").replace(_NOTIFICATION_ID, "{notificationId}")


def application_of(app: faust.App) -> web.Application:
    """Return the aiohttp application behind Faust's web."""
    return cast("web.Application", app.web.web_app)  # type: ignore[attr-defined]  # of the aiohttp driver


def _in_time(key_of: Callable[[str], Awaitable[bytes | None]]) -> Callable[[str], Awaitable[bytes | None]]:
    async def bounded(user_id: str) -> bytes | None:
        try:
            async with asyncio.timeout(KEY_TIMEOUT_SECONDS):
                return await key_of(user_id)
        except TimeoutError as error:
            raise unavailable("the user's key could not be read in time") from error

    return bounded


def json_answer(value: object, *, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return `value` as a JSON answer."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json", headers=headers)


class Page(View):
    """A page whose failures are problems. Subclasses name `view_name`, `view_path`, `methods_shown` and `about`."""

    methods_shown = "GET"
    about = ""

    def get_methods(self) -> set[str]:
        """Return the page's methods; HEAD goes with GET only."""
        methods: set[str] = super().get_methods()
        return methods if "GET" in methods else methods - {"HEAD"}

    async def on_request_error(self, request: Request, exc: WebError) -> web.Response:  # type: ignore[override]  # Faust's abstract Response
        """Answer with the problem."""
        problem = exc if isinstance(exc, ProblemError) else problems.of_status(exc.code)
        return problems.response(problem, cast("web.Request", request))


class Index(Page):
    """The list of pages."""

    view_name, view_path, about = "index", "/", "this list"

    async def get(self, request: web.Request) -> web.Response:
        """Answer which pages there are."""
        pages = [{"method": method, "path": path, "about": about} for method, path, about in request.app[_PAGES]]
        return json_answer({"service": "flowmart-notifications", "pages": pages})


class Live(Page):
    """For the orchestrator: restart the worker unless 200."""

    view_name, view_path, about = "live", "/health/live", "200 while the worker makes progress, else 503; no token"

    async def get(self, request: web.Request) -> web.Response:
        """Answer 200 or 503."""
        return _health(request, is_good=lambda health: health.is_live, words=("live", "stuck"))


class Ready(Page):
    """For the orchestrator: send requests only when 200."""

    view_name, view_path, about = "ready", "/health/ready", "200 when the worker has recovered its partitions, else 503; no token"

    async def get(self, request: web.Request) -> web.Response:
        """Answer 200 or 503."""
        return _health(request, is_good=lambda health: health.is_ready, words=("ready", "not ready"))


def _health(request: web.Request, *, is_good: Callable[[Health], bool], words: tuple[str, str]) -> web.Response:
    health = request.app[_OPERATIONS].health()
    good = is_good(health)
    body = {"status": words[0] if good else words[1], "details": dict(health.details)}
    return json_answer(body, status=HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)


class Metrics(Page):
    """For Prometheus."""

    view_name, view_path, about = "metrics", "/metrics", "Prometheus text exposition; no token"

    async def get(self, request: web.Request) -> web.Response:
        """Answer with every metric of this worker."""
        text = generate_latest(request.app[_OPERATIONS].registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


class UserNotifications(Page):
    """A user's inbox."""

    view_name, view_path = "inbox", f"/users/{USER_ID}/notifications"
    about = "a user's inbox, newest first; status=all|unread, limit=1..200, offset=0..10000 or the cursor of the link to the next page"

    async def get(self, request: web.Request, user_id: str) -> web.Response:
        """Answer with GetUserNotifications."""
        site = _site_of_inbox(request, user_id)
        show = _parameter(request, "status") or Show.ALL
        if show not in set(Show):
            raise bad_parameter("status", " or ".join(sorted(Show)))
        limit = _number(request, "limit", low=1, high=MAX_LIMIT, default=DEFAULT_LIMIT)
        offset = _number(request, "offset", low=0, high=MAX_OFFSET, default=0)
        before = _cursor(request)
        if before is not None and offset:
            raise bad_parameter("offset", "left out where a cursor is given")
        try:
            page = await site.queries.inbox(user_id, show=Show(show), limit=limit, offset=offset, before=before)
        except ElsewhereError as elsewhere:
            return await site.proxy.forward(request, elsewhere.partition)
        except BeyondTablesError as beyond:
            raise unavailable(str(beyond), retry_after_seconds=BEYOND_RETRY_SECONDS) from beyond
        answer = json_answer(page.answer)
        if page.next is not None:
            # RFC 8288; the body's contract has no room for it. Relative: whoever forwarded the request has another address
            query = {**{name: value for name, value in request.query.items() if name != "offset"}, "cursor": page.next.encode()}
            answer.headers["Link"] = f'<{request.rel_url.with_query(query)}>; rel="next"'
        return answer


class Unread(Page):
    """How many notifications a user has not read."""

    view_name, view_path = "unread", f"/users/{USER_ID}/unread"
    about = "how many notifications of a user's inbox are unread"

    async def get(self, request: web.Request, user_id: str) -> web.Response:
        """Answer with `userId`, `unread`, and `isWhole`: false where older ones could not be counted."""
        site = _site_of_inbox(request, user_id)
        try:
            return json_answer(await site.queries.unread(user_id))
        except ElsewhereError as elsewhere:
            return await site.proxy.forward(request, elsewhere.partition)


class NotificationPage(Page):
    """A page about one notification, answered by the worker that has it, to those who may see it."""

    async def answer(self, request: web.Request, notification_id: str) -> web.Response:
        """Find the notification and answer about it, or let its owner answer."""
        site, caller = request.app[SITE], caller_of(request)
        try:
            found = await site.queries.find(notification_id)
        except ElsewhereError as elsewhere:
            return await site.proxy.forward(request, elsewhere.partition)
        except BeyondTablesError as beyond:
            raise unavailable(str(beyond), retry_after_seconds=BEYOND_RETRY_SECONDS) from beyond
        if found is None or not caller.may_see(found.row.user_id):
            raise ProblemError(ProblemType.NOT_FOUND, _NO_NOTIFICATION)
        return await self.answer_about(found, site)

    async def answer_about(self, found: Found, site: Site) -> web.Response:
        """Answer about a notification that the caller may see."""
        raise NotImplementedError


class Details(NotificationPage):
    """One notification."""

    view_name, view_path = "details", f"/notifications/{_NOTIFICATION_ID}"
    about = "a notification"

    async def get(self, request: web.Request, notification_id: str) -> web.Response:
        """Answer with GetNotificationDetails."""
        return await self.answer(request, notification_id)

    async def answer_about(self, found: Found, site: Site) -> web.Response:
        """Answer 404 also for what was skipped: nobody was told anything; its trail says why."""
        details = await site.queries.details(found)
        if details is None:
            raise ProblemError(ProblemType.NOT_FOUND, _NO_NOTIFICATION)
        return json_answer(details)


class Trail(NotificationPage):
    """Why a notification was or was not sent."""

    view_name, view_path = "trail", f"/notifications/{_NOTIFICATION_ID}/trail"
    about = "why a notification was or was not sent, through whom, and how it ended"

    async def get(self, request: web.Request, notification_id: str) -> web.Response:
        """Answer with the trail."""
        return await self.answer(request, notification_id)

    async def answer_about(self, found: Found, site: Site) -> web.Response:
        """Answer with what is known so far."""
        del site
        return json_answer(trail(found))


class Read(NotificationPage):
    """Marks a notification as read."""

    view_name, view_path, methods_shown = "read", f"/notifications/{_NOTIFICATION_ID}/read", "POST"
    about = "mark a notification as read: 202 accepted, shown shortly; 204 it was read already"

    async def post(self, request: web.Request, notification_id: str) -> web.Response:
        """Answer once the broker has stored the signal. Asking again changes nothing."""
        return await self.answer(request, notification_id)

    async def answer_about(self, found: Found, site: Site) -> web.Response:
        """Publish the signal; the inbox follows when it has come back through the topics."""
        row = found.row
        if not is_readable(row):
            raise ProblemError(ProblemType.NOT_FOUND, _NO_NOTIFICATION)
        if row.engaged.is_read:
            return web.Response(status=HTTPStatus.NO_CONTENT)
        signal = EngagementSignal(
            # the same for each repetition; another one once the user has marked it as unread
            signal_id=digest("read", found.notification_id, str(row.engaged.last_unread_at), size=16),
            notification_id=found.notification_id,
            user_id=row.user_id,
            engagement=Engagement.READ,
            at=site.context.now(),
        )
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
                await site.context.publish(topics.SIGNALS, row.user_id.encode(), signal)
        except (TimeoutError, NotifyError) as error:
            raise unavailable("Kafka did not confirm in time; asking again is safe", retry_after_seconds=5) from error
        return json_answer({"notificationId": found.notification_id, "status": Engagement.READ}, status=HTTPStatus.ACCEPTED)


async def body_of(request: web.Request, *, most: int) -> bytes:
    """Return the body. Raises ProblemError above `most` bytes, before more than that was read."""
    problem = ProblemError(ProblemType.TOO_LARGE, f"the body is larger than {most} bytes", limit=most)
    if (request.content_length or 0) > most:
        raise problem
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > most:
            raise problem
    return bytes(body)


def _site_of_inbox(request: web.Request, user_id: str) -> Site:
    """Return the site, if the caller may see the user's inbox. Raises ProblemError."""
    caller = caller_of(request)
    if len(user_id) > MAX_USER_ID_CHARACTERS:
        raise bad_parameter("userId", f"1 to {MAX_USER_ID_CHARACTERS} characters")
    if not caller.may_see(user_id):
        raise ProblemError(ProblemType.NOT_FOUND, "there is no such inbox")
    return request.app[SITE]


def caller_of(request: web.Request) -> tokens.Caller:
    """Return who asks. Raises ProblemError without a valid token."""
    given = ", ".join(request.headers.getall("Authorization", []))  # two of them make none that is valid
    try:
        return tokens.verify(request.app[SITE].context.token_key, given)
    except tokens.UnauthorizedError as error:
        # RFC 6750, section 3.1: no error code when the request had no token at all
        challenge = 'Bearer realm="notifications"' + (', error="invalid_token"' if given else "")
        raise ProblemError(ProblemType.UNAUTHORIZED, str(error), headers={"WWW-Authenticate": challenge}) from None


def _parameter(request: web.Request, name: str) -> str | None:
    given = request.query.getall(name, [])
    if len(given) > 1:
        raise bad_parameter(name, "given once")
    return given[0] if given else None


def _cursor(request: web.Request) -> Cursor | None:
    text = _parameter(request, "cursor")
    try:
        return None if text is None else Cursor.decode(text)
    except ValueError:
        raise bad_parameter("cursor", "one from the link to the next page") from None


def _number(request: web.Request, name: str, *, low: int, high: int, default: int) -> int:
    text = _parameter(request, name)
    if text is None:
        return default
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(high))
    if not is_number or not low <= int(text) <= high:
        raise bad_parameter(name, f"a whole number from {low} to {high}")
    return int(text)
