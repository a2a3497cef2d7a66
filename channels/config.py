"""Which providers there are, as data: a URL for each, with its options.

    smtp+starttls://user:$SMTP_PASSWORD@mail.example:587?name=ses-eu&weight=3&per_second=100
    smpp://system:$SMPP_PASSWORD@smsc.example:2775?name=carrier-de&routes=DE,AT&per_second=50
    twilio://AC0123:$TWILIO_TOKEN@api.twilio.com?from=%2B14155550100

`$NAME` and `${NAME}` stand for a variable of the environment, so that no secret need stand in a file. The scheme says
which module carries it (`channels.registry`), and so which channel. Every provider takes these options:

`name`        what trail and metrics call it; default: the scheme's first word
`weight`      its share among healthy providers of the channel; default 1; 0: only when no other is left
`routes`      countries (`DE,FR`) of numbers, that it may carry; default: all
`per_second`  calls a second that the provider allows; default: no limit
`per_day`     calls a day (UTC) that it allows; default: no limit
`max_open`    calls at once in a worker; default: NOTIFY_MAX_OPEN_ATTEMPTS
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from schemas.errors import SettingsError

if TYPE_CHECKING:
    from schemas.messages import Delivery, DeliveryReport

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_ROUTE = re.compile(r"[A-Za-z0-9_-]{1,20}")
MAX_PROVIDERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderConfig:
    """One provider. `per_second` and `per_day` are what the provider allows in total, not what one worker may use."""

    name: str
    scheme: str
    host: str | None
    port: int | None
    path: str  # without the leading slash, not decoded
    username: str | None
    password: str = field(default="", repr=False)
    weight: float = 1.0
    routes: frozenset[str] | None = None
    per_second: float | None = None
    per_day: int | None = None
    max_open: int | None = None
    options: Mapping[str, str] = field(default_factory=dict, repr=False)  # the others: the module's own

    def option(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Return an option of the module's own. Raises SettingsError when `parse` raises ValueError."""
        text = self.options.get(name)
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise SettingsError([f"provider {self.name}: {name} {error}"]) from None

    def only(self, *names: str) -> None:
        """Raise SettingsError for an option that is none of `names`."""
        unknown = sorted(set(self.options) - set(names))
        if unknown:
            known = ", ".join(sorted({*_COMMON, *names}))
            raise SettingsError([f"provider {self.name}: {unknown[0]} is not an option; options: {known}"])

    def require(self, **parts: object) -> None:
        """Raise SettingsError for the first part that is missing: a part's value, by what it is called."""
        for what, value in parts.items():
            if not value:
                raise SettingsError([f"provider {self.name}: its url has no {what.replace('_', ' ')}"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """What a channel may ask of the worker around it.

    `report` publishes a provider's later word and returns when it is durable; `unsubscribe_url` returns where a click
    ends mails of the delivery's category to an address, None where there is no such page or it cannot be left;
    `callback_url` returns where a provider, by its name, posts its reports, None when nobody listens. `max_open`: calls
    at once, where the configuration does not say. `return_key` signs return paths (`channels.bounces`).
    """

    mail_from: str
    max_open: int
    report: Callable[[DeliveryReport], Awaitable[None]]
    unsubscribe_url: Callable[[Delivery, str], str | None]
    callback_url: Callable[[str], str | None]
    return_key: bytes = field(repr=False)


_COMMON = frozenset({"name", "weight", "routes", "per_second", "per_day", "max_open"})


def parse_providers(text: str, env: Mapping[str, str]) -> list[ProviderConfig]:
    """Return the providers in `text`: URLs between white space. Raises SettingsError with a sentence for each problem."""
    return _all([(number, url, {}) for number, url in enumerate(text.split(), 1)], env)


def smtp_provider(url: str) -> ProviderConfig:
    """Return the provider that a plain SMTP URL, without options and variables, describes: `smtp`. Raises SettingsError."""
    return _parse("smtp", url.replace("$", "%24"), {"name": "smtp"}, {})


def parse_providers_file(text: str, env: Mapping[str, str]) -> list[ProviderConfig]:
    """Return the providers in a TOML text: a table `[providers.NAME]` each, with `url` and options. Raises SettingsError.

    [providers.ses-eu]
    url = "smtp+starttls://user:$SMTP_PASSWORD@mail.example:587"
    per_second = 100
    routes = ["DE", "FR"]
    """
    try:
        tables = tomllib.loads(text).get("providers", {})
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([f"the file of providers is not TOML: {error}"]) from None
    if not isinstance(tables, dict):
        raise SettingsError(["the file of providers has no tables [providers.NAME]"])
    found: list[tuple[object, str, dict[str, str]]] = []
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(table.get("url"), str):
            raise SettingsError([f"provider {name}: has no url"])
        options = {
            key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in table.items() if key != "url"
        }
        found.append((name, table["url"], {"name": name, **options}))
    return _all(found, env)


def _all(found: list[tuple[object, str, dict[str, str]]], env: Mapping[str, str]) -> list[ProviderConfig]:
    problems: list[str] = []
    configs: list[ProviderConfig] = []
    for label, url, options in found[:MAX_PROVIDERS]:
        try:
            configs.append(_parse(label, url, options, env))
        except SettingsError as error:
            problems += error.problems
    problems += [f"there are two providers called {name}" for name, count in Counter(c.name for c in configs).items() if count > 1]
    if len(found) > MAX_PROVIDERS:
        problems.append(f"there are more than {MAX_PROVIDERS} providers")
    if problems:
        raise SettingsError(problems)
    return configs


def _parse(label: object, url: str, given: Mapping[str, str], env: Mapping[str, str]) -> ProviderConfig:
    # no message quotes the url: it may hold a password
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in env:
            raise SettingsError([f"provider {label}: ${name} is not in the environment"])
        return quote(env[name], safe="")  # it is unquoted with the part that it stands in

    try:
        parts = urlsplit(_VARIABLE.sub(value, url))
        port = parts.port
    except ValueError:
        raise SettingsError([f"provider {label}: its url has a malformed host or port"]) from None
    if not parts.scheme:
        raise SettingsError([f"provider {label}: its url has no scheme"])
    options = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **given}
    name = options.get("name", re.split(r"[+.]", parts.scheme)[0])
    if not _NAME.fullmatch(name):
        raise SettingsError([f"provider {label}: its name is not 1 to 40 small letters, digits and hyphens"])
    return ProviderConfig(
        name=name,
        scheme=parts.scheme,
        host=parts.hostname,
        port=port,
        path=parts.path.removeprefix("/"),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password or ""),
        weight=_number(name, options, "weight", 1.0, low=0.0, high=1_000.0),
        routes=_routes(name, options),
        per_second=_number(name, options, "per_second", None, low=0.01, high=1_000_000.0),
        per_day=_whole(name, options, "per_day"),
        max_open=_whole(name, options, "max_open"),
        options={key: text for key, text in options.items() if key not in _COMMON},
    )


def _number(  # noqa: PLR0913 - what an option is
    name: str, options: Mapping[str, str], key: str, default: T, *, low: float, high: float
) -> float | T:
    text = options.get(key)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not low <= number <= high:
        raise SettingsError([f"provider {name}: {key} is not a number from {low:g} to {high:g}"])
    return number


def _whole(name: str, options: Mapping[str, str], key: str) -> int | None:
    text = options.get(key)
    if text is None:
        return None
    if not text.isdigit() or not 1 <= int(text) <= 1_000_000_000:
        raise SettingsError([f"provider {name}: {key} is not a whole number from 1 to 1000000000"])
    return int(text)


def _routes(name: str, options: Mapping[str, str]) -> frozenset[str] | None:
    text = options.get("routes")
    if text is None:
        return None
    routes = [route.strip() for route in text.split(",")]
    if not all(_ROUTE.fullmatch(route) for route in routes):
        raise SettingsError([f"provider {name}: routes is not a list such as DE,FR"])
    return frozenset(routes)
