"""`notify prefs`: what users want, and how they are reached. Personal fields are sealed here, before they enter Kafka."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, cast
from zoneinfo import ZoneInfo

import typer
from confluent_kafka import Message
from rich.table import Table
from rich.text import Text

from agents.triggers import RULES
from channels.devices import parse_device, route_of
from schemas import topics
from schemas.codec import Codec, pack, unpack
from schemas.errors import InvalidEventError
from schemas.ids import digest, partition_of
from schemas.messages import Command, Contact, UserPreferences
from schemas.sealed import seal, unseal
from schemas.topics import Channel
from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import EXIT_FAILURE, CliError
from streams.cli.kafka import Publisher, Reader, partition_count
from streams.cli.keys import ensure_keys, find_key
from streams.cli.lines import Lines
from streams.cli.wire import Wire
from streams.settings import Settings
from streams.topics import physical, specs

PURPOSE = "contact"
WAIT_SECONDS = 20.0
MAX_TEXT_CHARACTERS = 1_000
ID_BYTES = 12
_TEXTS = ("name", "email", "phone", "locale", "timeZone")
_CHANNELS = frozenset(Channel) - {Channel.WEBHOOK}
_MAILBOX = re.compile(r"\S+@\S+")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, and halves of surrogate pairs
_KNOWN = frozenset({"userId", "devices", "categories", *_TEXTS})

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="See and change what users want and how they are reached.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a line, or the options of `prefs set`, want for a user. Only the given fields change."""

    user_id: str
    contact: Contact | None = None
    locale: str | None = None
    time_zone: str | None = None
    categories: Mapping[str, Mapping[str, bool]] | None = None
    expected_version: int | None = None
    adds_devices: bool = False  # the contact's devices come to those that he has; else they replace them

    def command(self, key: bytes | None, now: datetime) -> Command:
        """Return the command to the router, the contact sealed with the user's `key`."""
        sealed = seal(key, pack(self.contact), user_id=self.user_id, purpose=PURPOSE) if self.contact and key else None
        kind = "add_device" if self.adds_devices else "set_preferences"
        identity = (repr(self.locale), repr(self.time_zone), repr(self.categories), repr(self.expected_version), (sealed or b"").hex())
        return Command(
            command_id=digest("cli", kind, self.user_id, now.isoformat(), *identity, size=ID_BYTES),
            user_id=self.user_id,
            kind=kind,
            sealed=sealed,
            locale=self.locale,
            time_zone=self.time_zone,
            categories=self.categories,
            expected_version=self.expected_version,
            issued_at=now,
        )


@app.command(
    "get",
    epilog=console.examples("notify prefs get u-1", "notify prefs get u-1 --show-contact", "notify prefs get u-1 --json"),
)
def get(
    user: Annotated[str, typer.Argument(metavar="USER", help="The user id.")],
    *,
    show_contact: Annotated[bool, typer.Option("--show-contact", help="Print personal data in full, not masked.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Show what the router last accepted for a user. Personal data is masked unless asked for."""
    settings, _ = load_settings(os.environ)
    with Wire(settings) as wire:
        preferences = find_preferences(settings, wire, user)
        if preferences is None:
            raise CliError(
                f"Nothing is stored for {console.safe(user)}: the defaults of each rule apply. Set some with `notify prefs set`."
            )
        key = find_key(settings, wire, user) if preferences.sealed is not None else None
    contact = None
    if preferences.sealed is not None and key is not None:
        contact = unpack(unseal(key, preferences.sealed, user_id=user, purpose=PURPOSE), Contact)
    is_erased = preferences.sealed is not None and key is None
    shown = contact if show_contact or contact is None else mask(contact)
    if as_json:
        document = cast("dict[str, object]", console.to_json(preferences))
        del document["sealed"]
        console.print_document({**document, "contact": console.to_json(shown), "isMasked": not show_contact, "isErased": is_erased})
        return
    _print(preferences, shown, is_erased=is_erased)


@app.command(
    "set",
    epilog=console.examples(
        "notify prefs set u-1 --email ada@example.com --name 'Ada L.'",
        "notify prefs set u-1 --category payments.email=off --category messages.in_app=on",
        "notify prefs set u-1 --device fcm:cZ1x:APA91bH",
        "notify prefs set u-1 --time-zone Europe/Berlin --expected-version 3",
    ),
)
def set_(  # noqa: PLR0913 - one parameter an option
    user: Annotated[str, typer.Argument(metavar="USER", help="The user id.")],
    *,
    email: Annotated[str | None, typer.Option(help="The mailbox.")] = None,
    name: Annotated[str | None, typer.Option(help="What the user is called in greetings.")] = None,
    phone: Annotated[str | None, typer.Option(help="The phone number, such as +12025550143.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="A device to add: fcm:TOKEN, apns:HEX or webpush:SUBSCRIPTION; repeatable.")
    ] = None,
    no_device: Annotated[bool, typer.Option("--no-device", help="Forget the devices so far; with --device these replace them.")] = False,
    locale: Annotated[str | None, typer.Option(help="The language, such as en-GB.")] = None,
    time_zone: Annotated[str | None, typer.Option(help="The IANA zone, such as Europe/London.")] = None,
    category: Annotated[list[str] | None, typer.Option(metavar="CHOICE", help="CATEGORY.CHANNEL=on or =off; repeatable.")] = None,
    expected_version: Annotated[int | None, typer.Option(min=0, help="Change nothing unless this version is stored; 0: none yet.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the router has taken it over.")] = True,
    as_json: console.JsonOption = False,
) -> None:
    """Change some of a user's preferences; what is not given stays as it is."""
    settings, _ = load_settings(os.environ)
    given = {"userId": user, "email": email, "name": name, "phone": phone, "locale": locale, "timeZone": time_zone}
    devices = device or ([] if no_device else None)
    categories = parse_choices(category or [])
    try:
        wish = parse_wish({**given, "devices": devices, "categories": categories or None}, expected_version=expected_version)
    except InvalidEventError as error:
        raise CliError(f"Not a preference: {error}.") from error
    wish = replace(wish, adds_devices=bool(device) and not no_device)
    if wish == Wish(user_id=user, expected_version=expected_version):
        raise CliError("Nothing to change was given. `notify prefs set --help` lists the options.")
    with Wire(settings) as wire:
        codec = _codec(wire)
        key = ensure_keys(settings, wire, codec, [user])[user] if wish.contact else None
        topic = physical(settings.env, topics.PREFERENCES)
        count = partition_count(settings.cluster, topic)
        waiting = Waiting(settings, count) if wait else None
        command = wish.command(key, datetime.now(UTC))
        publisher = Publisher(settings.cluster)
        publisher.publish(physical(settings.env, topics.COMMANDS), user, codec.encode(command))
        publisher.require_all()
        stored = waiting.until(wire, publisher, {partition_of(user.encode(), count): user}).get(user) if waiting else None
    if as_json:
        console.print_document({"userId": user, "commandId": command.command_id, "version": stored.version if stored else None})
    elif stored:
        console.succeed(Text.assemble("stored as version ", (str(stored.version), "bold")))
    else:
        console.succeed("published; the router takes it over when it runs")


@app.command(
    "load",
    epilog=console.examples("notify prefs load preferences.ndjson", "cat preferences.ndjson | notify prefs load - --no-wait"),
)
def load(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="NDJSON: userId and any of name, email, phone, devices, locale, timeZone, categories; - is stdin."
        ),
    ],
    *,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the router has taken over the last of each partition.")] = True,
    as_json: console.JsonOption = False,
) -> None:
    """Change the preferences of many users. A bad line is reported by its number and the rest goes on; the exit code is then 1."""
    settings, _ = load_settings(os.environ)
    started = time.monotonic()
    with Lines(file) as lines, Wire(settings) as wire:
        with console.progress("reading", lines.total_bytes) as advance:
            wishes = list(_wishes(lines, advance))
        publisher = Publisher(settings.cluster)
        if wishes:
            _load(settings, wire, publisher, wishes, wait=wait)
        for number, problem in publisher.failures:
            lines.reject(number, problem)
        if as_json:
            summary = {"published": publisher.delivered, "badLines": lines.bad_lines, "problems": lines.problems_as_json()}
            console.print_document({**summary, "users": len({wish.user_id for _, wish in wishes})})
        else:
            text = Text.assemble(
                (f"{publisher.delivered:,}", "bold"), f" changes {'stored' if wait else 'published'} in {time.monotonic() - started:.1f} s"
            )
            if lines.bad_lines:
                text.append(f"  ·  {lines.bad_lines:,} bad line{'' if lines.bad_lines == 1 else 's'}", style="red")
            console.succeed(text)
    if lines.bad_lines:
        raise typer.Exit(EXIT_FAILURE)


def _load(settings: Settings, wire: Wire, publisher: Publisher, wishes: list[tuple[int, Wish]], *, wait: bool) -> None:
    codec = _codec(wire)
    count = partition_count(settings.cluster, physical(settings.env, topics.PREFERENCES))
    secret = {wish.user_id for _, wish in wishes if wish.contact is not None}
    with console.progress("asking for keys", len(secret)) as advance:
        keys = ensure_keys(settings, wire, codec, secret, progress=advance) if secret else {}
    waiting = Waiting(settings, count) if wait else None
    commands, now = physical(settings.env, topics.COMMANDS), datetime.now(UTC)
    last: dict[int, str] = {}
    with console.progress("publishing", len(wishes)) as advance:
        for done, (number, wish) in enumerate(wishes, 1):
            command = wish.command(keys.get(wish.user_id), now)
            publisher.publish(commands, wish.user_id, codec.encode(command), number=number)
            last[partition_of(wish.user_id.encode(), count)] = wish.user_id
            advance(done)
        publisher.finish()
    if waiting is not None:
        with console.progress("waiting for the router", None):
            waiting.until(wire, publisher, last)


def parse_wish(value: Mapping[str, object], *, expected_version: int | None = None) -> Wish:
    """Return what `value`, an object as `prefs load` reads it, wants. Null is as if left out.

    Raises InvalidEventError, naming the field and never its value.
    """
    unknown = sorted(value.keys() - _KNOWN)
    if unknown:
        raise InvalidEventError(unknown[0][:40], f"is not a field; there are {', '.join(sorted(_KNOWN))}")
    user_id = _text(value, "userId")
    if user_id is None:
        raise InvalidEventError("userId", "is missing")
    texts = {name: _text(value, name) for name in _TEXTS}
    email = texts["email"]
    if email is not None and _MAILBOX.fullmatch(email) is None:
        raise InvalidEventError("email", "is no mailbox such as ada@example.com")
    zone = texts["timeZone"]
    if zone is not None and not _is_zone(zone):
        raise InvalidEventError("timeZone", "is no IANA zone such as Europe/London")
    contact = Contact(name=texts["name"], email=email, phone=texts["phone"], devices=_devices(value.get("devices")))
    return Wish(
        user_id=user_id,
        contact=None if contact == Contact() else contact,
        locale=texts["locale"],
        time_zone=zone,
        categories=_categories(value.get("categories")),
        expected_version=expected_version,
    )


def parse_choices(texts: list[str]) -> dict[str, dict[str, bool]]:
    """Return `CATEGORY.CHANNEL=on|off` texts as category -> channel -> wanted. Raises CliError for one that is none."""
    wanted: dict[str, dict[str, bool]] = {}
    for text in texts:
        place, _, choice = text.partition("=")
        category, _, channel = place.rpartition(".")
        if not category or choice not in {"on", "off"}:
            raise CliError(f"--category {text} is not CATEGORY.CHANNEL=on or =off, such as payments.email=off.")
        wanted.setdefault(category, {})[channel] = choice == "on"
    return wanted


def mask(contact: Contact) -> Contact:
    """Return `contact` with just enough left to recognise it."""
    email = None
    if contact.email is not None:
        user, _, domain = contact.email.rpartition("@")
        email = f"{user[:1]}•••@{domain[:1]}•••"
    return Contact(
        name=contact.name and f"{contact.name[:1]}•••",
        email=email,
        phone=contact.phone and f"•••{contact.phone[-2:]}",
        devices=None if contact.devices is None else [_mask_device(device) for device in contact.devices],
    )


def _mask_device(device: str) -> str:
    kind = route_of(device)
    return "•••" if kind is None else f"{kind}:•••"


def find_preferences(settings: Settings, wire: Wire, user_id: str) -> UserPreferences | None:
    """Return what is stored for a user, else None."""
    topic, key = physical(settings.env, topics.PREFERENCES), user_id.encode()
    newest = None
    with Reader(settings.cluster, topic, [partition_of(key, partition_count(settings.cluster, topic))]) as reader:
        for message in reader.to_end():
            if message.key() == key:
                newest = message.value()
    return None if newest is None else wire.decode(newest, UserPreferences)


class Waiting:
    """Waits until the router has taken over what is published after this is made. It refuses by a dead letter."""

    def __init__(self, settings: Settings, partitions: int) -> None:
        self._settings = settings
        self._preferences = physical(settings.env, topics.PREFERENCES)
        self._dead = physical(settings.env, topics.DEAD)
        self._starts = {topic: _ends(settings, topic, count) for topic, count in self._counts(partitions).items()}

    def _counts(self, partitions: int) -> dict[str, int]:
        return {self._preferences: partitions, self._dead: partition_count(self._settings.cluster, self._dead)}

    def until(self, wire: Wire, publisher: Publisher, last: Mapping[int, str]) -> dict[str, UserPreferences]:
        """Return what is stored for the last user of each partition, once it is.

        Raises CliError when the router refused his command, or did nothing for a while.
        """
        commands = physical(self._settings.env, topics.COMMANDS)
        sent = {
            user: (partition, *publisher.last[commands, partition])
            for partition, user in last.items()
            if (commands, partition) in publisher.last
        }
        waiting = set(sent)
        stored: dict[str, UserPreferences] = {}
        with (
            Reader(self._settings.cluster, self._preferences, {p: self._starts[self._preferences][p] for p in last}) as preferences,
            Reader(self._settings.cluster, self._dead, self._starts[self._dead]) as dead,
        ):
            deadline = time.monotonic() + WAIT_SECONDS
            while waiting:
                news = preferences.more(0.1)
                for message in news:
                    user = (message.key() or b"").decode(errors="replace")
                    # the router stores under the command's timestamp; an earlier one is the answer to an earlier command
                    if user in waiting and message.value() is not None:
                        found = wire.decode(message.value(), UserPreferences)
                        if found.updated_at.timestamp() * 1000 >= sent[user][2]:
                            stored[user] = found
                            waiting.discard(user)
                refused = [message for message in dead.more(0) if _place(message) in {sent[user][:2] for user in waiting}]
                if refused:
                    raise CliError(f"The router refused the change: {_header(refused[0], 'error')}. {_header(refused[0], 'message')}")
                if news:
                    deadline = time.monotonic() + WAIT_SECONDS
                elif time.monotonic() > deadline:
                    raise CliError(
                        f"Published, but the router has not taken it over within {WAIT_SECONDS:.0f} s. Is the router running? "
                        "`notify doctor` says; it will take it over when it does. --no-wait does not wait."
                    )
        return stored


def _ends(settings: Settings, topic: str, partitions: int) -> dict[int, int]:
    with Reader(settings.cluster, topic, list(range(partitions))) as reader:
        return {number: end for number, (_, end) in reader.sizes().items()}


def _place(message: Message) -> tuple[int, int] | None:
    """Return partition and offset of the command that a dead letter was."""
    try:
        return (
            (int(_header(message, "partition")), int(_header(message, "offset"))) if _header(message, "topic") == topics.COMMANDS else None
        )
    except ValueError:
        return None


def _header(message: Message, name: str) -> str:
    headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    return next(((value or b"").decode(errors="replace") for key, value in headers if key == name), "")


def _codec(wire: Wire) -> Codec:
    return wire.codec([spec for spec in specs() if spec.name == topics.COMMANDS])


def _wishes(lines: Lines, advance: console.Advance) -> Iterator[tuple[int, Wish]]:
    for number, value in lines.objects(advance):
        try:
            yield number, parse_wish(value)
        except InvalidEventError as error:
            lines.reject(number, str(error))


def _text(value: Mapping[str, object], name: str) -> str | None:
    text = value.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise InvalidEventError(name, "is no text")
    if not text.strip() or len(text) > MAX_TEXT_CHARACTERS or _UNSEEN.search(text):
        raise InvalidEventError(name, f"is empty, longer than {MAX_TEXT_CHARACTERS} characters, or has control characters")
    return text


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown, not a name at all, a folder of names
        return False
    return True


def _devices(value: object) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise InvalidEventError("devices", "is no list of devices such as fcm:TOKEN")
    for number, device in enumerate(value, 1):
        try:
            parse_device(device)
        except ValueError as error:
            raise InvalidEventError("devices", f"{error}: number {number}") from None
    return value


def _categories(value: object) -> dict[str, dict[str, bool]] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidEventError("categories", "is no object of category: {channel: true or false}")
    for category, choices in value.items():
        if not isinstance(choices, dict):
            raise InvalidEventError(f"categories.{category[:40]}", "is no object of channel: true or false")
        for channel, is_wanted in choices.items():
            if channel not in _CHANNELS:
                raise InvalidEventError(
                    f"categories.{category[:40]}.{channel[:40]}", f"is no channel; there are {', '.join(sorted(_CHANNELS))}"
                )
            if not isinstance(is_wanted, bool):
                raise InvalidEventError(f"categories.{category[:40]}.{channel}", "is neither true nor false")
    return value


def _print(preferences: UserPreferences, contact: Contact | None, *, is_erased: bool) -> None:
    out = console.stdout()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("user", console.cell(preferences.user_id, "bold"))
    table.add_row("version", f"{preferences.version}, since {console.show_time(preferences.updated_at)}")
    table.add_row("locale", console.cell(preferences.locale or console.NOTHING))
    table.add_row("time zone", console.cell(preferences.time_zone or console.NOTHING))
    if is_erased:
        table.add_row("contact", Text("erased: his key was destroyed", style="yellow"))
    elif contact is None:
        table.add_row("contact", Text("none: only in-app notifications reach this user", style="yellow"))
    else:
        for label, value in (("name", contact.name), ("e-mail", contact.email), ("phone", contact.phone)):
            table.add_row(label, console.cell(value or console.NOTHING))
        table.add_row("devices", console.cell(", ".join(contact.devices or []) or console.NOTHING))
    out.print(table)
    out.print()
    out.print(choices_table(preferences.categories))


def choices_table(chosen: Mapping[str, Mapping[str, bool]]) -> Table:
    """Return a table of what is on, by category and channel: as the user chose, or in brackets by default."""
    rules = RULES.values()
    used = {(rule.category, channel) for rule in rules for channel in rule.channels}
    by_default = {(rule.category, channel) for rule in rules for channel in rule.defaults}
    named = {channel for _, channel in used} | {channel for each in chosen.values() for channel in each}
    channels = [channel for channel in Channel if channel in named]
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", caption="(in brackets: by default)", caption_justify="left")
    for name in ("category", *channels):
        table.add_column(name)
    for category in sorted({rule.category for rule in rules} | chosen.keys()):
        cells = [console.cell(category)]
        for channel in channels:
            wanted = chosen.get(category, {}).get(channel)
            if wanted is not None:
                cells.append(Text("on", style="green") if wanted else Text("off", style="red"))
            elif (category, channel) in used:
                cells.append(Text("(on)" if (category, channel) in by_default else "(off)", style="dim"))
            else:
                cells.append(Text(console.NOTHING, style="dim"))
        table.add_row(*cells)
    return table
