"""Asking the web of a running system, with a token of the service scope that lives for a minute."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
import orjson

from streams.cli.errors import CliError
from streams.registry import connection_options
from streams.security import RegistrySecurity
from streams.tokens import issue

NEEDS = frozenset({"NOTIFY_TOKEN_KEY"})
TIMEOUT_SECONDS = 10.0
TOKEN_LIFETIME_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server said. `body` None: it was no JSON."""

    status: int
    body: Any
    headers: Mapping[str, str]


def call(  # noqa: PLR0913 - what a request may have
    method: str,
    url: str,
    *,
    token: str | None = None,
    body: object = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    security: RegistrySecurity | None = None,
) -> Answer:
    """Return the answer to a request. Raises TimeoutError or aiohttp.ClientError when there is none.

    `security`: how the registry is asked.
    """
    return asyncio.run(_call(method, url, token=token, body=body, timeout_seconds=timeout_seconds, security=security))


def get(web_url: str, token_key: bytes, path: str, *, missing: str) -> Any:
    """Return the JSON of a page. Raises CliError: `missing` for 404, else what went wrong and what to do."""
    token = issue(token_key, user_id=None, lifetime_seconds=TOKEN_LIFETIME_SECONDS)
    try:
        answer = call("GET", web_url + path, token=token)
    except (TimeoutError, aiohttp.ClientError) as error:
        raise CliError(
            f"The web at {web_url} does not answer ({type(error).__name__}). Is a worker of the role views running there? "
            "NOTIFY_WEB_HOST and NOTIFY_WEB_PORT say where to look."
        ) from error
    detail = answer.body.get("detail") if isinstance(answer.body, dict) else None
    match answer.status:
        case HTTPStatus.OK if answer.body is not None:
            return answer.body
        case HTTPStatus.NOT_FOUND:
            raise CliError(missing)
        case HTTPStatus.UNAUTHORIZED:
            raise CliError(f"{web_url} does not accept our token: it has another NOTIFY_TOKEN_KEY, or its clock is wrong.")
        case HTTPStatus.SERVICE_UNAVAILABLE:
            raise CliError(f"The web is not ready: {detail or 'it answered 503'}. Try again shortly.")
    raise CliError(f"{web_url} answered {answer.status}{f': {detail}' if detail else ''}. Is this the web of a views worker?")


async def _call(  # noqa: PLR0913 - as above
    method: str, url: str, *, token: str | None, body: object, timeout_seconds: float, security: RegistrySecurity | None
) -> Answer:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    options = {} if security is None else connection_options(security)
    async with (
        aiohttp.ClientSession(timeout=timeout, **options) as session,
        session.request(method, url, headers=headers, json=body) as answer,
    ):
        raw = await answer.read()
        try:
            parsed = orjson.loads(raw)
        except orjson.JSONDecodeError:
            parsed = None
        return Answer(status=answer.status, body=parsed, headers={name.lower(): value for name, value in answer.headers.items()})
