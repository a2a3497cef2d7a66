"""Which channels there are. A new one is a module beside this one and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from channels.absent import AbsentChannel
from channels.email import EmailChannel
from channels.in_app import InAppChannel
from schemas import topics

if TYPE_CHECKING:
    from channels.base import Channel


def build_channels(*, smtp_url: str, mail_from: str, max_open: int = 32) -> dict[str, Channel]:
    """Return every channel by its name, none of them open. `max_open`: calls at once to a provider.

    Raises SettingsError for a malformed URL or sender.
    """
    channels: tuple[Channel, ...] = (
        # a connection a call, so that none waits for another; together shorter than a drain (streams.runner.DRAIN_SECONDS)
        EmailChannel(smtp_url, mail_from, max_open=max_open, pool_size=max_open, connect_timeout_seconds=5, send_timeout_seconds=12),
        InAppChannel(),
    )
    return {**{name: AbsentChannel(name) for name in topics.Channel}, **{channel.name: channel for channel in channels}}
