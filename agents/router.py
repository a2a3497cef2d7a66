"""Who hears what, through which channel: requests in; deliveries, statuses and the full decision record out.

Everything a decision rests on is in the record, the user's rows and the request's Kafka timestamp: deciding again
decides the same. Preferences, keys, ids seen and finished subjects are the router's tables; it is their only writer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from itertools import islice
from typing import Protocol

from agents.ports import Effects, Output, Row, Source, State
from agents.triggers import RULES, Rule
from schemas import topics
from schemas.codec import Codec, pack, unpack
from schemas.errors import InvalidEventError, UnknownRuleError, VersionConflictError
from schemas.ids import NotificationId, delivery_id, digest, notification_id, partition_of
from schemas.messages import (
    ChannelChoice,
    Command,
    Contact,
    Content,
    DecisionRecord,
    Delivery,
    Headline,
    NotificationRequested,
    Origin,
    StatusChange,
    UserKey,
    UserPreferences,
)
from schemas.sealed import seal, unseal, unwrap, wrap
from schemas.status import Axis, SkipReason, Status
from schemas.topics import Channel, Lane

PREFERENCES, KEYS, SEEN, SUBJECTS = "preferences", "keys", "seen", "subjects"
MAX_USER_ID_CHARACTERS = 200
_SEEN = struct.Struct(">8sq")  # digest of the content, Kafka timestamp in ms
_SUBJECT = struct.Struct(">q")  # Kafka timestamp in ms
# so many rows past their time go with each decision: more than one comes, so that tables shrink
_PRUNE_ROWS = 2


class Renderer(Protocol):
    """What the router asks of the templates."""

    def render(self, template: str, channel: str, data: Mapping[str, str]) -> Mapping[str, str]:
        """Return the parts of a template for a channel. Raises TemplateError."""

    def version(self, template: str) -> str:
        """Return the version that a decision pins."""


@dataclass(frozen=True, slots=True)
class _Choice:
    channel: Channel
    reason: str
    address: str | None  # None: rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The router's decisions, with what they need. `new_key` returns 32 random bytes."""

    templates: Renderer
    codec: Codec
    seal_key: bytes
    new_key: Callable[[], bytes]
    partitions: int
    dedupe_seconds: int

    # ---- requests

    def decide_request(self, request: NotificationRequested, source: Source, state: State) -> Effects:
        """Decide what `request` becomes. Raises UnknownRuleError, InvalidEventError, TemplateError: a dead letter."""
        user = _user(request.user_id)
        request = replace(request, accepted_at=request.accepted_at or source.at, origin=request.origin or _here(source))
        astray = self._astray(user, source, request)
        if astray is not None:
            return astray
        rule = RULES.get(request.rule)
        if rule is None:
            raise UnknownRuleError(f"there is no rule {request.rule[:100]!r}; rules: {', '.join(RULES)}")
        identity = notification_id(producer=request.producer, event_id=request.event_id, rule=rule.name, user_id=request.user_id)
        content = _content_digest(request)
        now_ms = _milliseconds(source.at)
        prune = list(self._expired_rows(state, now_ms))
        seen = state[SEEN].get(identity.encode())
        if seen is not None and now_ms - _SEEN.unpack(seen)[1] <= self.dedupe_seconds * 1000:
            outcome = "duplicate_of" if _SEEN.unpack(seen)[0] == content else "conflict"
            record = self._record(request, rule, source, identity, outcome=outcome, reason=identity)
            return Effects([Output(topics.DECISIONS, user, record)], prune, [f"decision:{outcome}"])
        effects = self._decide_new(request, rule, source, state, identity)
        effects.rows.append(Row(SEEN, identity.encode(), _SEEN.pack(content, now_ms)))
        if request.subject_key is not None and request.is_final:
            effects.rows.append(Row(SUBJECTS, request.subject_key.encode(), _SUBJECT.pack(now_ms)))
        effects.rows += prune
        return effects

    def _decide_new(self, request: NotificationRequested, rule: Rule, source: Source, state: State, identity: NotificationId) -> Effects:
        user = request.user_id.encode()
        preferences = self._preferences(state, user)
        stale = self._stale(request, rule, source, state)
        if stale is not None:
            choices = [_Choice(channel, stale, None) for channel in rule.channels]
            return self._effects(request, rule, source, identity, preferences, choices, key=b"", rows=[])
        key, rows = self._user_key(state, request.user_id, source.at)
        contact = self._contact(preferences, key)
        choices = [self._choose(channel, rule, preferences, contact, request.user_id) for channel in rule.channels]
        return self._effects(request, rule, source, identity, preferences, choices, key=key, rows=rows, contact=contact)

    def _stale(self, request: NotificationRequested, rule: Rule, source: Source, state: State) -> SkipReason | None:
        assert request.accepted_at is not None
        if (source.at - request.accepted_at).total_seconds() > rule.max_age_seconds:
            return SkipReason.EXPIRED
        if request.subject_key is not None and not request.is_final and request.subject_key.encode() in state[SUBJECTS]:
            return SkipReason.SUPERSEDED
        return None

    def _choose(self, channel: Channel, rule: Rule, preferences: UserPreferences | None, contact: Contact, user_id: str) -> _Choice:
        chosen = (preferences.categories.get(rule.category, {}) if preferences else {}).get(channel)
        if chosen is False:
            return _Choice(channel, SkipReason.OPTED_OUT, None)
        if chosen is None and channel not in rule.defaults:
            return _Choice(channel, "off by default", None)
        address = _address(channel, contact, user_id)
        if address is None:
            return _Choice(channel, SkipReason.NO_ADDRESS, None)
        return _Choice(channel, "on by preference" if chosen else "on by default", address)

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
            outputs.append(Output(topics.STATUS, user, _first_status(choice, identity, request.user_id, lane, source.at)))
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
                    reason=str(choice.reason),
                    delivery_id=delivery_id(identity, choice.channel),
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
            delivery_id=delivery_id(identity, choice.channel),
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
        here = _here(source)
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

    # ---- commands

    def decide_command(self, command: Command, source: Source, state: State) -> Effects:
        """Change preferences, or make a user's key. Raises VersionConflictError, InvalidEventError, UnsealableError."""
        user = _user(command.user_id)
        astray = self._astray(user, source, command)
        if astray is not None:
            return astray
        key, rows = self._user_key(state, command.user_id, source.at)
        match command.kind:
            case "ensure_key":
                return Effects([], rows, ["command:ensure_key"])
            case "set_preferences":
                rows.append(Row(PREFERENCES, user, self.codec.encode(self._merged(command, state, key, source.at))))
                return Effects([], rows, ["command:set_preferences"])
            case _:
                raise InvalidEventError("kind", "is not ensure_key or set_preferences")

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
                devices=given.devices if given.devices is not None else old.devices,
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


def _user(user_id: str) -> bytes:
    if not user_id or len(user_id) > MAX_USER_ID_CHARACTERS:
        raise InvalidEventError("userId", f"is empty or longer than {MAX_USER_ID_CHARACTERS} characters")
    return user_id.encode()


def _here(source: Source) -> Origin:
    return Origin(topic=source.topic, partition=source.partition, offset=source.offset)


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def _content_digest(request: NotificationRequested) -> bytes:
    """Return what tells a repetition from other content under the same id."""
    items = [*sorted(request.data.items()), ("", ""), *sorted(request.metadata.items())]
    return blake2b("\0".join(f"{k}\1{v}" for k, v in items).encode(), digest_size=8).digest()


def _address(channel: Channel, contact: Contact, user_id: str) -> str | None:
    match channel:
        case Channel.EMAIL:
            return contact.email or None
        case Channel.IN_APP:
            return user_id


def _first_status(choice: _Choice, identity: NotificationId, user_id: str, lane: Lane, at: datetime) -> StatusChange:
    is_chosen = choice.address is not None
    return StatusChange(
        notification_id=identity,
        delivery_id=delivery_id(identity, choice.channel),
        user_id=user_id,
        axis=Axis.DELIVERY,
        status=Status.QUEUED if is_chosen else Status.SKIPPED,
        reason=None if is_chosen else str(choice.reason),
        channel=choice.channel,
        lane=lane,
        at=at,
    )
