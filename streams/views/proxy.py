"""A request goes to the worker that owns the user's partition: any worker may be asked.

A forwarded request is never forwarded again (`FORWARDED`): while two workers disagree about who owns what, the client is
told to come back, instead of the workers asking each other in a circle.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import aiohttp
from aiohttp import web
from yarl import URL

from streams.views.problems import ProblemError, ProblemType, unavailable

FORWARDED = "X-Notify-Forwarded"
TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 1.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024
# of the owner's answer; everything else is the hop's own business
_PASSED_ON = ("Content-Type", "WWW-Authenticate", "Retry-After", "Allow", "Location", "Link")
# of the request, besides the token
_SENT_ON = ("Authorization", "Content-Type", "Idempotency-Key")

_REBALANCING = "the worker that holds this user's data is starting or changing; try again shortly"


class Proxy:
    """Forwards requests. `owner` gives the base URL of the worker that owns a partition; None: nobody else is known."""

    def __init__(self, owner: Callable[[int], str | None]) -> None:
        self._owner = owner
        self._session: aiohttp.ClientSession | None = None

    async def connected(self, application: web.Application) -> AsyncIterator[None]:
        """Hold connections while the web server runs."""
        del application
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS, sock_connect=CONNECT_TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as self._session:
            yield

    async def forward(self, request: web.Request, partition: int, *, body: bytes | None = None) -> web.Response:
        """Return the answer of the worker that owns `partition`. `body`: the request's, from a page that has read it.

        Raises ProblemError: 503 when nobody owns the partition right now or its owner does not answer in time, 502 when
        its answer is too large.
        """
        base = self._owner(partition)
        if base is None or FORWARDED in request.headers or self._session is None:
            raise unavailable(_REBALANCING)
        sent_on = {name: request.headers[name] for name in _SENT_ON if name in request.headers}
        headers = {FORWARDED: "1", "Accept-Encoding": "identity", **sent_on}
        url = URL(base.rstrip("/") + request.rel_url.raw_path_qs, encoded=True)
        try:
            async with self._session.request(request.method, url, headers=headers, data=body, allow_redirects=False) as answer:
                body = await _bounded(answer.content)
                passed_on = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
                return web.Response(status=answer.status, body=body, headers=passed_on)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise unavailable(_REBALANCING) from error


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    async for chunk in content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise ProblemError(ProblemType.BAD_ANSWER, f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)
