"""HTTP/1.1 to one origin, for the peers that speak no HTTP/2 (`channels.http2`): the same request, answer and errors.

Less can be known: once a request began to leave, a lost connection tells nothing about what the peer did.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver

from channels.http2 import MAX_ANSWER_BYTES, Answer
from schemas.errors import ProviderUnavailableError, SendUnknownError

_IDLE_SECONDS: Final = 20.0  # shorter than what servers allow, so that few requests meet a connection that is just ending

_FAILURES: Final = (aiohttp.ClientError, OSError, ValueError, RuntimeError)  # the last: closed meanwhile


class _Progress:
    """How far a request came."""

    is_leaving = False


class Http1Client:
    """Requests to one origin, such as `https://push.example`. Each runs on a connection of its own, kept for the next.

    `resolver`: looks names up, at each connection; None: the system's, which remembers them for a while. `needs_body` False:
    the status is the answer, and a body that breaks off, has no end or is too long is as good as none.
    """

    def __init__(  # noqa: PLR0913 - limits, each by name
        self,
        origin: str,
        *,
        tls: ssl.SSLContext | None,
        max_open: int,
        connect_seconds: float = 5.0,
        total_seconds: float = 12.0,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        resolver: AbstractResolver | None = None,
        needs_body: bool = True,
    ) -> None:
        self._origin = origin
        self._tls = tls
        self._max_open = max_open
        # the connector never waits for a free connection: it has as many as there are calls at once
        self._timeout = aiohttp.ClientTimeout(total=total_seconds, connect=connect_seconds)
        self._max_answer_bytes = max_answer_bytes
        self._resolver = resolver
        self._needs_body = needs_body
        self._session: aiohttp.ClientSession | None = None
        self._is_open = True

    async def post(self, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Answer:
        """Send one request and return its answer, as `Http2Client.post` does. Follows no redirection."""
        return await self._ask("POST", path, headers, body)

    async def get(self, path: str, headers: Sequence[tuple[bytes, bytes]]) -> Answer:
        """Ask for `path` and its query. As `post`, but raises ProviderUnavailableError alone: asking again changes nothing."""
        try:
            return await self._ask("GET", path, headers, None)
        except SendUnknownError as error:
            raise ProviderUnavailableError(str(error), code=error.code) from None

    async def _ask(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes | None) -> Answer:
        if not self._is_open:
            raise ProviderUnavailableError("the channel is closed", code="closed")
        progress = _Progress()
        named = {name.decode("ascii"): value.decode("ascii") for name, value in headers}
        try:
            async with self._opened().request(
                method, path, headers=named, data=body, allow_redirects=False, trace_request_ctx=progress
            ) as answer:
                try:
                    text = await self._read(answer)
                except _FAILURES:
                    if self._needs_body:
                        raise
                    text = b""
                return Answer(status=answer.status, headers={name.lower(): value for name, value in answer.headers.items()}, body=text)
        except _FAILURES as error:
            # no cause: their texts quote the path, which is an address
            raise _meaning(error, is_leaving=progress.is_leaving) from None

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        text = bytearray()
        async for chunk in answer.content.iter_chunked(2**16):
            text += chunk
            if len(text) > self._max_answer_bytes:
                raise ValueError("the answer has no end")
        return bytes(text)

    async def close(self) -> None:
        """End every connection. Requests still running fail."""
        self._is_open = False
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_request_headers_sent.append(_began)
            self._session = aiohttp.ClientSession(
                self._origin,
                connector=aiohttp.TCPConnector(
                    ssl=self._tls or True,
                    limit=self._max_open,
                    keepalive_timeout=_IDLE_SECONDS,
                    resolver=self._resolver,
                    use_dns_cache=self._resolver is None,
                ),
                timeout=self._timeout,
                trace_configs=[trace],
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session


async def _began(_: aiohttp.ClientSession, context: object, __: aiohttp.TraceRequestHeadersSentParams) -> None:
    progress = getattr(context, "trace_request_ctx", None)
    assert isinstance(progress, _Progress)
    progress.is_leaving = True


def _meaning(error: Exception, *, is_leaving: bool) -> ProviderUnavailableError | SendUnknownError:
    is_late = isinstance(error, TimeoutError)
    if is_leaving:
        code = "timeout" if is_late else "protocol" if isinstance(error, aiohttp.ClientResponseError | ValueError) else "connection"
        return SendUnknownError(f"no answer came from the provider: {code}", code=code)
    code = "tls" if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError) else "connect"
    return ProviderUnavailableError(f"no connection to the provider: {code}", code=code)
