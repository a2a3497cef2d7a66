"""`notify send`: ask for one notification, as another service would."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.text import Text

from agents.router import MAX_USER_ID_CHARACTERS, missing_data
from agents.triggers import RULES, Rule
from schemas import topics
from schemas.errors import TemplateError
from schemas.ids import NotificationId, digest, notification_id
from schemas.messages import NotificationRequested
from schemas.sealed import sealed_request
from streams.cli import console
from streams.cli.context import load_settings
from streams.cli.errors import CliError
from streams.cli.kafka import Publisher, partition_count
from streams.cli.keys import ensure_keys
from streams.cli.wire import Wire
from streams.topics import physical, specs
from templates.render import Templates

PRODUCER = "cli"

EPILOG = console.examples(
    'notify send --user u-1 --title "We moved" --message "Our new address is …"',
    "notify send --user u-1 --title Hello --message World --idempotency-key campaign-7",
    "notify trail $(notify send --user u-1 --title Hello --message World)",
)


def send(  # noqa: PLR0913 - one parameter an option
    user: Annotated[str, typer.Option(help="Who is told: the user id.")],
    title: Annotated[str, typer.Option(help="The title; the template's placeholder of that name.")],
    message: Annotated[str, typer.Option(help="The text; the template's placeholder of that name.")],
    rule: Annotated[
        str, typer.Option(help=f"The rule, which names category, lane, channels and template: {', '.join(RULES)}.")
    ] = "message",
    *,
    data: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="More for the template's placeholders; repeatable.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key for the same user is the same notification, once.")] = None,
    as_json: console.JsonOption = False,
) -> None:
    """Ask for a notification to one user; prints its id. Title, message and data travel sealed with the user's key."""
    settings, _ = load_settings(os.environ)
    request, identity = build_request(
        user_id=user,
        rule=rule,
        data={"title": title, "message": message, **parse_pairs(data or [])},
        key=idempotency_key,
        now=datetime.now(UTC),
    )
    name = topics.requests(RULES[rule].lane)
    topic = physical(settings.env, name)
    partition_count(settings.cluster, topic)
    with Wire(settings) as wire:
        codec = wire.codec([spec for spec in specs() if spec.name in {name, topics.COMMANDS}])
        key = ensure_keys(settings, wire, codec, [user])[user]
    publisher = Publisher(settings.cluster)
    publisher.publish(topic, user, codec.encode(sealed_request(key, request)))
    publisher.require_all()
    if as_json:
        place, (offset, _) = next(iter(publisher.last.items()))
        console.print_document(
            {"notificationId": identity, "eventId": request.event_id, "topic": topic, "partition": place[1], "offset": offset}
        )
        return
    sys.stdout.write(f"{identity}\n")
    console.succeed(Text.assemble("asked for on ", topic, "; follow it with ", (f"notify trail {identity}", "cyan")))


def build_request(
    *, user_id: str, rule: str, data: dict[str, str], key: str | None, now: datetime
) -> tuple[NotificationRequested, NotificationId]:
    """Return the request and the id of the notification that it becomes. Raises CliError for a rule that does not exist, or lacks data."""
    known = known_rule(rule)
    if not user_id.strip() or len(user_id) > MAX_USER_ID_CHARACTERS:
        raise CliError(f"--user is empty or longer than {MAX_USER_ID_CHARACTERS} characters: say who is to be told.")
    try:
        missing = missing_data(known, data, Templates())
    except TemplateError as error:
        raise CliError(f"The data do not fit the template: {error}") from error
    if missing:
        raise CliError(f"The templates of {rule} need more: add {' '.join(f'--data {name}=…' for name in missing)}.")
    # without a key every call is an event of its own: the moment is part of its identity
    event_id = key or digest(
        PRODUCER, rule, user_id, now.isoformat(), *(f"{name}={value}" for name, value in sorted(data.items())), size=12
    )
    request = NotificationRequested(event_id=event_id, producer=PRODUCER, rule=rule, user_id=user_id, data=data, occurred_at=now)
    return request, notification_id(producer=PRODUCER, event_id=event_id, rule=rule, user_id=user_id)


def known_rule(name: str) -> Rule:
    """Return the rule of that name. Raises CliError, with the names that there are."""
    try:
        return RULES[name]
    except KeyError:
        raise CliError(f"There is no rule {name}. The rules are {', '.join(RULES)}.") from None


def parse_pairs(texts: list[str]) -> dict[str, str]:
    """Return `KEY=VALUE` texts as a mapping. Raises CliError for one that is none."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise CliError(f"--data {text} is not KEY=VALUE.")
        pairs[name] = value
    return pairs
