"""Which channels and providers there are. A new provider is a module beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from channels.absent import AbsentChannel
from channels.in_app import InAppChannel
from schemas import topics
from schemas.errors import SettingsError

if TYPE_CHECKING:
    from channels.base import Channel
    from channels.config import Ports, ProviderConfig

Builder: TypeAlias = "Callable[[ProviderConfig, Ports], Channel]"


def _of(module: str) -> Builder:
    """Return what makes the providers of a module beside this one.

    It is imported for the first of them: each has libraries of its own, and a worker has few kinds of providers.
    """

    def build(config: ProviderConfig, ports: Ports) -> Channel:
        made: Channel = import_module(f"channels.{module}").build(config, ports)
        return made

    return build


# a URL's scheme -> what makes the provider; it raises SettingsError, and calls nobody
BUILDERS: Mapping[str, Builder] = {
    "smtp": _of("email"),
    "smtp+starttls": _of("email"),
    "smtps": _of("email"),
    "fcm": _of("fcm"),
    "apns": _of("apns"),
    "webpush": _of("webpush"),
    "smpp": _of("smpp"),
    "smpps": _of("smpp"),
    "twilio": _of("twilio"),
    "twilio+http": _of("twilio"),  # to a simulator on this host
}


def build_channels(configs: Iterable[ProviderConfig], ports: Ports) -> dict[str, list[Channel]]:
    """Return the providers of every channel by its name, none of them open, in the order of `configs`.

    A channel without a provider has one that rejects everything as `no_provider`. Raises SettingsError with a sentence for
    each provider that cannot be.
    """
    found: dict[str, list[Channel]] = {topics.Channel.IN_APP: [InAppChannel()]}
    problems: list[str] = []
    for config in configs:
        builder = BUILDERS.get(config.scheme)
        if builder is None:
            problems.append(f"provider {config.name}: {config.scheme} is none of {', '.join(sorted(BUILDERS))}")
            continue
        try:
            channel = builder(config, ports)
        except SettingsError as error:
            problems += error.problems
        else:
            found.setdefault(channel.name, []).append(channel)
    if problems:
        raise SettingsError(problems)
    return {name: found.get(name) or [AbsentChannel(name)] for name in topics.Channel}
