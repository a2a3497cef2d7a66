"""What every way out promises, so that a sender knows what happened without knowing whom it talked to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from schemas.messages import Content, Delivery
    from schemas.status import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The provider's answer to an attempt that it took over. Holds no personal data: it is stored and logged.

    `reference` is the provider's own id of the delivery, for the trail; `code` its own code.
    """

    provider: str
    reference: str | None = None
    status: Literal[Status.SENT, Status.DELIVERED]
    code: str | None = None


class OnUnknown(StrEnum):
    """What to do with an attempt that may or may not have arrived: after SendUnknownError or a crash (design rule 4)."""

    RESEND = "resend"  # again, as the next attempt: the recipient's side knows a repetition by its id
    LEAVE = "leave"  # stays unknown until a delivery report or a person settles it


def service_of(route: str | None) -> str:
    """Return the service behind a provider that a route names after its slash: `webpush/fcm.googleapis.com`; empty where none is.

    Such services belong to others than the provider, and fail apart: each has a circuit and rates of its own, though calls
    and quotas are the provider's.
    """
    return (route or "").partition("/")[2]


class Channel(Protocol):
    """A way out through one provider. Where there are several providers for a channel, each is an object of its own.

    One object serves one event loop. Between `open` and `close`, up to `max_open` calls of `send` may run at once; the
    caller keeps to that number, since it is also how many deliveries a crash of the worker can double.
    """

    name: str  # a value of `schemas.topics.Channel`
    provider: str  # its name in the configuration, a short word: it is a metric label, and part of the trail
    reported_as: str  # the provider whom later reports name; the same for all through whom a delivery can be reported
    routes: frozenset[str] | None  # the values of `Delivery.route` that it can carry; None: all
    max_open: int  # calls at once per worker
    on_unknown: OnUnknown
    unknown_seconds: float  # RESEND: so long a report may settle an attempt of unknown end before the next one begins

    def record(self, delivery: Delivery) -> Receipt | None:
        """Return the receipt of a channel that calls nobody: the recorded status is all of its effect. None: call `send`."""

    def reference_of(self, delivery: Delivery, receipt: Receipt | None) -> str | None:
        """Return the name by which the provider's later reports speak of `delivery`; None: none come.

        `receipt` None: the provider was called, and nobody knows whether it took the delivery over. Where reports name an
        id of ours this returns it even so, and a report settles the attempt; an id that the provider makes is in the receipt.
        """

    async def open(self) -> None:
        """Get ready to send. Calls nobody: a worker starts while its provider is down. Repeating it changes nothing."""

    async def send(self, delivery: Delivery, content: Content) -> Receipt:
        """Hand `content` over to the provider, once, within the channel's own time limits. Never retries by itself.

        What the provider sees of `delivery` (its id and redrive generation) is the same at every attempt.
        Returns a receipt if, and only if, the provider said that it took the delivery over. Otherwise raises one of:

        - ProviderUnavailableError: nobody answered, or not to us; the delivery was not taken. Others will fare alike.
        - ProviderThrottledError: slow down, for `retry_after_seconds` where the provider said so. Not taken.
        - ProviderRefusedError: this delivery was refused for now. Others may pass.
        - ProviderRejectedError: this delivery will never be taken; also raised, without a call, for an address or
          content that cannot be sent. With `suppresses` the provider said that the address itself is dead.
        - SendUnknownError: everything left, and no answer came. Only then: what certainly was not taken is retryable.

        Each carries a short `code` and neither address nor content, in its text or its causes' text. A cancelled call
        may have arrived: its attempt is as unknown as one cut off by a crash. The channel stays usable.
        """

    async def look_up(self, delivery: Delivery, content: Content) -> Receipt | None:
        """Return the receipt of an attempt of unknown end, where the provider can be asked for it by what we know.

        None: it cannot be asked, or knows of no such attempt. Raises as `send` does when it does not answer.
        """

    async def close(self) -> None:
        """Leave no connection behind. Calls still running fail, at the latest at their time limit. May be opened again."""
