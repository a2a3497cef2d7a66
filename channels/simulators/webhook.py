"""A subscriber of status changes: what `channels.webhook` tells, on loopback.

It verifies each call as standardwebhooks.com asks and knows a repetition by its `webhook-id`. Every path below /hooks/ is an
endpoint, all with the same secret. The secret, and a file for NOTIFY_WEBHOOKS_FILE, are in its folder.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson

from channels.signing import ID, BadSignatureError, parse_secret, verify
from channels.simulators.http2 import Fault, Reply, Request
from channels.simulators.push import MAX_REMEMBERED, Pushed, PushSimulator
from channels.simulators.script import Behaviour

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "webhook"
FILE: Final = "webhooks.toml"
_HOOKS: Final = "/hooks/"


class WebhookSimulator(PushSimulator):
    """One subscriber, of HTTP unless told otherwise: a subscription cannot name an authority of its own.

    `messages` holds repetitions too, each under the `webhook-id` as its key; `told` each message once.
    """

    def __init__(self, *, is_secure: bool = False, **options: Any) -> None:
        super().__init__(is_secure=is_secure, **options)
        self.secret = ""
        self.ids: deque[str] = deque(maxlen=MAX_REMEMBERED)  # `webhook-id` of each call that was verified, taken or not
        self.forged = 0  # calls that were not

    @property
    def url(self) -> str:
        """Where it wants to be told."""
        return f"{self.origin}{_HOOKS}{NAME}"

    @property
    def file(self) -> Path:
        """What NOTIFY_WEBHOOKS_FILE should name, once it runs."""
        return self.folder / FILE

    @property
    def told(self) -> dict[str, Pushed]:
        """What it was told, by `webhook-id`: of each message the first call."""
        return {message.key: message for message in reversed(self.messages)}

    def subscription(self, name: str = NAME) -> str:
        """Return how it subscribes with its endpoint `name`: a table of the file that NOTIFY_WEBHOOKS_FILE names."""
        url = f"{self.origin}{_HOOKS}{name}"
        # a JSON text is a TOML text too
        return f"[webhooks.{name}]\nurl = {json.dumps(url)}\nsecret = {json.dumps(self.secret)}\nallow_private = true\n"

    def make_credentials(self, folder: Path) -> None:
        """Write `secret`, unless there is one, and the file that subscribes it where it listens now."""
        kept = folder / "secret"
        if not kept.exists():
            kept.touch(mode=0o600)
            kept.write_text(f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}\n", "ascii")
        self.secret = kept.read_text("ascii").strip()
        self.file.touch(mode=0o600)
        self.file.write_text(self.subscription(), "utf-8")

    def other(self, request: Request) -> Reply | None:
        """Know nothing outside of /hooks/."""
        return None if request.path.startswith(_HOOKS) else Reply(status=404)

    def token_of(self, request: Request) -> str:
        """Return the endpoint's name."""
        return urlsplit(request.path).path.removeprefix(_HOOKS)

    def refusal(self, request: Request) -> Reply | None:
        """Refuse what our sender did not sign, and what is no JSON object."""
        if request.method != "POST":
            return Reply(status=405)
        try:
            found = verify([parse_secret(self.secret)], request.headers, request.body, now=datetime.fromtimestamp(self._clock(), UTC))
        except BadSignatureError:
            self.forged += 1
            return Reply(status=401)
        self.ids.append(found)
        return None if _object(request.body) is not None else Reply(status=400)

    def message(self, request: Request) -> Pushed:
        """Return the message."""
        body = _object(request.body) or {}
        return Pushed(
            reference="",
            key=request.headers[ID],
            token=self.token_of(request),
            title=str(body.get("type", "")),
            message="",
            headers=request.headers,
            body=body,
            at=self.calls[-1],
        )

    def accepted(self, message: Pushed) -> Reply:
        """Say that it has the message, seen before or not: who is told twice need not be told again."""
        del message
        return Reply(status=204)

    def garbage(self) -> Fault:
        """Answer in another protocol: whatever the body of a 2xx says, it is one."""
        return Fault.NONSENSE

    def failed(self, behaviour: Behaviour) -> Reply:
        """Say no."""
        match behaviour:
            case Behaviour.THROTTLE:
                return Reply(status=429, headers=self.retry_after())
            case Behaviour.UNAVAILABLE:
                return Reply(status=503, headers=self.retry_after())
            case Behaviour.REFUSE:
                return Reply(status=500)
            case Behaviour.COMPLAIN:
                return Reply(status=410)
            case _:
                return Reply(status=422)


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
