"""What channels ask of the worker around them, for tests that have none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from channels.config import Ports
from schemas.messages import Delivery, DeliveryReport

RETURN_KEY = b"r" * 32


async def _nobody(_report: DeliveryReport) -> None:
    raise AssertionError("no report was expected")


def no_ports(
    mail_from: str = "FlowMart <no-reply@shop.example>",
    *,
    max_open: int = 32,
    report: Callable[[DeliveryReport], Awaitable[None]] = _nobody,
    unsubscribe_url: Callable[[Delivery, str], str | None] = lambda _delivery, _address: None,
    callback_url: Callable[[str], str | None] = lambda _provider: None,
) -> Ports:
    """Return ports that publish nothing and know no page, except for what is given."""
    return Ports(
        mail_from=mail_from,
        max_open=max_open,
        report=report,
        unsubscribe_url=unsubscribe_url,
        callback_url=callback_url,
        return_key=RETURN_KEY,
    )
