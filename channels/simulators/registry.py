"""Which simulators there are, for the command `notify simulate` and for `notify up`. A new one is a line here."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from channels.simulators.apns import ApnsSimulator
from channels.simulators.fcm import FcmSimulator
from channels.simulators.smpp import SmppSimulator
from channels.simulators.smtp import SmtpSimulator
from channels.simulators.twilio import TwilioSimulator
from channels.simulators.webhook import WebhookSimulator
from channels.simulators.webpush import WebPushSimulator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from channels.simulators.script import Script


class Simulator(Protocol):
    """A provider on loopback. Entering it starts it; what it was started with stays when it ends."""

    script: Script  # may be replaced at any time
    calls: deque[float]  # when it was called, by a monotonic clock, the newest last

    @property
    def messages(self) -> Collection[Any]:
        """What was accepted, the newest last."""

    @property
    def port(self) -> int:
        """Where it listens."""

    @property
    def url(self) -> str:
        """How to configure a provider with it: an entry of NOTIFY_PROVIDERS. Of a subscriber: where it is told."""

    async def __aenter__(self) -> Self:
        """Listen."""

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        """Leave nothing behind."""


# name -> (its port unless told, whether it makes credentials in a folder, its class)
SIMULATORS: Mapping[str, tuple[int, bool, Callable[..., Simulator]]] = {
    "smtp": (2525, False, SmtpSimulator),
    "smpp": (2775, False, SmppSimulator),
    "twilio": (4010, False, TwilioSimulator),
    "fcm": (4011, True, FcmSimulator),
    "apns": (4012, True, ApnsSimulator),
    "webpush": (4013, True, WebPushSimulator),
    "webhook": (4014, True, WebhookSimulator),
}


def build_simulator(name: str, *, script: Script, port: int | None = None, folder: Path | None = None, seed: int = 0) -> Simulator:
    """Return a simulator, not started. `port` None: its usual one, 0: any; `folder`: where its credentials are made."""
    usual, has_credentials, make = SIMULATORS[name]
    options: dict[str, Any] = {"folder": folder} if has_credentials else {}
    return make(script=script, port=usual if port is None else port, seed=seed, **options)
