"""Who is told of status changes, as data: a table of a TOML file for each. Calls nobody.

[webhooks.orders]
url = "https://orders.flowmart.example/hooks/notifications"
secret = "$ORDERS_WEBHOOK_SECRET"            # whsec_…; several, between spaces, while one takes over from the other
statuses = ["delivered", "bounced", "failed"]  # default: every way in which a delivery ends, and sent
channels = ["email", "sms"]                    # default: all
categories = ["payments"]                      # default: all; nobody knows that of what a recipient did
per_second = 50                                # default: no limit
allow_private = true                           # for a subscriber inside: addresses that are not of the internet; default false
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from channels.config import ProviderConfig
from channels.signing import parse_secret
from schemas import topics
from schemas.errors import SettingsError
from schemas.messages import StatusChange
from schemas.status import Engagement, Status, is_terminal

MAX_SUBSCRIPTIONS: Final = 50
DEFAULT_STATUSES: Final = frozenset({Status.SENT, *(status for status in Status if is_terminal(status))})
_STATUSES: Final = frozenset({*Status, *Engagement})
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_VARIABLE: Final = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?")
_KNOWN: Final = frozenset({"url", "secret", "statuses", "channels", "categories", "per_second", "allow_private"})
_LEAST_RATE: Final = 0.01
_MOST_RATE: Final = 1_000_000.0
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address is in its last 32 bits
_SUPPORTED: Final = frozenset(topics.Channel) - {topics.Channel.WEBHOOK}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """Who is told of status changes, and of which. `channels` and `categories` None: of all.

    The URL is kept as a secret is: it may hold one.
    """

    name: str
    url: str = field(repr=False)
    keys: tuple[bytes, ...] = field(repr=False)
    statuses: frozenset[str] = DEFAULT_STATUSES
    channels: frozenset[str] | None = None
    categories: frozenset[str] | None = None
    per_second: float | None = None
    allow_private: bool = False

    def wants(self, change: StatusChange) -> bool:
        """Say whether the subscriber is told of a change. What a change does not say keeps nobody from it."""
        return (
            change.status in self.statuses
            and (self.channels is None or change.channel is None or change.channel in self.channels)
            and (self.categories is None or change.category is None or change.category in self.categories)
        )

    @property
    def config(self) -> ProviderConfig:
        """The subscription as a provider among others."""
        return ProviderConfig(name=self.name, scheme="webhook", host=None, port=None, path="", username=None, per_second=self.per_second)


def parse_subscriptions(text: str, env: Mapping[str, str]) -> tuple[Subscription, ...]:
    """Return the subscriptions in a TOML text: a table `[webhooks.NAME]` each. Raises SettingsError with every problem."""
    try:
        tables = tomllib.loads(text).get("webhooks", {})
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([f"the file of webhooks is not TOML: {error}"]) from None
    if not isinstance(tables, dict) or len(tables) > MAX_SUBSCRIPTIONS:
        raise SettingsError([f"the file of webhooks has no tables [webhooks.NAME], or more than {MAX_SUBSCRIPTIONS}"])
    found: list[Subscription] = []
    problems: list[str] = []
    for name, table in tables.items():
        try:
            found.append(_subscription(name, table if isinstance(table, dict) else {}, env))
        except ValueError as error:
            problems.append(f"webhook {name[:40]}: {error}")
    if problems:
        raise SettingsError(problems)
    return tuple(found)


def _subscription(name: str, table: Mapping[str, Any], env: Mapping[str, str]) -> Subscription:
    """Return the subscription in a table. Raises ValueError, which quotes neither URL nor secret."""
    if not _NAME.fullmatch(name):
        raise ValueError("its name is not 1 to 40 small letters, digits and hyphens")
    unknown = sorted(set(table) - _KNOWN)
    if unknown:
        raise ValueError(f"{unknown[0][:40]} is not an option; options: {', '.join(sorted(_KNOWN))}")
    allow_private = table.get("allow_private", False)
    if not isinstance(allow_private, bool):
        raise ValueError("allow_private is neither true nor false")  # noqa: TRY004 - of a file, not of a caller
    url = _text(table, "url", env)
    _check_url(url, allow_private=allow_private)
    return Subscription(
        name=name,
        url=url,
        keys=_keys(_text(table, "secret", env)),
        statuses=_words(table, "statuses", _STATUSES) or DEFAULT_STATUSES,
        channels=_words(table, "channels", _SUPPORTED),
        categories=_words(table, "categories", None),
        per_second=_rate(table.get("per_second")),
        allow_private=allow_private,
    )


def _text(table: Mapping[str, Any], option: str, env: Mapping[str, str]) -> str:
    """Return an option's text, with the variables in it replaced by their values."""
    value = table.get(option)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"it has no {option}")
    missing = next((each for each in _VARIABLE.findall(value) if each not in env), None)
    if missing is not None:
        raise ValueError(f"${missing} is not in the environment")
    return _VARIABLE.sub(lambda match: env[match[1]], value).strip()


def _keys(text: str) -> tuple[bytes, ...]:
    try:
        return tuple(parse_secret(each) for each in text.split())
    except ValueError as error:
        raise ValueError(f"its secret {error}") from None


def _words(table: Mapping[str, Any], option: str, allowed: frozenset[str] | None) -> frozenset[str] | None:
    """Return the words of an option; None: it is not there. `allowed` None: any word."""
    value = table.get(option)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{option} is not a list of words")
    if allowed is not None and not allowed >= set(value):
        raise ValueError(f"{option} is not a list of {', '.join(sorted(allowed))}")
    return frozenset(value)


def _rate(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST_RATE <= value <= _MOST_RATE:
        raise ValueError(f"per_second is not a number from {_LEAST_RATE:g} to {_MOST_RATE:g}")
    return float(value)


def _check_url(url: str, *, allow_private: bool) -> None:
    """Raise ValueError unless a subscriber may be at `url`: on the internet with TLS, or inside by express wish."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("its url is none") from None
    if parts.scheme not in {"https", "http"} or not host or parts.username is not None or parts.fragment or not url.isascii():
        raise ValueError("its url is not an https URL, without name or password")
    is_loopback = host == "localhost" or (_address(host) is not None and ipaddress.ip_address(host).is_loopback)
    if parts.scheme == "http" and not (is_loopback and allow_private):
        raise ValueError("its url is not https; http is for this machine only, with allow_private")
    if not allow_private and (is_loopback or (_address(host) is not None and not is_public(host))):
        raise ValueError("its url is not of the internet; allow_private permits it")


def is_public(address: str) -> bool:
    """Say whether an address is one of the internet: not private, loopback, link-local, shared or reserved, whatever it wraps."""
    found = _address(address)
    if found is None:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        wrapped = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if wrapped is not None:
            return wrapped.is_global and not wrapped.is_multicast
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
