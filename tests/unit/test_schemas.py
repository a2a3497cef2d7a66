"""What messages say: schemas and their examples, codec, ids, statuses, errors, sealing, and payments as producers write them."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import itertools
import json
import re
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_type_hints

import fastavro
import jsonschema
import pytest
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from hypothesis import given
from hypothesis import strategies as st

from channels.devices import parse_device
from channels.sms import parse_number
from schemas import codec, errors, ids, messages, producing, sealed
from schemas.codec import Codec, frame, own_schema
from schemas.errors import InvalidEventError, NotifyError, UndecodableError, UnknownSchemaError, UnsealableError
from schemas.examples import SEAL_KEY, example, samples
from schemas.producing import ForeignSchema
from schemas.status import Order, Status, is_terminal, order

CONTRACTS = Path(codec.__file__).parent / "contracts"
RELEASED = codec.AVRO_FOLDER / "released"
NAMES = sorted(path.stem for path in codec.AVRO_FOLDER.glob("*.avsc"))
KINDS = {kind.__name__: kind for kind in get_args(messages.Message)}
GOLDEN = {name: base64.b64decode(raw) for name, raw in json.loads((RELEASED / "golden.json").read_text()).items()}

Kind = type[messages.Message]


def a_codec(**known: Any) -> Codec:
    """Return a codec that writes message number n of NAMES as schema n, and knows the schemas `known` as s<id>."""
    return Codec({name: number for number, name in enumerate(NAMES)}, {int(name[1:]): schema for name, schema in known.items()})


# schemas and examples


def test_each_schema_has_a_dataclass_and_each_dataclass_a_schema() -> None:
    assert sorted(KINDS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_schema_has_an_example_that_survives_the_wire(name: str) -> None:
    message = example(name)
    assert type(message) is KINDS[name]
    assert a_codec().decode(a_codec().encode(message), KINDS[name]) == message
    assert codec.unpack(codec.pack(message), KINDS[name]) == message


@pytest.mark.parametrize("name", NAMES)
def test_an_example_names_every_field(name: str) -> None:
    written = json.loads((codec.AVRO_FOLDER / f"{name}.example.json").read_text())
    assert list(written) == [field["name"] for field in own_schema(name)["fields"]]


def test_the_examples_tell_one_story() -> None:
    request, delivery, user_key, command = example("NotificationRequested"), example("Delivery"), example("UserKey"), example("Command")
    assert isinstance(request, messages.NotificationRequested)
    assert isinstance(delivery, messages.Delivery)
    assert isinstance(user_key, messages.UserKey)
    assert isinstance(command, messages.Command)
    assert command.sealed is not None
    assert delivery.notification_id == ids.notification_id(
        producer=request.producer, event_id=request.event_id, rule=request.rule, user_id=request.user_id
    )
    key = sealed.unwrap(SEAL_KEY, user_key.wrapped, user_id=user_key.user_id)
    content = sealed.unseal(key, delivery.sealed, user_id=request.user_id, purpose="content")
    contact = sealed.unseal(key, command.sealed, user_id=request.user_id, purpose="contact")
    assert codec.unpack(content, messages.Content) == example("Content")
    assert codec.unpack(contact, messages.Contact) == example("Contact")


_SIMPLE: dict[object, st.SearchStrategy[Any]] = {
    str: st.text(max_size=20),
    bool: st.booleans(),
    int: st.integers(-(2**31), 2**31 - 1),
    bytes: st.binary(max_size=20),
    type(None): st.none(),
    datetime: st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1)).map(  # noqa: DTZ001 - hypothesis wants naive bounds
        lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=UTC)
    ),
}


def _values(hint: Any) -> st.SearchStrategy[Any]:
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{field.name: _values(hints[field.name]) for field in fields(hint)})  # type: ignore[arg-type]
    match str(getattr(hint, "__origin__", "")), get_args(hint):
        case "<class 'collections.abc.Mapping'>", (key, value):
            return st.dictionaries(_values(key), _values(value), max_size=3)
        case "<class 'list'>", (item,):
            return st.lists(_values(item), max_size=3)
        case _, (first, *others):
            return st.one_of(_values(first), *(_values(other) for other in others))
    return _SIMPLE[hint]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_decoding_gives_back_whatever_was_encoded(name: str, data: st.DataObject) -> None:
    message = data.draw(_values(KINDS[name]))
    assert a_codec().decode(a_codec().encode(message), KINDS[name]) == message


# released versions


def test_released_schemas_are_never_changed() -> None:
    lines = (RELEASED / "sha256sums.txt").read_text().splitlines()
    listed = {line.split()[1]: line.split()[0] for line in lines}
    present = {path.name: sha256(path.read_bytes()).hexdigest() for path in RELEASED.iterdir() if path.name != "sha256sums.txt"}
    assert present == listed


def test_each_schema_was_released_and_each_released_version_has_its_golden_bytes() -> None:
    released = [path.stem for path in RELEASED.glob("*.avsc")]
    assert sorted(released) == sorted(GOLDEN)
    assert {version.rsplit(".v", 1)[0] for version in released} == set(NAMES)


@pytest.mark.parametrize("version", sorted(GOLDEN))
def test_the_current_schema_reads_what_every_released_version_wrote(version: str) -> None:
    name = version.rsplit(".v", 1)[0]
    writer = fastavro.parse_schema(json.loads((RELEASED / f"{version}.avsc").read_text()))
    message = a_codec(s900=writer).decode(b"\0" + (900).to_bytes(4, "big") + GOLDEN[version], KINDS[name])
    assert type(message) is KINDS[name]
    # to the byte: written again with the old schema, nothing has changed
    again = io.BytesIO()
    as_written = fastavro.schemaless_reader(io.BytesIO(codec.pack(message)), own_schema(name), writer)
    fastavro.schemaless_writer(again, writer, as_written)
    assert again.getvalue() == GOLDEN[version]


def test_the_newest_version_of_a_message_is_still_the_example() -> None:
    # drop a name from here when its example has to change; its golden bytes stay
    assert {newest(name): codec.pack(example(name)) for name in NAMES} == {newest(name): GOLDEN[newest(name)] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_current_schema_is_a_released_one(name: str) -> None:
    released = (RELEASED / f"{newest(name)}.avsc").read_text()
    assert json.loads(codec.schema_text(name)) == json.loads(released), f"release it: copy it to {name}.v<next>.avsc"


def newest(name: str) -> str:
    return max((path.stem for path in RELEASED.glob(f"{name}.v*.avsc")), key=lambda stem: int(stem.rsplit(".v", 1)[1]))


# codec errors

SIGNAL = example("EngagementSignal")


def test_a_field_that_a_newer_writer_added_is_ignored() -> None:
    newer = json.loads(codec.schema_text("Headline"))
    newer["fields"].insert(0, {"name": "icon", "type": "string"})
    raw = frame(700, fastavro.parse_schema(newer), {"icon": "tick", "title": "a", "message": "b"})
    assert a_codec(s700=fastavro.parse_schema(newer)).decode(raw, messages.Headline) == messages.Headline(title="a", message="b")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "tombstone"),
        (b"", "too few"),
        (b"\0\0\0\0", "too few"),
        (b"\1\0\0\0\1rest", "magic byte 0x01"),
        (b'{"eventId": "e1"}', "magic byte 0x7b"),
        (b"\xff\0\0\0\1rest", "magic byte 0xff"),
    ],
)
def test_what_is_not_in_the_wire_format_is_undecodable(raw: bytes | None, words: str) -> None:
    with pytest.raises(UndecodableError, match=words):
        a_codec().decode(raw, messages.Headline)
    with pytest.raises(UndecodableError, match=words):
        a_codec().decode_foreign(raw)


def test_an_id_that_is_not_known_yet_is_named() -> None:
    for decode in (lambda raw: a_codec().decode(raw, messages.Headline), a_codec().decode_foreign):
        with pytest.raises(UnknownSchemaError) as caught:
            decode(b"\0\xff\xff\xff\xfe")
        assert caught.value.schema_id == 0xFFFFFFFE


def test_a_schema_learnt_later_is_used() -> None:
    known: dict[int, Any] = {}
    late = Codec({}, known)
    raw = frame(5, own_schema("Headline"), {"title": "a", "message": "b"})
    with pytest.raises(UnknownSchemaError):
        late.decode_foreign(raw)
    known[5] = own_schema("Headline")
    assert late.decode_foreign(raw) == {"title": "a", "message": "b"}


def test_every_truncation_is_undecodable() -> None:
    raw = a_codec().encode(SIGNAL)
    for size in range(len(raw)):
        with pytest.raises(UndecodableError):
            a_codec().decode(raw[:size], messages.EngagementSignal)


def test_bytes_left_over_after_a_foreign_record_are_undecodable() -> None:
    raw = frame(500, own_schema("Headline"), {"title": "a", "message": "b"})
    with pytest.raises(UndecodableError, match="left over"):
        a_codec(s500=own_schema("Headline")).decode_foreign(raw + b"\0")


def test_a_foreign_value_that_is_no_record_is_undecodable() -> None:
    with pytest.raises(UndecodableError, match="no record"):
        a_codec(s500=fastavro.parse_schema("string")).decode_foreign(b"\0" + (500).to_bytes(4, "big") + b"\x02a")


@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_else(noise: bytes) -> None:
    codecs = a_codec()
    for name in NAMES:
        for raw in (noise, b"\0" + NAMES.index(name).to_bytes(4, "big") + noise):
            for decode in (lambda raw, kind=KINDS[name]: codecs.decode(raw, kind), codecs.decode_foreign):
                with contextlib.suppress(UndecodableError, UnknownSchemaError):
                    decode(raw)


# ids


@given(st.binary(max_size=64))
def test_murmur2_is_that_of_the_java_client(key: bytes) -> None:
    assert ids.murmur2(key) == aiokafka_murmur2(key) & 0xFFFFFFFF


# org.apache.kafka.common.utils.UtilsTest.testMurmur2
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_gives_what_kafkas_own_test_expects(key: bytes, expected: int) -> None:
    assert ids.murmur2(key) == expected & 0xFFFFFFFF


_id_parts = st.fixed_dictionaries({name: st.text(max_size=30) for name in ("producer", "event_id", "rule", "user_id")})


@given(_id_parts, st.integers(1, 500))
def test_a_notification_id_embeds_the_partition_of_its_user(parts: dict[str, str], partitions: int) -> None:
    notification = ids.notification_id(**parts)
    assert ids.is_notification_id(notification)
    assert ids.partition_of_notification(notification, partitions) == ids.partition_of(parts["user_id"].encode(), partitions)
    assert 0 <= ids.partition_of_notification(notification, partitions) < partitions


@given(_id_parts, _id_parts)
def test_ids_are_equal_exactly_when_all_they_are_made_of_is(one: dict[str, str], other: dict[str, str]) -> None:
    assert (ids.notification_id(**one) == ids.notification_id(**other)) == (one == other)


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_digests_keep_parts_apart(one: list[str], other: list[str]) -> None:
    assert (ids.digest(*one, size=16) == ids.digest(*other, size=16)) == (one == other)


def test_moving_a_letter_from_one_part_to_the_next_changes_the_digest() -> None:
    assert ids.digest("ab", "c", size=8) != ids.digest("a", "bc", size=8)


def test_ids_never_change() -> None:
    # stored by users and in topics: a new value here orphans every notification there is
    notification = ids.notification_id(producer="payments", event_id="evt_1", rule="payment_confirmed", user_id="u1")
    assert ids.delivery_id(notification, "email") == f"{notification}-email"
    assert notification == "2c6cf2f03525d4735c3e89f376f7b7e9"


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "٣" * 32])
def test_what_does_not_look_like_a_notification_id_is_none(text: str) -> None:
    assert not ids.is_notification_id(text)


# statuses

Change = tuple[int, int, Status]
_changes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(Status)), min_size=1, max_size=12)


def _settled(changes: list[Change]) -> Status:
    """Return where a delivery ends that sees `changes` in this order."""
    best: tuple[Order, Status] | None = None
    for generation, attempt, status in changes:
        place = order(generation=generation, attempt=attempt, status=status)
        if best is None or place > best[0]:
            best = (place, status)
    assert best is not None
    return best[1]


# ways to end without a provider's word: they share a rank, and of two of them the earlier stays (see test_inbox.py)
ENDED_BY_US = {Status.MERGED, Status.SKIPPED, Status.CANCELLED, Status.EXPIRED}


@given(_changes, st.data())
def test_any_order_and_repetition_of_changes_ends_in_the_same_status(changes: list[Change], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(changes + data.draw(st.lists(st.sampled_from(changes)))))
    one, other = _settled(changes), _settled(shuffled)
    assert one == other or {one, other} <= ENDED_BY_US


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(Status, 2)))
def test_only_ways_to_end_without_a_providers_word_share_a_rank(one: Status, other: Status) -> None:
    is_same = order(generation=0, attempt=1, status=one) == order(generation=0, attempt=1, status=other)
    assert is_same == ({one, other} <= ENDED_BY_US)


@pytest.mark.parametrize(
    ("higher", "lower"),
    [
        (Status.BOUNCED, Status.DELIVERED),
        *((Status.DELIVERED, lower) for lower in (Status.UNKNOWN, Status.FAILED, Status.EXPIRED, Status.SENT)),
        (Status.SENT, Status.SENDING),
        (Status.RETRYING, Status.SENDING),
        (Status.UNKNOWN, Status.SENDING),
    ],
)
def test_within_an_attempt_the_better_informed_status_wins(higher: Status, lower: Status) -> None:
    assert order(generation=1, attempt=2, status=higher) > order(generation=1, attempt=2, status=lower)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(Status, Status)))
def test_a_later_attempt_beats_every_status_of_an_earlier_one_and_a_redrive_beats_every_attempt(one: Status, other: Status) -> None:
    assert order(generation=0, attempt=2, status=one) > order(generation=0, attempt=1, status=other)
    assert order(generation=1, attempt=0, status=one) > order(generation=0, attempt=99, status=other)


def test_nothing_happens_automatically_after_these() -> None:
    assert {status for status in Status if is_terminal(status)} == {
        Status.MERGED, Status.SKIPPED, Status.CANCELLED, Status.EXPIRED, Status.FAILED, Status.DELIVERED, Status.BOUNCED,
    }  # fmt: skip


def test_within_an_attempt_no_open_status_beats_a_terminal_one() -> None:
    ranks = {status: order(generation=0, attempt=1, status=status) for status in Status}
    assert max(ranks[s] for s in Status if not is_terminal(s)) < min(ranks[s] for s in Status if is_terminal(s))


# errors


def _subclasses(kind: type[NotifyError]) -> set[type[NotifyError]]:
    ours = {"schemas", "templates", "channels", "agents", "streams"}
    found = {sub for sub in kind.__subclasses__() if sub.__module__.split(".")[0] in ours}
    return found.union(*(_subclasses(sub) for sub in found))


def test_each_error_says_again_or_never() -> None:
    retryable, permanent = _subclasses(errors.RetryableError), _subclasses(errors.PermanentError)
    leaves = {kind for kind in _subclasses(NotifyError) if not _subclasses(kind)}
    undecided = {kind for kind in leaves if (kind in retryable) == (kind in permanent)}
    # neither again nor never, by intent: the channel's policy decides
    assert undecided == {errors.SendUnknownError}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r" {4}([│├└─ ]*)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            if depth:
                drawn[found[2]] = path[depth - 1]
    # a mixin: what a provider answered, in either branch
    classes = _subclasses(NotifyError) - {errors.ProviderError}
    assert drawn == {kind.__name__: next(b.__name__ for b in reversed(kind.__bases__)) for kind in classes}


def test_each_error_has_advice_and_a_reason_of_its_own() -> None:
    kinds = _subclasses(NotifyError)
    assert all(kind.__doc__ for kind in kinds)
    reasons = [kind.__new__(kind).reason for kind in kinds]
    assert len(set(reasons)) == len(kinds)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", reason) for reason in reasons)


# sealing

_keys = st.binary(min_size=32, max_size=32)


@given(_keys, st.binary(max_size=200), st.text(max_size=20), st.text(max_size=20))
def test_sealing_round_trips_and_is_deterministic(key: bytes, plaintext: bytes, user_id: str, purpose: str) -> None:
    once = sealed.seal(key, plaintext, user_id=user_id, purpose=purpose)
    assert once == sealed.seal(key, plaintext, user_id=user_id, purpose=purpose)
    assert len(once) == len(plaintext) + 28
    assert len(plaintext) < 4 or plaintext not in once
    assert sealed.unseal(key, once, user_id=user_id, purpose=purpose) == plaintext


_seals = st.tuples(_keys, st.text(max_size=9), st.sampled_from(["contact", "content"]))


@given(_seals, _seals)
def test_another_key_user_or_purpose_does_not_open_it(one: tuple[bytes, str, str], other: tuple[bytes, str, str]) -> None:
    box = sealed.seal(one[0], b"amara@example.com", user_id=one[1], purpose=one[2])
    for key, user_id, purpose in itertools.product(*zip(one, other, strict=True)):
        if (key, user_id, purpose) != one:
            with pytest.raises(UnsealableError) as caught:
                sealed.unseal(key, box, user_id=user_id, purpose=purpose)  # type: ignore[arg-type]
            assert "amara" not in str(caught.value)


@given(st.integers(0, 44), st.integers(1, 255))
def test_one_changed_byte_is_noticed(position: int, flip: int) -> None:
    box = bytearray(sealed.seal(SEAL_KEY, b"amara@example.com", user_id="u1", purpose="contact"))
    box[position] ^= flip
    with pytest.raises(UnsealableError):
        sealed.unseal(SEAL_KEY, bytes(box), user_id="u1", purpose="contact")


@pytest.mark.parametrize("size", [0, 1, 11, 12, 27])
def test_what_is_too_short_to_be_sealed_does_not_open(size: int) -> None:
    with pytest.raises(UnsealableError):
        sealed.unseal(SEAL_KEY, bytes(size), user_id="u1", purpose="contact")


def test_a_wrapped_key_opens_only_for_its_user_and_with_its_seal_key() -> None:
    wrapped = sealed.wrap(SEAL_KEY, b"k" * 32, user_id="u1")
    assert sealed.unwrap(SEAL_KEY, wrapped, user_id="u1") == b"k" * 32
    with pytest.raises(UnsealableError):
        sealed.unwrap(SEAL_KEY, wrapped, user_id="u2")
    with pytest.raises(UnsealableError):
        sealed.unwrap(b"s" * 32, wrapped, user_id="u1")


# payments as producers write them

IDS: dict[str, int] = {ForeignSchema.FLAT: 1, ForeignSchema.ENVELOPED: 2}
FOREIGN = Codec({}, {number: producing.parsed(schema) for schema, number in IDS.items()})
PAYMENTS = samples("payments")


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("payment", PAYMENTS)
def test_each_sample_payment_arrives_as_it_was_sent(payment: dict[str, Any]) -> None:
    assert _without_nulls(FOREIGN.decode_foreign(producing.encode_payment(payment, IDS))) == payment


def test_the_samples_are_the_contracts_two_shapes_and_the_small_one() -> None:
    assert [producing.choose(payment).value for payment in PAYMENTS] == ["payments.flat", "payments.enveloped", *["payments.flat"] * 3]
    assert PAYMENTS[1] == json.loads((CONTRACTS / "PaymentProcessed.example.json").read_text())
    contract = json.loads((CONTRACTS / "PaymentProcessed.schema.json").read_text())
    for payment in (PAYMENTS[0], PAYMENTS[2], PAYMENTS[3]):
        jsonschema.validate(payment, contract, format_checker=jsonschema.FormatChecker())
    assert "userId" not in PAYMENTS[4]


def test_the_flat_schema_has_every_property_of_the_contract() -> None:
    contract = json.loads((CONTRACTS / "PaymentProcessed.schema.json").read_text())
    assert set(contract["properties"]) <= {field["name"] for field in producing.parsed(ForeignSchema.FLAT)["fields"]}


def test_preferences_exist_for_the_users_of_the_samples() -> None:
    known = {user["userId"] for user in samples("preferences")}
    named = {payment.get("userId") or payment.get("data", {}).get("customerId") for payment in PAYMENTS}
    named |= {each["userId"] for stem in ("actions", "watches") for each in samples(stem)}
    assert known == named - {None}
    assert all(user["email"].endswith(("@example.com", "@flowmart.example")) for user in samples("preferences"))


def test_the_samples_can_be_reached_on_every_channel_by_numbers_of_nobody() -> None:
    users = samples("preferences")
    numbers = [user["phone"] for user in users if user["phone"]]
    assert {parse_number(number).country for number in numbers} == {"US", "DE"}
    # kept free for stories: 555-01xx in North America, and single numbers by the Bundesnetzagentur
    assert all(re.fullmatch(r"\+1\d{3}55501\d\d|\+4915228817386", number) for number in numbers)
    assert {parse_device(device).kind for user in users for device in user["devices"]} == {"fcm", "apns"}


def test_fields_that_the_schema_does_not_have_are_dropped() -> None:
    assert producing.encode_payment({"id": "pay_1", "colour": "red"}, IDS) == producing.encode_payment({"id": "pay_1"}, IDS)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("eventId", 7, "is a number, expected a text"),
        ("data.amount", "189.97", "is a text, expected a number"),
        ("data.amount", True, "is a boolean, expected a number"),
        ("data.amount", float("nan"), "is no finite number"),
        ("data.amount", 10**400, "is no finite number"),
        ("data.orderId", ["ord_1"], "is a list, expected a text"),
        ("data.orderId", "\ud800", "holds half a surrogate pair"),
        ("data.paymentMethod", "card", "is a text, expected an object"),
        ("data.paymentMethod.brand", {}, "is an object, expected a text"),
        ("data.items", "cable", "is a text, expected a list"),
        ("data.items[1].quantity", 1.5, "is a number, expected a whole number"),
        ("data.items[1].quantity", 2**40, "does not fit 32 bits"),
        ("metadata.channel", None, "is null, expected a text"),
    ],
)
def test_a_wrong_type_is_reported_with_its_path(path: str, value: object, problem: str) -> None:
    payment = copy.deepcopy(PAYMENTS[1])
    *parents, last = re.findall(r"\w+", path)
    inner: Any = payment
    for name in parents:
        inner = inner[int(name) if name.isdecimal() else name]
    inner[last] = value
    with pytest.raises(InvalidEventError) as caught:
        producing.encode_payment(payment, IDS)
    assert caught.value.field == path
    assert str(caught.value).startswith(f"{path}: {problem}")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
_field_names = sorted({field["name"] for schema in ForeignSchema for field in producing.parsed(schema)["fields"]})


@given(st.dictionaries(st.sampled_from(_field_names), _json))
def test_any_json_is_encoded_or_reported(payment: dict[str, object]) -> None:
    try:
        raw = producing.encode_payment(payment, IDS)
    except InvalidEventError:
        return
    FOREIGN.decode_foreign(raw)


def test_each_schema_has_a_subject_of_its_own() -> None:
    assert [schema.subject("payments.dev.events") for schema in ForeignSchema] == [
        "payments.dev.events-com.flowmart.payments.PaymentProcessed",
        "payments.dev.events-com.flowmart.payments.PaymentProcessedEnvelope",
        "payments.dev.events-com.flowmart.inventory.InventoryAdjusted",
        "payments.dev.events-com.flowmart.inventory.InventoryAdjustedEnvelope",
        "payments.dev.events-com.flowmart.inventory.v1.inventory_adjusted",
    ]


# adjustments of inventory as producers write them

ADJUSTMENTS = samples("inventory")
CONTRACT_ADJUSTMENT = json.loads((CONTRACTS / "InventoryAdjusted.example.json").read_text())


def _adjustment_as_read(adjustment: dict[str, Any]) -> object:
    shape = producing.choose_inventory(adjustment)
    reader = Codec({}, {1: producing.parsed(shape)})
    return _without_nulls(reader.decode_foreign(codec.frame(1, producing.parsed(shape), producing.to_record(shape, adjustment))))


@pytest.mark.parametrize("adjustment", [CONTRACT_ADJUSTMENT, *ADJUSTMENTS])
def test_each_adjustment_arrives_as_it_was_sent(adjustment: dict[str, Any]) -> None:
    assert _adjustment_as_read(adjustment) == adjustment


def test_the_sample_adjustments_come_in_all_three_shapes() -> None:
    assert {producing.choose_inventory(each) for each in ADJUSTMENTS} == {
        ForeignSchema.INVENTORY_FLAT,
        ForeignSchema.INVENTORY_ENVELOPED,
        ForeignSchema.INVENTORY_SNAKE,
    }
