"""The page behind a mail's link to leave: for mail programs one POST (RFC 8058), for people a page with a button.

Looking changes nothing, since scanners follow every link of a mail. The choice is an order on the topic `control`, which
routers obey a moment after it was answered. Repeating it changes nothing.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from email import message_from_bytes
from email.policy import HTTP
from hashlib import sha256
from html import escape
from http import HTTPStatus
from urllib.parse import parse_qsl

import faust
from aiohttp import web

from schemas import topics
from schemas.errors import NotifyError
from schemas.messages import ControlEntry
from schemas.status import Suppression
from schemas.topics import Channel
from streams.unsubscribe import PATH, ExpiredLinkError, InvalidLinkError, Unsubscribe, open_token
from streams.views.pages import PUBLISH_TIMEOUT_SECONDS, SITE, Page, add_pages, body_of
from streams.views.problems import ProblemError, ProblemType, unavailable

MAX_BODY_BYTES = 4 * 1024
_FIELD, _ONE_CLICK = "List-Unsubscribe", "One-Click"
_WORDS = {Channel.EMAIL: "e-mails", Channel.SMS: "text messages", Channel.PUSH: "push messages", Channel.IN_APP: "messages"}

_STYLE = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#5b6775;--paper:#fff;--back:#f3f5f8;--line:#dfe4ea;
--act:#1f5fd0;--on:#fff;--good:#1a7f4b}
@media(prefers-color-scheme:dark){:root{--ink:#e8edf3;--soft:#a3afbd;--paper:#1a212b;--back:#10151c;--line:#2e3844;
--act:#6ea3ff;--on:#0d1420;--good:#58c98d}}
*{box-sizing:border-box}
body{margin:0;min-height:100vh;display:grid;place-items:center;padding:24px;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{width:100%;max-width:440px;background:var(--paper);border:1px solid var(--line);border-radius:14px;padding:36px 34px 30px;
box-shadow:0 10px 30px rgb(16 24 40/.07)}
.brand{margin:0 0 26px;font-weight:700;letter-spacing:.01em;color:var(--soft);font-size:.95rem}
.brand b{color:var(--act)}
h1{margin:0 0 10px;font-size:1.45rem;line-height:1.25;letter-spacing:-.01em}
p{margin:0 0 14px}
.small{color:var(--soft);font-size:.875rem;margin:20px 0 0}
button{appearance:none;border:0;border-radius:9px;background:var(--act);color:var(--on);font:inherit;font-weight:600;
padding:12px 20px;width:100%;margin-top:8px;cursor:pointer}
button:hover{filter:brightness(1.08)}
button:focus-visible{outline:3px solid color-mix(in srgb,var(--act) 45%,transparent);outline-offset:2px}
.done{color:var(--good)}
"""
_STYLE_HASH = b64encode(sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # the address of the page is all that it takes to act
    "X-Robots-Tag": "noindex, nofollow",
}


def install_unsubscribe(app: faust.App) -> None:
    """Add the page to `app`, after `pages.install` and before its web server starts."""
    add_pages(app, (Leave,))


class Leave(Page):
    """Ends notifications of a category to an address."""

    view_name, view_path, methods_shown = "unsubscribe", f"{PATH}{{token:[^/]+}}", "GET, POST"
    about = "leave a category, as a mail's List-Unsubscribe says; GET shows a page, POST acts; the link is the token"

    async def get(self, request: web.Request, token: str) -> web.Response:
        """Answer with a page that asks; nothing changes."""
        found = _open(request, token)
        if isinstance(found, web.Response):
            return found
        what = _what(found)
        return _page(
            f"Stop {what}?",
            f"<p>You will get no more {escape(what)} from FlowMart at this address.</p>"
            f'<form method="post"><input type="hidden" name="{_FIELD}" value="{_ONE_CLICK}">'
            f"<button>Stop these {escape(_channel_words(found))}</button></form>"
            '<p class="small">Messages that you ask for yourself, such as codes to sign in, still come.</p>',
        )

    async def post(self, request: web.Request, token: str) -> web.Response:
        """Answer 200 once Kafka has the order. The body says `List-Unsubscribe=One-Click`, as RFC 8058 has it."""
        found = _open(request, token)
        if isinstance(found, web.Response):
            return found
        form = await _form(request)
        if form.get(_FIELD) != _ONE_CLICK:
            raise ProblemError(ProblemType.BAD_REQUEST, f"the body must say {_FIELD}={_ONE_CLICK}")
        await _publish(request, found)
        return _page(
            "Done",
            f"<p>You will get no more {escape(_what(found))} at this address.</p>"
            '<p class="small">It may take a minute, and what is already under way still arrives. You may close this page.</p>',
            mark='<span class="done" aria-hidden="true">✓ </span>',
        )


def _open(request: web.Request, token: str) -> Unsubscribe | web.Response:
    """Return what the link ends, or the page that says why it ends nothing."""
    context = request.app[SITE].context
    help_ = '<p class="small">Our newest message to you has a fresh link: your mail program shows it as “Unsubscribe”.</p>'
    try:
        return open_token(context.token_key, token, now=context.now())
    except ExpiredLinkError:
        return _page("This link has expired", f"<p>It was made more than 60 days ago.</p>{help_}", status=HTTPStatus.GONE)
    except InvalidLinkError:
        text = f"<p>Some of it may have been lost on the way.</p>{help_}"
        return _page("This link does not work", text, status=HTTPStatus.NOT_FOUND)


async def _publish(request: web.Request, found: Unsubscribe) -> None:
    context = request.app[SITE].context
    order = ControlEntry(scope=found.order_scope, reason=Suppression.UNSUBSCRIBED, issued_at=context.now())
    try:
        async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
            await context.publish(topics.CONTROL, order.scope.encode(), order)
    except (TimeoutError, NotifyError) as error:
        raise unavailable("Kafka did not confirm in time; asking again is safe", retry_after_seconds=5) from error


async def _form(request: web.Request) -> dict[str, str]:
    """Return the fields of the body, urlencoded or multipart. Raises ProblemError for another or too large one."""
    body = await body_of(request, most=MAX_BODY_BYTES)
    match request.content_type:
        case "application/x-www-form-urlencoded":
            return dict(parse_qsl(body.decode("ascii", errors="replace")))
        case "multipart/form-data":
            head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode("ascii", errors="replace")
            parts = message_from_bytes(head + body, policy=HTTP)
            texts = (part for part in parts.walk() if not part.is_multipart())
            return {str(part.get_param("name", header="content-disposition")): part.get_content().strip() for part in texts}
    raise ProblemError(ProblemType.UNSUPPORTED_TYPE, "the body must be application/x-www-form-urlencoded or multipart/form-data")


def _channel_words(found: Unsubscribe) -> str:
    return _WORDS.get(Channel(found.channel), "messages") if found.channel in set(Channel) else "messages"


def _what(found: Unsubscribe) -> str:
    """Return what ends, in words: e-mails about payments."""
    about = re.sub(r"[^a-z0-9]+", " ", found.category.lower()).strip()
    return _channel_words(found) + (f" about {about}" if about and about != "messages" else "")


def _page(title: str, body: str, *, status: HTTPStatus = HTTPStatus.OK, mark: str = "") -> web.Response:
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)} · FlowMart</title><style>{_STYLE}</style></head><body><main>"
        f'<p class="brand"><b>Flow</b>Mart notifications</p><h1>{mark}{escape(title)}</h1>{body}</main></body></html>'
    )
    return web.Response(text=text, status=status, content_type="text/html", headers=_HEADERS)
