"""Every answer that is no success has one shape: `application/problem+json` (RFC 9457).

`type` is a stable name to program against, `title` the same for each of a type, `detail` for this one, `instance` the
path that was asked for. Some types add members, such as `parameter` and `allowed`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from faust.web.exceptions import WebError

CONTENT_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:flowmart:notifications:problem:"

log = logging.getLogger(__name__)


class ProblemType(StrEnum):
    """Last part of a problem's `type`."""

    BAD_PARAMETER = "bad-parameter"
    BAD_REQUEST = "bad-request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    BAD_SIGNATURE = "bad-signature"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    TOO_LARGE = "too-large"
    UNSUPPORTED_TYPE = "unsupported-type"
    INVALID_FIELD = "invalid-field"
    TOO_MANY = "too-many-requests"
    INTERNAL = "internal"
    BAD_ANSWER = "bad-answer"
    UNAVAILABLE = "unavailable"


_KINDS: Mapping[ProblemType, tuple[HTTPStatus, str]] = {
    ProblemType.BAD_PARAMETER: (HTTPStatus.BAD_REQUEST, "A parameter is not valid"),
    ProblemType.BAD_REQUEST: (HTTPStatus.BAD_REQUEST, "The request is not valid"),
    ProblemType.UNAUTHORIZED: (HTTPStatus.UNAUTHORIZED, "A valid token is required"),
    ProblemType.FORBIDDEN: (HTTPStatus.FORBIDDEN, "The token does not allow this"),
    ProblemType.BAD_SIGNATURE: (HTTPStatus.FORBIDDEN, "The signature is not valid"),
    ProblemType.NOT_FOUND: (HTTPStatus.NOT_FOUND, "Not found"),
    ProblemType.METHOD_NOT_ALLOWED: (HTTPStatus.METHOD_NOT_ALLOWED, "Method not allowed"),
    ProblemType.TOO_LARGE: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too large"),
    ProblemType.UNSUPPORTED_TYPE: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The content has another type than is read here"),
    ProblemType.INVALID_FIELD: (HTTPStatus.UNPROCESSABLE_ENTITY, "A field of the request is not valid"),
    ProblemType.TOO_MANY: (HTTPStatus.TOO_MANY_REQUESTS, "Too many requests"),
    ProblemType.INTERNAL: (HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error"),
    ProblemType.BAD_ANSWER: (HTTPStatus.BAD_GATEWAY, "Another worker gave no usable answer"),
    ProblemType.UNAVAILABLE: (HTTPStatus.SERVICE_UNAVAILABLE, "Not available right now"),
}


class ProblemError(WebError):
    """A page cannot answer. `members` are added to the problem; never personal data."""

    def __init__(self, kind: ProblemType, detail: str, *, headers: Mapping[str, str] | None = None, **members: object) -> None:
        super().__init__(detail, code=_KINDS[kind][0])
        self.kind = kind
        self.problem_detail = detail
        self.headers = dict(headers or {})
        self.members = members


def bad_parameter(parameter: str, allowed: str) -> ProblemError:
    """Return the problem of a `parameter` that is not one of `allowed`."""
    return ProblemError(ProblemType.BAD_PARAMETER, f"{parameter} must be {allowed}", parameter=parameter, allowed=allowed)


def invalid_field(field: str, problem: str, **members: list[str]) -> ProblemError:
    """Return the problem of a `field` of the body, such as `data.title`. Neither may repeat a value of the request."""
    given: dict[str, Any] = {"field": field, **members}
    return ProblemError(ProblemType.INVALID_FIELD, f"{field} {problem}", **given)


def unavailable(detail: str, *, retry_after_seconds: int = 1) -> ProblemError:
    """Return the problem of what will be there again soon."""
    return ProblemError(ProblemType.UNAVAILABLE, detail, headers={"Retry-After": str(retry_after_seconds)})


def response(problem: ProblemError, request: web.BaseRequest) -> web.Response:
    """Return `problem` as the answer to `request`."""
    status, title = _KINDS[problem.kind]
    body: dict[str, object] = {
        "type": TYPE_PREFIX + problem.kind,
        "title": title,
        "status": status.value,
        "detail": problem.problem_detail,
        "instance": request.rel_url.raw_path,
        **problem.members,
    }
    return web.Response(body=orjson.dumps(body), status=status, content_type=CONTENT_TYPE, headers=problem.headers)


def of_status(status: int, *, allow: str | None = None) -> ProblemError:
    """Return the problem for an HTTP status that the framework chose."""
    match status:
        case HTTPStatus.NOT_FOUND:
            return ProblemError(ProblemType.NOT_FOUND, "there is no such page; the pages are listed at /")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"Allow": allow} if allow else None
            return ProblemError(ProblemType.METHOD_NOT_ALLOWED, "the page exists, but not for this method", headers=headers)
        case _ if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return ProblemError(ProblemType.BAD_REQUEST, HTTPStatus(status).phrase)
    return ProblemError(ProblemType.INTERNAL, "the request could not be answered; the cause is in the worker's log")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each failure the shape of a problem, and each answer the headers that keep it out of caches."""
    answer: web.StreamResponse
    try:
        answer = await handler(request)
    except ProblemError as problem:
        answer = response(problem, request)
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        answer = response(of_status(error.status, allow=error.headers.get("Allow")), request)
    except Exception:
        # the edge of the web: an answer without the cause, which belongs in the log
        resource = request.match_info.route.resource
        log.exception("page.failed", extra={"page": resource.canonical if resource else None, "method": request.method})
        answer = response(of_status(HTTPStatus.INTERNAL_SERVER_ERROR), request)
    answer.headers.setdefault("Cache-Control", "no-store")
    answer.headers.setdefault("X-Content-Type-Options", "nosniff")
    return answer
