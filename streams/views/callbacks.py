"""What providers report by calling us: no token, but a signature that only they can make.

    POST /callbacks/twilio/{provider}   status callbacks of Twilio, signed with the provider's token
    POST /callbacks/ses                 events of Amazon SES by way of SNS, signed with Amazon's certificate
    POST /callbacks/receipts            reports of services of ours, signed as standardwebhooks.com says

Each is answered with 2xx once Kafka has the report, and never before: whoever hears anything else tells it again. What was
told before is known by its id and published once; what another worker publishes again, the matcher drops. What is older
than its signature may be is refused as a replay.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from http import HTTPStatus
from urllib.parse import parse_qsl

import aiohttp
import faust
import orjson
from aiohttp import web

from agents.receipts import REPORTED, plain_code, report_key
from channels import bounces, ses, signing, twilio
from schemas import topics
from schemas.errors import NotifyError
from schemas.ids import digest
from schemas.messages import DeliveryReport
from schemas.status import Suppression
from streams.views.pages import PUBLISH_TIMEOUT_SECONDS, SITE, Page, add_pages, application_of, body_of
from streams.views.problems import ProblemError, ProblemType, invalid_field, unavailable

MAX_FORM_BYTES = 16 * 1024
MAX_SNS_BYTES = 320 * 1024  # a message of SNS has 256 KiB at most, and quotes double some of its characters
MAX_REPORTS_BYTES = 64 * 1024
MAX_REPORTS = 100
# SNS gives up an hour after the first try (docs.aws.amazon.com: "Amazon SNS message delivery retries")
SNS_AGE = timedelta(hours=1, minutes=5)
REMEMBERED = 100_000
REMEMBERED_SECONDS = 3_900.0
FETCH_SECONDS = 5.0
MAX_CERTIFICATE_BYTES = 64 * 1024
CERTIFICATES = 8
CERTIFICATE_SECONDS = 86_400.0
_MAX_TEXT = 500
_TWILIO_PATH = "/callbacks/twilio/"

log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What became of a call, in the metric `notify_callbacks_total`."""

    PUBLISHED = "published"
    REPEATED = "repeated"
    NOTHING = "nothing"  # well signed, and changes no status
    CONFIRMED = "confirmed"  # a subscription of SNS
    REFUSED = "refused"  # no valid signature
    STALE = "stale"  # a valid one, too old
    MALFORMED = "malformed"
    UNAVAILABLE = "unavailable"


Fetch = Callable[[str], Awaitable[bytes]]


class FetchError(Exception):
    """Amazon did not answer as it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Who may report, and how. `fetch` gets an https URL of Amazon's, and raises FetchError.

    `public_url`: what providers reach us by, without a slash at its end; signatures cover it. `tokens`: by the name of a
    Twilio provider. `count` gets (source, outcome).
    """

    public_url: str
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    ses_topics: frozenset[str] = frozenset()
    keys: tuple[bytes, ...] = field(default=(), repr=False)
    fetch: Fetch
    count: Callable[[str, Outcome], None]


def twilio_callback_url(public_url: str, provider: str) -> str | None:
    """Return where a Twilio provider posts its status callbacks; None when nobody can reach us."""
    return f"{public_url}{_TWILIO_PATH}{provider}" if public_url else None


def install_callbacks(app: faust.App, callbacks: Callbacks) -> None:
    """Add the pages to `app`, after `pages.install` and before its web server starts."""
    application_of(app)[_DESK] = Desk(callbacks)
    add_pages(app, (Twilio, Ses, Receipts))


class Desk:
    """What the pages share: which messages were published here, and Amazon's certificates."""

    def __init__(self, callbacks: Callbacks, clock: Callable[[], float] = time.monotonic) -> None:
        self.callbacks = callbacks
        self._clock = clock
        self._told: OrderedDict[str, float] = OrderedDict()
        self._certificates: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._fetching = asyncio.Lock()

    def was_told(self, message_id: str) -> bool:
        """Say whether a message of this id was published here of late."""
        at = self._told.get(message_id)
        return at is not None and self._clock() - at < REMEMBERED_SECONDS

    def note(self, message_id: str) -> None:
        """Remember that a message was published."""
        self._told[message_id] = self._clock()
        self._told.move_to_end(message_id)
        while len(self._told) > REMEMBERED:
            self._told.popitem(last=False)

    async def certificate(self, url: str) -> bytes:
        """Return the certificate at one of Amazon's URLs. Raises FetchError. One at a time: nobody makes us call Amazon at will."""
        async with self._fetching:
            known = self._certificates.get(url)
            if known is None or self._clock() - known[1] > CERTIFICATE_SECONDS:
                known = (await self.callbacks.fetch(url), self._clock())
                self._certificates[url] = known
                while len(self._certificates) > CERTIFICATES:
                    self._certificates.popitem(last=False)
            return known[0]

    def forget_certificate(self, url: str) -> None:
        """Fetch it again next time: it did not do."""
        self._certificates.pop(url, None)


_DESK = web.AppKey("desk", Desk)


async def fetch_from_amazon(url: str) -> bytes:
    """Return what is at `url`. Follows no redirect, and heeds no proxy. Raises FetchError."""
    timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, allow_redirects=False) as answer:
            body = await answer.content.read(MAX_CERTIFICATE_BYTES)
            if answer.status != HTTPStatus.OK:
                raise FetchError(f"Amazon answered {answer.status}")
            return body
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise FetchError(f"Amazon did not answer: {type(error).__name__}") from None


class CallbackPage(Page):
    """A page that a provider posts to. `source`: its label in the metric."""

    methods_shown = "POST"
    source = ""

    async def take(self, request: web.Request, message_id: str, reports: list[DeliveryReport]) -> web.Response:
        """Publish the reports of a message, unless it was told before, and answer when Kafka has them."""
        desk = request.app[_DESK]
        name = f"{self.source} {message_id}"
        if desk.was_told(name):
            return self.done(request, Outcome.REPEATED)
        publish = request.app[SITE].context.publish
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
                await asyncio.gather(
                    *(publish(topics.RECEIPTS, report_key(each.provider, each.reference), each) for each in reports),
                )
        except (TimeoutError, NotifyError) as error:
            self.tell(request, Outcome.UNAVAILABLE)
            raise unavailable("Kafka did not confirm in time; telling it again is safe", retry_after_seconds=5) from error
        desk.note(name)
        return self.done(request, Outcome.PUBLISHED)

    def tell(self, request: web.Request, outcome: Outcome) -> None:
        """Count what became of a call."""
        request.app[_DESK].callbacks.count(self.source, outcome)

    def done(self, request: web.Request, outcome: Outcome) -> web.Response:
        """Answer that nobody need tell it again."""
        self.tell(request, outcome)
        return web.Response(status=HTTPStatus.NO_CONTENT)

    def refused(self, request: web.Request, detail: str, outcome: Outcome = Outcome.REFUSED) -> ProblemError:
        """Return the problem of a call that nobody whom we know signed, or too long ago."""
        self.tell(request, outcome)
        log.warning("callback.refused source=%s outcome=%s detail=%s", self.source, outcome, detail)
        return ProblemError(ProblemType.BAD_SIGNATURE, detail)

    def malformed(self, request: web.Request, detail: str) -> ProblemError:
        """Return the problem of a call that was signed well and says nothing that we understand."""
        self.tell(request, Outcome.MALFORMED)
        log.warning("callback.malformed source=%s detail=%s", self.source, detail)
        return ProblemError(ProblemType.BAD_REQUEST, detail)


class Twilio(CallbackPage):
    """Status callbacks of Twilio."""

    view_name, view_path, source = "callback-twilio", f"{_TWILIO_PATH}{{provider:[^/]+}}", "twilio"
    about = "status callbacks of Twilio, signed with the provider's token (X-Twilio-Signature)"

    async def post(self, request: web.Request, provider: str) -> web.Response:
        """Answer 204 once Kafka has the report."""
        callbacks = request.app[_DESK].callbacks
        body = await body_of(request, most=MAX_FORM_BYTES)
        token = callbacks.tokens.get(provider)
        pairs = parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=200)
        signature = request.headers.get("X-Twilio-Signature", "")
        # what Twilio was told to call, whatever stands between us
        url = callbacks.public_url + request.rel_url.raw_path_qs
        params: dict[str, list[str]] = {}
        for name, value in pairs:
            params.setdefault(name, []).append(value)
        if token is None or not twilio.verify_twilio(url, params, signature, token):
            raise self.refused(request, "the signature is not one of Twilio's for this provider")
        try:
            report = twilio.report_of_callback(url, dict(pairs))
        except ValueError as error:
            raise self.malformed(request, f"the body {error}") from None
        if report is None:
            return self.done(request, Outcome.NOTHING)
        # it has no id and no time of its own: a status is told once a message
        return await self.take(request, report.report_id, [report])


class Ses(CallbackPage):
    """Events of Amazon SES by way of SNS."""

    view_name, view_path, source = "callback-ses", "/callbacks/ses", "ses"
    about = "events of Amazon SES by way of SNS, signed by Amazon; subscriptions of NOTIFY_SES_TOPICS confirm themselves"

    async def post(self, request: web.Request) -> web.Response:
        """Answer 204 once Kafka has the report, or the subscription is confirmed."""
        desk, now = request.app[_DESK], request.app[SITE].context.now()
        body = await body_of(request, most=MAX_SNS_BYTES)
        try:
            message = ses.SnsMessage.parse(body)
        except ValueError as error:
            raise self.malformed(request, f"the body {error}") from None
        await self._check(request, message, now)
        match message.kind:
            case ses.Kind.NOTIFICATION:
                if desk.was_told(f"{self.source} {message.message_id}"):
                    return self.done(request, Outcome.REPEATED)
                try:
                    report = ses.report_of(message.text, reported_as=bounces.REPORTED_AS)
                except ValueError as error:
                    raise self.malformed(request, f"the message {error}") from None
                if report is None:
                    return self.done(request, Outcome.NOTHING)
                return await self.take(request, message.message_id, [report])
            case ses.Kind.SUBSCRIPTION:
                if not ses.is_subscribe_url(message.subscribe_url):
                    raise self.refused(request, "the SubscribeURL is not Amazon's")
                try:
                    await desk.callbacks.fetch(message.subscribe_url)
                except FetchError as error:
                    self.tell(request, Outcome.UNAVAILABLE)
                    raise unavailable(f"the subscription could not be confirmed: {error}", retry_after_seconds=10) from None
                log.info("callback.subscribed topic=%s", message.topic)
                return self.done(request, Outcome.CONFIRMED)
            case ses.Kind.UNSUBSCRIPTION:
                # somebody ended it; to subscribe again is for a person
                log.error("callback.unsubscribed topic=%s", message.topic)
                return self.done(request, Outcome.NOTHING)

    async def _check(self, request: web.Request, message: ses.SnsMessage, now: datetime) -> None:
        """Raise ProblemError unless it is of a topic that we expect, signed by Amazon, and new."""
        desk = request.app[_DESK]
        if message.topic not in desk.callbacks.ses_topics:
            raise self.refused(request, "the topic is none of NOTIFY_SES_TOPICS")
        if not ses.is_certificate_url(message.certificate_url):
            raise self.refused(request, "the SigningCertURL is not Amazon's")
        try:
            certificate = await desk.certificate(message.certificate_url)
        except FetchError as error:
            self.tell(request, Outcome.UNAVAILABLE)
            raise unavailable(f"the certificate could not be fetched: {error}", retry_after_seconds=10) from None
        try:
            message.check_signature(certificate, now=now)
        except ses.ForgedError as error:
            desk.forget_certificate(message.certificate_url)
            raise self.refused(request, str(error)) from None
        if abs(now - message.at) > SNS_AGE:
            raise self.refused(request, "it was signed too long ago", Outcome.STALE)


class Receipts(CallbackPage):
    """Reports of services of ours."""

    view_name, view_path, source = "callback-receipts", "/callbacks/receipts", "receipts"
    about = "reports on deliveries, JSON {reports: [{provider, reference, status, at, code, suppresses}]}, signed (standard-webhooks)"

    async def post(self, request: web.Request) -> web.Response:
        """Answer 204 once Kafka has all of the reports."""
        callbacks, now = request.app[_DESK].callbacks, request.app[SITE].context.now()
        body = await body_of(request, most=MAX_REPORTS_BYTES)
        try:
            message_id = signing.verify(callbacks.keys, request.headers, body, now=now)
        except signing.StaleSignatureError as error:
            raise self.refused(request, str(error), Outcome.STALE) from None
        except signing.BadSignatureError as error:
            raise self.refused(request, str(error)) from None
        try:
            reports = parse_reports(body)
        except ProblemError:
            self.tell(request, Outcome.MALFORMED)
            raise
        return await self.take(request, message_id, reports)


def parse_reports(body: bytes) -> list[DeliveryReport]:
    """Return the reports in a body. Raises ProblemError, naming the field and never its value."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        given = None
    listed = given.get("reports") if isinstance(given, dict) else None
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_REPORTS:
        raise ProblemError(ProblemType.BAD_REQUEST, f"the body must be a JSON object with 1 to {MAX_REPORTS} reports")
    return [_report(each, f"reports[{number}]") for number, each in enumerate(listed)]


def _report(given: object, place: str) -> DeliveryReport:
    if not isinstance(given, dict):
        raise invalid_field(place, "is no object")
    unknown = next((name for name in given if name not in {"provider", "reference", "status", "at", "code", "suppresses"}), None)
    if unknown is not None:
        raise invalid_field(f"{place}.{unknown[:100]}", "is not a field")

    def text(name: str, *, is_required: bool = True, allowed: frozenset[str] | None = None) -> str | None:
        value = given.get(name)
        if value is None and not is_required:
            return None
        if not isinstance(value, str) or not value or len(value) > _MAX_TEXT:
            raise invalid_field(f"{place}.{name}", f"is no text of 1 to {_MAX_TEXT} characters")
        if allowed is not None and value not in allowed:
            raise invalid_field(f"{place}.{name}", "is none of the words that it may be", allowed=sorted(allowed))
        return value

    provider, reference = text("provider") or "", text("reference") or ""
    status = text("status", allowed=frozenset(REPORTED)) or ""
    code = plain_code(text("code", is_required=False))  # services quote what servers say, addresses included
    suppresses = text("suppresses", is_required=False, allowed=frozenset(Suppression))
    try:
        at = datetime.fromisoformat(text("at") or "")
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise invalid_field(f"{place}.at", "is no time such as 2026-01-15T09:30:00Z")
    identity = digest(provider, reference, status, code or "", size=16)
    return DeliveryReport(
        report_id=identity, provider=provider, reference=reference, status=status, code=code, at=at, suppresses=suppresses
    )
