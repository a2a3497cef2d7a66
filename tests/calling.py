"""What tests of a channel have in common: a delivery to call it with, the channel open, and how a call failed."""

from __future__ import annotations

import datetime as dt
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from channels.base import Channel
from channels.config import ProviderConfig, parse_providers
from schemas.errors import NotifyError, ProviderError, SendUnknownError
from schemas.messages import Content, Delivery

C = TypeVar("C", bound=Channel)


def delivery_on(channel: str, number: int = 1, **changes: Any) -> Delivery:
    """Return a delivery as a channel sees it: its content stands beside it."""
    now = dt.datetime.now(dt.UTC)
    delivery = Delivery(
        delivery_id=f"{number:032x}-{channel}",
        notification_id=f"{number:032x}",
        user_id="u-1",
        channel=channel,
        lane="normal",
        rule="payment-received",
        category="payments",
        generation=0,
        attempt=1,
        sealed=b"",
        accepted_at=now,
        created_at=now,
    )
    return replace(delivery, **changes)


def config_of(url: str, **environment: str) -> ProviderConfig:
    (config,) = parse_providers(url, environment)
    return config


@asynccontextmanager
async def opened(channel: C) -> AsyncIterator[C]:
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


async def failure_of(channel: Channel, delivery: Delivery, content: Content, *secrets: str) -> ProviderError | SendUnknownError:
    """Return the error of a send, having seen that it tells nothing about anybody."""
    with pytest.raises(NotifyError) as caught:
        await channel.send(delivery, content)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert not [each for each in ("planted", *secrets) if each in told]
    assert isinstance(caught.value, ProviderError | SendUnknownError)
    return caught.value


def is_a(error: NotifyError, kind: type[NotifyError], code: str) -> bool:
    assert isinstance(error, ProviderError | SendUnknownError)
    return (type(error), error.code) == (kind, code)
