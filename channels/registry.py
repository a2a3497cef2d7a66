"""Which channels there are. A new one is a module beside this one and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from channels.email import EmailChannel
from channels.in_app import InAppChannel

if TYPE_CHECKING:
    from channels.base import Channel


def build_channels(*, smtp_url: str, mail_from: str) -> dict[str, Channel]:
    """Return every channel by its name, none of them open. Raises SettingsError for a malformed URL or sender."""
    channels: tuple[Channel, ...] = (
        EmailChannel(smtp_url, mail_from),
        InAppChannel(),
    )
    return {channel.name: channel for channel in channels}
