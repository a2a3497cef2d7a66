"""Who hears what, through which channel: requests in; deliveries, statuses and the full decision record out.

Everything a decision rests on is in the record, the user's rows, the control topic and the request's Kafka timestamp:
deciding again decides the same. Preferences, keys, watches, ids seen and finished subjects are the router's tables; it is
their only writer.

A broadcast is expanded by the owner of each partition of the users, a chunk a decision: the requests of the chunk and the
broadcast's next record, with its cursor, are one transaction, so a crash tells nobody twice and misses nobody.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from itertools import islice
from typing import Protocol, cast

import orjson

from agents.ports import Effects, Output, Row, SortedRows, Source, State, origin_of
from agents.triggers import EVENT, NO_RULE, RULES, Rule
from channels.devices import parse_device
from channels.sms import route_of as country_of
from schemas import topics
from schemas.codec import Codec, pack, unpack
from schemas.errors import InvalidEventError, TemplateError, UnknownRuleError, UnsealableError, VersionConflictError
from schemas.ids import NotificationId, delivery_id, digest, notification_id, partition_of
from schemas.messages import (
    Broadcast,
    ChannelChoice,
    Command,
    Contact,
    Content,
    ControlEntry,
    DecisionRecord,
    Delivery,
    Headline,
    NotificationRequested,
    RequestData,
    StatusChange,
    UserKey,
    UserPreferences,
    Watch,
)
from schemas.sealed import seal, unseal, unwrap, wrap
from schemas.status import Axis, SkipReason, Status
from schemas.topics import Channel, Lane

PREFERENCES, KEYS, SEEN, SUBJECTS = "preferences", "keys", "seen", "subjects"
WATCHES, WATCHING = "watches", "watching"
MAX_WATCHES = 500  # of one user
COMMANDS = ("ensure_key", "set_preferences", "add_device", "remove_device", "watch", "unwatch", "forget")
# so many of an audience are told in one decision: a few milliseconds' work, after which more urgent requests have their turn
CHUNK_USERS = 100
_AUDIENCE = re.compile(r"(product|warehouse):[^\x00-\x1f]{1,200}")
_NOTHING_MATCHED = Rule(
    name=NO_RULE,
    version="",
    category="",
    type="",
    lane=Lane.BULK,
    channels=(),
    defaults=frozenset(),
    template="",
    max_age_seconds=0,
)
MAX_USER_ID_CHARACTERS = 200
_UNDEFINED = re.compile(r"'(\w+)' is undefined")
_SEEN = struct.Struct(">8sq")  # digest of the content, Kafka timestamp in ms
_SUBJECT = struct.Struct(">q")  # Kafka timestamp in ms
# so many rows past their time go with each decision: more than one comes, so that tables shrink
_PRUNE_ROWS = 2


def seen_row(content: bytes, at_ms: int) -> bytes:
    """Return a row of the table of ids: 8 bytes of the content's digest and the Kafka timestamp in milliseconds."""
    return _SEEN.pack(content, at_ms)


class Renderer(Protocol):
    """What the router asks of the templates."""

    def render(self, template: str, channel: str, data: Mapping[str, str]) -> Mapping[str, str]:
        """Return the parts of a template for a channel. Raises TemplateError."""

    def version(self, template: str) -> str:
        """Return the version that a decision pins."""


def missing_data(rule: Rule, data: Mapping[str, str], templates: Renderer) -> list[str]:
    """Return, in order, the placeholders of the rule's templates that `data` lacks, by rendering them as the router will.

    Raises TemplateError when they cannot be rendered for another reason.
    """
    missing: list[str] = []
    # the in-app parts are needed whatever the channels: they are the notification's title and message
    for channel in dict.fromkeys((Channel.IN_APP, *rule.channels)):
        while True:
            try:
                templates.render(rule.template, channel, {**data, **dict.fromkeys(missing, "")})
            except TemplateError as error:
                found = _UNDEFINED.search(str(error))
                if found is None or found[1] in missing:
                    raise
                missing.append(found[1])
            else:
                break
    return sorted(missing)


class Orders(Protocol):
    """What the router asks of the control topic."""

    def recalled(self, *, notification_id: str, producer: str, event_id: str, rule: str, accepted_at: datetime) -> ControlEntry | None:
        """Return the order that recalls a notification."""

    def suppressed(self, channel: str, address: str, category: str) -> ControlEntry | None:
        """Return the order that blocks an address, for everything or for `category`."""


@dataclass(frozen=True, slots=True)
class _Choice:
    channel: Channel
    reason: str
    address: str | None  # None: rejected
    cause: str | None = None  # more about the reason, for the decision record
    device: str | None = None  # which of the user's addresses on the channel, where he may have several
    route: str | None = None  # what of the address decides who can carry it

    def delivery_id(self, identity: NotificationId) -> str:
        return delivery_id(identity, self.channel, self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The router's decisions, with what they need. `new_key` returns 32 random bytes; `sms_countries` None: all."""

    templates: Renderer
    codec: Codec
    seal_key: bytes
    new_key: Callable[[], bytes]
    partitions: int
    dedupe_seconds: int
    control: Orders
    sms_countries: frozenset[str] | None = None

    # ---- requests

    def decide_request(self, request: NotificationRequested, source: Source, state: State) -> Effects:
        """Decide what `request` becomes. Raises UnknownRuleError, InvalidEventError, TemplateError: a dead letter."""
        user = _user(request.user_id)
        request = replace(request, accepted_at=request.accepted_at or source.at, origin=request.origin or origin_of(source))
        astray = self._astray(user, source, request)
        if astray is not None:
            return astray
        rule = _NOTHING_MATCHED if request.rule == NO_RULE else RULES.get(request.rule)
        if rule is None:
            raise UnknownRuleError(f"there is no rule {request.rule[:100]!r}; rules: {', '.join(RULES)}")
        is_erased = False
        if request.sealed is not None:
            opened = self._opened(request, state)
            is_erased, request = opened is None, opened or request
        identity = notification_id(producer=request.producer, event_id=request.event_id, rule=rule.name, user_id=request.user_id)
        content = _content_digest(request)
        now_ms = _milliseconds(source.at)
        prune = list(self._expired_rows(state, now_ms))
        seen = state[SEEN].get(identity.encode())
        if seen is not None and now_ms - _SEEN.unpack(seen)[1] <= self.dedupe_seconds * 1000:
            outcome = "duplicate_of" if _SEEN.unpack(seen)[0] == content else "conflict"
            record = self._record(request, rule, source, identity, outcome=outcome, reason=identity)
            return Effects([Output(topics.DECISIONS, user, record)], prune, [f"decision:{outcome}"])
        effects = self._decide_new(request, rule, source, state, identity, is_erased=is_erased)
        effects.rows.append(Row(SEEN, identity.encode(), seen_row(content, now_ms)))
        if request.subject_key is not None and request.is_final:
            effects.rows.append(Row(SUBJECTS, request.subject_key.encode(), _SUBJECT.pack(now_ms)))
        effects.rows += prune
        return effects

    def _opened(self, request: NotificationRequested, state: State) -> NotificationRequested | None:
        """Return the request with what was sealed in it; None when the key that sealed it was destroyed."""
        row = state[KEYS].get(request.user_id.encode())
        if row is None or request.sealed is None:
            return None
        key = unwrap(self.seal_key, self.codec.decode(row, UserKey).wrapped, user_id=request.user_id)
        try:
            found = unpack(unseal(key, request.sealed, user_id=request.user_id, purpose="request"), RequestData)
        except UnsealableError:
            return None
        return replace(request, data={**request.data, **found.data}, sealed=None)

    def _decide_new(  # noqa: PLR0913 - everything that a decision rests on
        self,
        request: NotificationRequested,
        rule: Rule,
        source: Source,
        state: State,
        identity: NotificationId,
        *,
        is_erased: bool,
    ) -> Effects:
        user = request.user_id.encode()
        if rule is _NOTHING_MATCHED:
            record = self._record(request, rule, source, identity, outcome="no_rule_matched", reason=request.data.get(EVENT))
            return Effects([Output(topics.DECISIONS, user, record)], [], ["decision:no_rule_matched"])
        preferences = self._preferences(state, user)
        order = self.control.recalled(
            notification_id=identity,
            producer=request.producer,
            event_id=request.event_id,
            rule=rule.name,
            accepted_at=request.accepted_at or source.at,
        )
        if order is not None:
            record = self._record(request, rule, source, identity, outcome="cancelled", reason=f"{SkipReason.RECALLED}: {order.reason}")
            return Effects([Output(topics.DECISIONS, user, record)], [], ["decision:cancelled"])
        stale = SkipReason.ERASED if is_erased else self._stale(request, rule, source, state)
        if stale is not None:
            choices = [_Choice(channel, stale, None) for channel in rule.channels]
            return self._effects(request, rule, source, identity, preferences, choices, key=b"", rows=[])
        key, rows = self._user_key(state, request.user_id, source.at)
        contact = self._contact(preferences, key)
        choices = [choice for channel in rule.channels for choice in self._choose(channel, rule, preferences, contact, request.user_id)]
        return self._effects(request, rule, source, identity, preferences, choices, key=key, rows=rows, contact=contact)

    def _stale(self, request: NotificationRequested, rule: Rule, source: Source, state: State) -> SkipReason | None:
        assert request.accepted_at is not None
        if (source.at - request.accepted_at).total_seconds() > rule.max_age_seconds:
            return SkipReason.EXPIRED
        if request.subject_key is not None and not request.is_final and request.subject_key.encode() in state[SUBJECTS]:
            return SkipReason.SUPERSEDED
        return None

    def _choose(
        self, channel: Channel, rule: Rule, preferences: UserPreferences | None, contact: Contact, user_id: str
    ) -> Iterator[_Choice]:
        """Yield what becomes of a channel: one choice, or one for each of the user's devices."""
        chosen = (preferences.categories.get(rule.category, {}) if preferences else {}).get(channel)
        if chosen is False:
            yield _Choice(channel, SkipReason.OPTED_OUT, None)
            return
        if chosen is None and channel not in rule.defaults:
            yield _Choice(channel, "off by default", None)
            return
        addresses = _addresses(channel, contact, user_id)
        if not addresses:
            yield _Choice(channel, SkipReason.NO_ADDRESS, None)
        for address in addresses:
            device = address if channel is Channel.PUSH else None
            refused = self._refused(channel, address, rule.category)
            if refused is not None:
                yield _Choice(channel, refused[0], None, cause=refused[1], device=device)
            else:
                why = "on by preference" if chosen else "on by default"
                yield _Choice(channel, why, address, device=device, route=_route(channel, address))

    def _refused(self, channel: Channel, address: str, category: str) -> tuple[SkipReason, str | None] | None:
        """Return why nothing is sent to an address, and more about it; None: it may be."""
        if channel in _ROUTED:
            route = _route(channel, address)
            if route is None:
                return SkipReason.INVALID_ADDRESS, None
            if channel is Channel.SMS and self.sms_countries is not None and route not in self.sms_countries:
                return SkipReason.COUNTRY_NOT_ALLOWED, route
        order = self.control.suppressed(channel, address, category)
        return None if order is None else (SkipReason.SUPPRESSED, order.reason)

    def _effects(  # noqa: PLR0913, PLR0917 - everything that a decision rests on, once
        self,
        request: NotificationRequested,
        rule: Rule,
        source: Source,
        identity: NotificationId,
        preferences: UserPreferences | None,
        choices: list[_Choice],
        *,
        key: bytes,
        rows: list[Row],
        contact: Contact | None = None,
    ) -> Effects:
        user = request.user_id.encode()
        lane = Lane(source.topic.removeprefix("requests."))
        outputs: list[Output] = []
        sealed = None
        in_app: Mapping[str, str] = {}
        name = (contact.name if contact is not None else None) or ""
        if any(choice.address is not None for choice in choices):
            in_app = self.templates.render(rule.template, Channel.IN_APP, {"name": name, **request.data})
            headline = Headline(title=in_app["title"], message=in_app["message"])
            sealed = seal(key, pack(headline), user_id=request.user_id, purpose="headline")
        for choice in choices:
            if choice.address is not None:
                is_in_app = choice.channel is Channel.IN_APP
                parts = in_app if is_in_app else self.templates.render(rule.template, choice.channel, {"name": name, **request.data})
                content = Content(address=choice.address, name=name or None, **parts)
                delivery = self._delivery(request, rule, source, identity, choice, content, key=key)
                outputs.append(Output(topics.deliver(choice.channel, lane), user, delivery))
            outputs.append(Output(topics.STATUS, user, _first_status(choice, identity, request.user_id, lane, rule.category, source.at)))
        is_notified = sealed is not None
        record = self._record(
            request,
            rule,
            source,
            identity,
            outcome="notified" if is_notified else "skipped",
            reason=None if is_notified else str(choices[0].reason),
            preference_version=preferences.version if preferences else 0,
            channels=[
                ChannelChoice(
                    channel=choice.channel,
                    is_chosen=choice.address is not None,
                    reason=str(choice.reason) if choice.cause is None else f"{choice.reason}: {choice.cause}",
                    delivery_id=choice.delivery_id(identity),
                )
                for choice in choices
            ],
            sealed=sealed,
        )
        outputs.append(Output(topics.DECISIONS, user, record))
        return Effects(outputs, rows, [f"decision:{record.outcome}"])

    def _delivery(  # noqa: PLR0913, PLR0917 - as above
        self,
        request: NotificationRequested,
        rule: Rule,
        source: Source,
        identity: NotificationId,
        choice: _Choice,
        content: Content,
        *,
        key: bytes,
    ) -> Delivery:
        assert request.accepted_at is not None
        return Delivery(
            delivery_id=choice.delivery_id(identity),
            notification_id=identity,
            user_id=request.user_id,
            channel=choice.channel,
            lane=source.topic.removeprefix("requests."),
            rule=rule.name,
            category=rule.category,
            generation=0,
            attempt=1,
            sealed=seal(key, pack(content), user_id=request.user_id, purpose="content"),
            accepted_at=request.accepted_at,
            created_at=source.at,
            expires_at=request.accepted_at + timedelta(seconds=rule.max_age_seconds),
            producer=request.producer,
            event_id=request.event_id,
            route=choice.route,
        )

    def _record(  # noqa: PLR0913 - as above
        self,
        request: NotificationRequested,
        rule: Rule,
        source: Source,
        identity: NotificationId,
        *,
        outcome: str,
        reason: str | None,
        preference_version: int = 0,
        channels: list[ChannelChoice] | None = None,
        sealed: bytes | None = None,
    ) -> DecisionRecord:
        assert request.accepted_at is not None
        here = origin_of(source)
        return DecisionRecord(
            decision_id=digest(identity, here.topic, str(here.partition), str(here.offset), size=16),
            notification_id=identity,
            user_id=request.user_id,
            outcome=outcome,
            reason=reason,
            rule=rule.name,
            rule_version=rule.version,
            category=rule.category,
            lane=source.topic.removeprefix("requests."),
            type=rule.type,
            event_id=request.event_id,
            producer=request.producer,
            origin=request.origin,
            request=here,
            occurred_at=request.occurred_at,
            accepted_at=request.accepted_at,
            decided_at=source.at,
            preference_version=preference_version,
            template_version=self.templates.version(rule.template) if sealed is not None else None,
            channels=channels or [],
            metadata=request.metadata,
            sealed=sealed,
        )

    # ---- broadcasts

    def decide_broadcast(self, broadcast: Broadcast, source: Source, state: State) -> Effects:
        """Ask for the next chunk of the audience in this partition, and for the chunk after it. Raises UnknownRuleError."""
        del source
        rule = RULES.get(broadcast.rule)
        if rule is None:
            raise UnknownRuleError(f"there is no rule {broadcast.rule[:100]!r}; rules: {', '.join(RULES)}")
        order = self.control.recalled(
            notification_id="", producer=broadcast.producer, event_id=broadcast.event_id, rule=rule.name, accepted_at=broadcast.accepted_at
        )
        if order is not None:
            return Effects(counts=["broadcast:recalled"])
        users = list(islice(_audience_after(broadcast, state), CHUNK_USERS))
        outputs = [Output(topics.requests(rule.lane), user, _request_of(broadcast, user.decode())) for user in users]
        if len(users) == CHUNK_USERS:
            rest = replace(broadcast, cursor=users[-1].decode(), expanded=broadcast.expanded + len(users))
            outputs.append(Output(topics.BROADCAST, broadcast.broadcast_id.encode(), rest))
        return Effects(outputs, [], ["broadcast:chunk"] * bool(users))

    # ---- commands

    def decide_command(self, command: Command, source: Source, state: State) -> Effects:
        """Change a user's preferences, watches or key. Raises VersionConflictError, InvalidEventError, UnsealableError."""
        user = _user(command.user_id)
        astray = self._astray(user, source, command)
        if astray is not None:
            return astray
        match command.kind:
            case "ensure_key":
                _, rows = self._user_key(state, command.user_id, source.at)
            case "set_preferences" | "add_device":
                key, rows = self._user_key(state, command.user_id, source.at)
                rows.append(Row(PREFERENCES, user, self.codec.encode(self._merged(command, state, key, source.at))))
            case "remove_device":
                rows = self._without_device(command, state, source.at)
            case "watch":
                rows = self._watch(command, state, source.at)
            case "unwatch":
                rows = self._unwatch(command, state)
            case "forget":
                rows = list(_forgotten(user, state))
            case _:
                raise InvalidEventError("kind", f"is none of {', '.join(COMMANDS)}")
        return Effects([], rows, [f"command:{command.kind}"])

    def _watch(self, command: Command, state: State, at: datetime) -> list[Row]:
        user, audience = command.user_id.encode(), _audience(command)
        watched = _watched(state, user)
        if audience in watched:
            return []
        if len(watched) >= MAX_WATCHES:
            raise InvalidEventError("audience", f"is one too many: the user watches {MAX_WATCHES} already")
        watch = Watch(user_id=command.user_id, audience=audience, since=at)
        return [Row(WATCHES, watch_key(audience, user), self.codec.encode(watch)), _watching(user, {*watched, audience})]

    def _unwatch(self, command: Command, state: State) -> list[Row]:
        user, audience = command.user_id.encode(), _audience(command)
        watched = _watched(state, user)
        if audience not in watched:
            return []
        return [Row(WATCHES, watch_key(audience, user), None), _watching(user, watched - {audience})]

    def _merged(self, command: Command, state: State, key: bytes, at: datetime) -> UserPreferences:
        stored = self._preferences(state, command.user_id.encode())
        version = stored.version if stored else 0
        if command.expected_version is not None and command.expected_version != version:
            raise VersionConflictError(f"the stored version is {version}, the command expects {command.expected_version}")
        sealed = stored.sealed if stored else None
        if command.sealed is not None:
            given = unpack(unseal(key, command.sealed, user_id=command.user_id, purpose="contact"), Contact)
            old = self._contact(stored, key)
            merged = Contact(
                name=given.name if given.name is not None else old.name,
                email=given.email if given.email is not None else old.email,
                phone=given.phone if given.phone is not None else old.phone,
                devices=_devices(given.devices, old.devices, are_added=command.kind == "add_device"),
            )
            sealed = seal(key, pack(merged), user_id=command.user_id, purpose="contact")
        categories = {name: dict(channels) for name, channels in (stored.categories if stored else {}).items()}
        for name, channels in (command.categories or {}).items():
            categories[name] = {**categories.get(name, {}), **channels}
        return UserPreferences(
            user_id=command.user_id,
            version=version + 1,
            sealed=sealed,
            locale=command.locale if command.locale is not None else stored.locale if stored else None,
            time_zone=command.time_zone if command.time_zone is not None else stored.time_zone if stored else None,
            categories=categories,
            updated_at=at,
        )

    def _without_device(self, command: Command, state: State, at: datetime) -> list[Row]:
        """Return the row without the devices in `command`: none where they are gone already, or the user's key is."""
        user = command.user_id.encode()
        stored, row = self._preferences(state, user), state[KEYS].get(user)
        if stored is None or row is None or command.sealed is None:
            return []
        key = unwrap(self.seal_key, self.codec.decode(row, UserKey).wrapped, user_id=command.user_id)
        try:
            gone = unpack(unseal(key, command.sealed, user_id=command.user_id, purpose="contact"), Contact).devices or []
            contact = self._contact(stored, key)
        except UnsealableError:
            return []  # he was erased since, and his devices with him
        devices = [device for device in contact.devices or () if device not in gone]
        if devices == (contact.devices or []):
            return []
        sealed = seal(key, pack(replace(contact, devices=devices)), user_id=command.user_id, purpose="contact")
        return [Row(PREFERENCES, user, self.codec.encode(replace(stored, version=stored.version + 1, sealed=sealed, updated_at=at)))]

    # ---- rows

    def _preferences(self, state: State, user: bytes) -> UserPreferences | None:
        row = state[PREFERENCES].get(user)
        return None if row is None else self.codec.decode(row, UserPreferences)

    def _contact(self, preferences: UserPreferences | None, key: bytes) -> Contact:
        if preferences is None or preferences.sealed is None:
            return Contact()
        opened = unseal(key, preferences.sealed, user_id=preferences.user_id, purpose="contact")
        return unpack(opened, Contact)

    def _user_key(self, state: State, user_id: str, at: datetime) -> tuple[bytes, list[Row]]:
        """Return the user's key; for a user without one, a new one and the row that stores it."""
        row = state[KEYS].get(user_id.encode())
        if row is not None:
            return unwrap(self.seal_key, self.codec.decode(row, UserKey).wrapped, user_id=user_id), []
        key = self.new_key()
        stored = UserKey(user_id=user_id, wrapped=wrap(self.seal_key, key, user_id=user_id), created_at=at)
        return key, [Row(KEYS, user_id.encode(), self.codec.encode(stored))]

    def _expired_rows(self, state: State, now_ms: int) -> Iterator[Row]:
        """Yield deletions of the oldest rows that are past their time. Rows come in the order of their time."""
        window_ms = self.dedupe_seconds * 1000
        for table, form in ((SEEN, _SEEN), (SUBJECTS, _SUBJECT)):
            for key, value in islice(state[table].items(), _PRUNE_ROWS):
                if now_ms - form.unpack(value)[-1] <= window_ms:
                    break
                yield Row(table, key, None)

    def _astray(self, user: bytes, source: Source, message: NotificationRequested | Command) -> Effects | None:
        """Return the record on its user's own partition, when a producer's partitioner put it elsewhere."""
        partition = partition_of(user, self.partitions)
        if partition == source.partition:
            return None
        return Effects([Output(source.topic, user, message, partition)], [], ["decision:rekeyed"])


def _devices(given: list[str] | None, old: list[str] | None, *, are_added: bool) -> list[str] | None:
    """Return the user's devices, the newest last: one too many drives out the oldest."""
    if given is None:
        return old
    return list(dict.fromkeys([*(old or ()), *given] if are_added else given))[-MAX_DEVICES:]


def _audience(command: Command) -> str:
    audience = command.audience or ""
    if not _AUDIENCE.fullmatch(audience):
        raise InvalidEventError("audience", "is not product:<id> or warehouse:<id> with an id of at most 200 characters")
    return audience


def watch_key(audience: str, user: bytes) -> bytes:
    """Return the key of a watch in `watches`: the audience first, so that it can be listed."""
    return audience.encode() + b"\0" + user


def _watched(state: State, user: bytes) -> set[str]:
    row = state[WATCHING].get(user)
    return set() if row is None else set(orjson.loads(row))


def _watching(user: bytes, audiences: set[str]) -> Row:
    return Row(WATCHING, user, orjson.dumps(sorted(audiences)) if audiences else None)


def _forgotten(user: bytes, state: State) -> Iterator[Row]:
    """Yield the deletions of every row of a user: without his key nothing that was sealed for him can be opened again."""
    yield Row(KEYS, user, None)
    yield Row(PREFERENCES, user, None)
    for audience in _watched(state, user):
        yield Row(WATCHES, watch_key(audience, user), None)
    yield Row(WATCHING, user, None)


def _audience_after(broadcast: Broadcast, state: State) -> Iterator[bytes]:
    """Yield the users of the audience after the cursor, in the order of their ids."""
    prefix = broadcast.audience.encode() + b"\0"
    rows = cast("SortedRows", state[WATCHES])
    for key in rows.irange(prefix + (broadcast.cursor or "").encode(), inclusive=(False, True)):
        if not key.startswith(prefix):
            return
        yield key[len(prefix) :]


def _request_of(broadcast: Broadcast, user_id: str) -> NotificationRequested:
    return NotificationRequested(
        event_id=broadcast.event_id,
        producer=broadcast.producer,
        rule=broadcast.rule,
        user_id=user_id,
        data=broadcast.data,
        metadata=broadcast.metadata,
        subject_key=broadcast.subject_key,
        occurred_at=broadcast.occurred_at,
        accepted_at=broadcast.accepted_at,
        origin=broadcast.origin,
    )


def _user(user_id: str) -> bytes:
    if not user_id or len(user_id) > MAX_USER_ID_CHARACTERS:
        raise InvalidEventError("userId", f"is empty or longer than {MAX_USER_ID_CHARACTERS} characters")
    return user_id.encode()


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def _content_digest(request: NotificationRequested) -> bytes:
    """Return what tells a repetition from other content under the same id."""
    items = [*sorted(request.data.items()), ("", ""), *sorted(request.metadata.items())]
    return blake2b("\0".join(f"{k}\1{v}" for k, v in items).encode(), digest_size=8).digest()


# what can only be carried by who knows the country or the kind of device
_ROUTED = frozenset({Channel.SMS, Channel.PUSH})
MAX_DEVICES = 20  # of one user that are told; the newest count


def _addresses(channel: Channel, contact: Contact, user_id: str) -> list[str]:
    match channel:
        case Channel.EMAIL:
            return [contact.email] if contact.email else []
        case Channel.SMS:
            return [contact.phone] if contact.phone else []
        case Channel.PUSH:
            return list(dict.fromkeys(contact.devices or ()))[-MAX_DEVICES:]
        case Channel.IN_APP:
            return [user_id]
        case Channel.WEBHOOK:
            return []  # of subscribers, whom nobody but the step `forward` tells


def _route(channel: Channel, address: str) -> str | None:
    """Return what of an address decides who can carry it; None where nothing does, or it is none."""
    match channel:
        case Channel.SMS:
            return country_of(address)
        case Channel.PUSH:
            try:
                return parse_device(address).route
            except ValueError:
                return None
        case _:
            return None


def _first_status(  # noqa: PLR0913, PLR0917 - everything that it says
    choice: _Choice, identity: NotificationId, user_id: str, lane: Lane, category: str, at: datetime
) -> StatusChange:
    is_chosen = choice.address is not None
    return StatusChange(
        notification_id=identity,
        delivery_id=choice.delivery_id(identity),
        user_id=user_id,
        axis=Axis.DELIVERY,
        status=Status.QUEUED if is_chosen else Status.SKIPPED,
        reason=None if is_chosen else str(choice.reason),
        channel=choice.channel,
        lane=lane,
        at=at,
        category=category,
    )
