"""What recipients read: every rule on every channel, and what hostile data cannot do to it."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.ports import KnownSource
from agents.triggers import RULES, ingest_action, ingest_payment
from channels.sms import Encoding, Transliterate, segments
from schemas.errors import TemplateError
from schemas.examples import samples
from schemas.messages import NotificationRequested, UserAction
from schemas.topics import Channel
from templates.render import FOLDER, MAX_PART_BYTES, Links, Templates, cleaned, money, paragraphs, sentence

TEMPLATES = Templates()
LINKED = Templates(
    links=Links(
        orders_url="https://www.flowmart.example/orders",
        preferences_url="https://www.flowmart.example/preferences",
        help_url="https://www.flowmart.example/help",
    )
)
PARTS = {
    Channel.EMAIL: {"subject", "text", "html"},
    Channel.SMS: {"text"},
    Channel.PUSH: {"title", "message"},
    Channel.IN_APP: {"title", "message"},
}
STOCK = {
    "productId": "prod_1129",
    "productName": "Wireless Bluetooth Headphones",
    "sku": "WBH-400-BLK",
    "warehouseId": "wh_east_01",
    "quantity": "4",
    "previousQuantity": "31",
    "threshold": "20",
    "occurredAt": "17 November 2025 at 07:45 UTC",
}
ACTIONS: tuple[tuple[str, dict[str, str]], ...] = (
    ("password_reset_requested", {"code": "481 205", "expiresInMinutes": "15", "requestedFrom": "Firefox on Linux"}),
    ("password_reset_requested", {"code": "481 205"}),
    ("password_reset_requested", {"expiresInMinutes": "15"}),
    ("password_reset_requested", {}),
    ("signed_in", {"device": "Firefox on Linux", "location": "Lyon, France"}),
    ("signed_in", {}),
)


def _data() -> Iterator[tuple[str, dict[str, str]]]:
    source = KnownSource(topic="payments", partition=0, offset=0, at=datetime(2026, 1, 2, tzinfo=UTC))
    bare = {"status": "confirmed", "userId": "u1"}
    for payment in [*samples("payments")[:4], bare, bare | {"status": "failed"}, bare | {"status": "pending"}]:
        (output,) = ingest_payment(payment, source, b"").outputs
        assert isinstance(output.value, NotificationRequested)
        yield output.value.rule, dict(output.value.data)
    for data in (
        STOCK,
        STOCK | {"productName": "", "sku": ""},
        STOCK | dict.fromkeys(("warehouseId", "previousQuantity", "productName"), ""),
    ):
        yield from ((rule, data) for rule in ("out_of_stock", "low_stock", "back_in_stock"))
    for name, facts in ACTIONS:
        (output,) = ingest_action(
            UserAction(action_id="a", user_id="u1", action=name, data=facts, occurred_at=source.at), source, {}
        ).outputs
        assert isinstance(output.value, NotificationRequested)
        yield output.value.rule, dict(output.value.data)
    yield "message", {"title": "Your parcel has arrived", "message": "Collect it by Friday.\nBring a photo ID.\n\nYour code is 4471."}


DATA = list(_data())
CONFIRMED = DATA[1][1]
FAILED = DATA[2][1]
DATA_OF = dict(reversed(DATA))  # of each rule the first
CASES = [(rule, channel, data) for rule, data in DATA for channel in RULES[rule].channels]


class _Balance(HTMLParser):
    """Collects the text, and the tags that are left open or closed without being open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in {"href", "src"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_each_rule_is_in_the_cases() -> None:
    assert {rule for rule, _, _ in CASES} == set(RULES)


@pytest.mark.parametrize("templates", [TEMPLATES, LINKED])
@pytest.mark.parametrize(("rule", "channel", "data"), CASES)
def test_each_rule_reads_well_on_each_channel(templates: Templates, rule: str, channel: Channel, data: dict[str, str]) -> None:
    parts = templates.render(RULES[rule].template, channel, data)
    assert parts.keys() == PARTS[channel]
    for part, text in parts.items():
        assert text.strip(), part
        plain = _Balance(text).text if part == "html" else text
        assert not re.search(r"[{}]|None|Undefined|  \w| [.,]|\.\.", plain.replace("\n  ", "\n")), plain
        assert "\n\n\n" not in text
    if channel is Channel.EMAIL:
        page = _Balance(parts["html"])
        assert (page.open, page.wrong) == ([], [])


def test_a_confirmed_payment_tells_amount_order_and_method() -> None:
    mail = LINKED.render("payment_confirmed", "email", CONFIRMED | {"name": "Daniel Reyes"})
    assert mail["subject"] == "Payment received: $189.97 for order ord_92840123"
    for text in (mail["text"], _Balance(mail["html"]).text):
        for fact in ("Hello Daniel Reyes,", "your payment of $189.97.", "Visa ending 4242", "ord_92840123", "15 March 2024 at 11:04 UTC"):
            assert fact in text
    assert "https://www.flowmart.example/orders/ord_92840123" in mail["text"]
    assert TEMPLATES.render("payment_confirmed", "in_app", CONFIRMED) == {
        "title": "Payment received",
        "message": "We have received your payment of $189.97 for order ord_92840123. You do not need to do anything else.",
    }


def test_a_failed_payment_says_why_and_what_to_do() -> None:
    mail = TEMPLATES.render("payment_failed", "email", FAILED)
    assert mail["subject"] == f"Payment failed for order {FAILED['orderId']}: please try again"
    for text in (mail["text"], _Balance(mail["html"]).text):
        for fact in ("Hello,", "$1,249.00", "Your bank declined the payment.", "Try again, or pay another way.", FAILED["orderId"]):
            assert fact in text
    assert TEMPLATES.render("payment_failed", "in_app", FAILED)["message"].endswith("payment. Try again, or pay another way.")


def test_a_pending_payment_is_told_in_the_app_only() -> None:
    assert "¥12,800" in TEMPLATES.render("payment_pending", "in_app", DATA[3][1])["message"]
    with pytest.raises(TemplateError, match="no template for channel email"):
        TEMPLATES.render("payment_pending", "email", DATA[3][1])


def test_a_message_keeps_its_lines() -> None:
    mail = TEMPLATES.render("message", "email", DATA[-1][1])
    assert "Collect it by Friday.\nBring a photo ID.\n\nYour code is 4471.\n" in mail["text"]
    assert "Collect it by Friday.<br>Bring a photo ID.</p>" in mail["html"]
    assert TEMPLATES.render("message", "in_app", DATA[-1][1])["message"] == DATA[-1][1]["message"]


def test_the_staff_are_told_what_ran_out_where_and_what_to_do() -> None:
    mail = TEMPLATES.render("out_of_stock", "email", STOCK | {"name": "Priya"})
    assert mail["subject"] == "Out of stock: Wireless Bluetooth Headphones in wh_east_01"
    for text in (mail["text"], _Balance(mail["html"]).text):
        for fact in ("Hello Priya,", "wh_east_01", "prod_1129", "WBH-400-BLK", "31", "Order more"):
            assert fact in text
    assert TEMPLATES.render("low_stock", "in_app", STOCK)["message"].startswith("Only 4 of Wireless Bluetooth Headphones left in warehouse")
    assert "20 or fewer" in TEMPLATES.render("low_stock", "email", STOCK)["text"]


def test_a_product_without_a_name_goes_by_its_sku_and_else_its_id() -> None:
    for data, name in ((STOCK | {"productName": ""}, "WBH-400-BLK"), (STOCK | {"productName": "", "sku": ""}, "prod_1129")):
        assert TEMPLATES.render("back_in_stock", "email", data)["subject"] == f"Back in stock: {name}"
        assert TEMPLATES.render("back_in_stock", "in_app", data)["message"].startswith(f"{name} is back in stock.")


def test_the_code_of_a_password_reset_is_in_the_body_of_the_mail_and_nowhere_else() -> None:
    data = DATA_OF["password_reset"]
    mail = TEMPLATES.render("password_reset", "email", data)
    assert all("481 205" in mail[part] and "15 minutes" in mail[part] for part in ("text", "html"))
    # subjects show on locked screens, and the inbox to whoever sits at an open session
    seen_by_others = (mail["subject"], *TEMPLATES.render("password_reset", "in_app", data).values())
    assert not [text for text in seen_by_others if "481" in text]
    assert "Enter this code" not in TEMPLATES.render("password_reset", "email", data | {"code": ""})["text"]


# text messages and pushes


@pytest.mark.parametrize(("rule", "data"), [(rule, data) for rule, channel, data in CASES if channel is Channel.SMS])
def test_a_text_message_says_first_who_speaks_and_is_short_and_cheap(rule: str, data: dict[str, str]) -> None:
    text = TEMPLATES.render(RULES[rule].template, "sms", data)["text"]
    assert text.startswith("FlowMart: ")
    sent = segments(text, transliterate=Transliterate.NONE)
    assert sent.encoding is Encoding.GSM7, "one character outside GSM-7 doubles what it costs"
    assert len(sent.parts) <= 2


def test_a_code_stands_in_the_first_line_of_a_text_message_as_telephones_look_for_it() -> None:
    data = DATA_OF["password_reset"]
    text = TEMPLATES.render("password_reset", "sms", data)["text"]
    assert text.split("\n") == [
        "FlowMart: 481205 is your code to reset your password. It works for 15 minutes.",
        "Not you? Ignore this text. Give the code to nobody: we never ask for it.",
    ]
    assert "AB 12-C is your code" in TEMPLATES.render("password_reset", "sms", data | {"code": "AB 12-C"})["text"]
    assert "your code" not in TEMPLATES.render("password_reset", "sms", data | {"code": ""})["text"]


def test_a_locked_screen_does_not_show_why_a_payment_failed() -> None:
    assert TEMPLATES.render("payment_failed", "push", FAILED) == {
        "title": "Payment failed",
        "message": f"Your payment of $1,249.00 for order {FAILED['orderId']} did not go through. Try again, or pay another way.",
    }


@pytest.mark.parametrize("fill", ["x", "é", "漢", "😀", '"', "x \n"])
def test_a_push_and_a_text_message_are_cut_to_what_telephones_take(fill: str) -> None:
    data = {"title": fill * 3_000, "message": "m" + fill * 3_000}
    push, text = TEMPLATES.render("message", "push", data), TEMPLATES.render("message", "sms", data)["text"]
    # no push service takes more than 4,096 bytes; Web Push, which encrypts them, 3,993
    assert len(json.dumps(push, ensure_ascii=False).encode()) < 3_300
    assert [each[-1] for each in push.values()] == ["…", "…"]
    assert len(push["message"].encode()) > 1_490
    assert text.endswith("...")
    units = len(text.encode("utf-16-le")) // 2
    assert 6 * 66 - 3 <= units <= 6 * 66
    assert len(segments(text).parts) <= 6
    assert "\ufffd" not in "".join((*push.values(), text))


@given(st.lists(st.sampled_from("aé漢😀€\"' "), min_size=360, max_size=420))
def test_a_text_message_is_never_more_than_six_segments(characters: list[str]) -> None:
    text = TEMPLATES.render("message", "sms", {"title": "t", "message": "".join(characters)})["text"]
    assert len(segments(text).parts) <= 6


def test_what_just_fits_is_not_cut() -> None:
    for channel, part, room in (("push", "title", 100), ("push", "message", 1_500), ("in_app", "title", 250), ("email", "subject", 250)):
        for length in (room, room + 1):
            found = TEMPLATES.render("message", channel, {"title": "x" * length, "message": "x" * length})[part]
            assert (len(found.encode()) == room == found.count("x")) is (length == room)
    fits = 6 * 66 - len("FlowMart: t\n")
    for length in (fits, fits + 1):
        text = TEMPLATES.render("message", "sms", {"title": "t", "message": "x" * length})["text"]
        assert text.endswith("x") is (length == fits)


def test_what_is_not_known_is_not_linked() -> None:
    assert _Balance(TEMPLATES.render("payment_failed", "email", FAILED)["html"]).addresses == []
    assert _Balance(LINKED.render("payment_failed", "email", FAILED)["html"]).addresses == [
        f"https://www.flowmart.example/orders/{FAILED['orderId']}",
        "https://www.flowmart.example/preferences",
        "https://www.flowmart.example/help",
    ]


def test_mails_are_fit_for_mail_programs() -> None:
    html = LINKED.render("payment_confirmed", "email", CONFIRMED)["html"]
    assert html.startswith("<!DOCTYPE html>")
    for needed in ("max-width:600px", "prefers-color-scheme: dark", 'role="presentation"', "mso-hide:all", 'name="viewport"'):
        assert needed in html
    assert not re.search(r"<(script|link|img|iframe|form)\b|url\(", html)
    # Gmail cuts at 102 KB
    assert len(html.encode()) < 20_000


# hostile data

HOSTILE = [
    "{{7*7}}",
    "{% for x in range(9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{# hidden #}",
    "<script>alert(1)</script>",
    "\"'><b onload=x>",
    "&amp;",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(("rule", "channel", "data"), CASES)
def test_data_are_never_templates_nor_tags(rule: str, channel: Channel, data: dict[str, str], text: str) -> None:
    hostile = dict.fromkeys(data, text) | {"name": text}
    parts = LINKED.render(RULES[rule].template, channel, hostile)
    for part, rendered in parts.items():
        if text == "{{7*7}}":
            assert "49" not in rendered
        if part == "html":
            page = _Balance(rendered)
            assert text in page.text
            assert (page.open, page.wrong) == ([], [])
            assert "<script" not in rendered
            assert "<b " not in rendered
        elif part in {"text", "message"}:
            assert text in rendered


def test_an_order_id_cannot_leave_its_place_in_an_address() -> None:
    html = LINKED.render("payment_confirmed", "email", CONFIRMED | {"orderId": 'x" onclick="y?a=b#c d'})["html"]
    assert "https://www.flowmart.example/orders/x%22%20onclick%3D%22y%3Fa%3Db%23c%20d" in _Balance(html).addresses


def test_data_cannot_set_links_or_what_a_layout_asks_for() -> None:
    links = ("orders_url", "preferences_url", "help_url")
    of_layouts = ("action", "details", "rows", "tone", "heading", "preheader", "because", "total")
    evil = dict.fromkeys(links + of_layouts, "https://evil.example")
    for templates in (TEMPLATES, LINKED):
        for rule, channel, data in CASES:
            assert templates.render(RULES[rule].template, channel, evil | data) == templates.render(RULES[rule].template, channel, data)


@pytest.mark.parametrize("break_", ["\r\n", "\n", "\r", "\u2028", "\x85", "\v", "\0", "\r\n\r\n"])
def test_no_data_add_a_header_to_a_mail(break_: str) -> None:
    data = {"title": f"Hello{break_}Bcc: everybody@example.com", "message": "m"}
    for text in (TEMPLATES.render("message", "email", data)["subject"], TEMPLATES.render("message", "in_app", data)["title"]):
        assert re.fullmatch(r"Hello ?Bcc: everybody@example\.com", text)
    subject = TEMPLATES.render("payment_failed", "email", FAILED | {"orderId": f"1{break_}Bcc: a@example.com"})["subject"]
    assert len(subject.splitlines()) == 1


def test_a_subject_has_a_bound() -> None:
    subject = TEMPLATES.render("message", "email", {"title": "word " * 1000, "message": "m"})["subject"]
    assert (len(subject), subject[-1]) == (250, "…")


@given(st.text(alphabet=st.characters(codec=None), max_size=60), st.sampled_from(CASES))
def test_no_control_or_reordering_character_gets_through(text: str, case: tuple[str, Channel, dict[str, str]]) -> None:
    rule, channel, data = case
    for part, rendered in TEMPLATES.render(RULES[rule].template, channel, dict.fromkeys(data, text) | {"name": text}).items():
        rendered.encode()
        kinds = {(char, unicodedata.category(char)) for char in rendered if char != "\n"}
        assert not [char for char, kind in kinds if kind in {"Cc", "Cs", "Zl", "Zp"}]
        assert not set(rendered) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
        assert part not in {"subject", "title"} or "\n" not in rendered


def test_other_scripts_and_emoji_get_through() -> None:
    text = "دفعتك 👩‍👩‍👧 न्यू café\u200f"
    assert cleaned(text) == text
    assert cleaned("abc\u202egnp.exe\ta\r\nb") == "abcgnp.exe a\nb"


# templates that do not fit


@pytest.mark.parametrize(("rule", "channel", "data"), CASES)
def test_a_missing_placeholder_is_named_with_template_and_part(rule: str, channel: Channel, data: dict[str, str]) -> None:
    with pytest.raises(TemplateError) as caught:
        TEMPLATES.render(RULES[rule].template, channel, {})
    assert re.fullmatch(rf"{rule}/{channel}\.\w+: '(\w+)' is undefined", str(caught.value))
    for name in data:
        less = {other: value for other, value in data.items() if other != name}
        try:
            TEMPLATES.render(RULES[rule].template, channel, less)
        except TemplateError as error:
            assert f"'{name}'" in str(error)  # noqa: PT017 - a template need not use all data


@pytest.mark.parametrize("fill", ["x", "é", "\n"])
def test_a_part_has_a_bound(fill: str) -> None:
    data = {"title": "t", "message": f"a{fill * MAX_PART_BYTES}b"}
    with pytest.raises(TemplateError, match=r"message/in_app.message: is larger"):
        TEMPLATES.render("message", "in_app", data)
    assert TEMPLATES.render("message", "in_app", {"title": "t", "message": "x" * (MAX_PART_BYTES - 10)})


def test_what_does_not_exist_is_a_template_error() -> None:
    for wrong in ("nonsense", "_layout", "../message"):
        with pytest.raises(TemplateError):
            TEMPLATES.render(wrong, "email", {})
        with pytest.raises(TemplateError):
            TEMPLATES.version(wrong)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ a", "t/in_app.title"),
        ("{% include 'nowhere' %}", "nowhere"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__class__"),
        ("{{ a.append(1) }}", "undefined|no attribute|append"),
    ],
)
def test_a_broken_or_unsafe_template_is_a_template_error(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "in_app.title.j2").write_text(source)
    with pytest.raises(TemplateError, match=words):
        Templates(tmp_path).render("t", "in_app", {"a": "b"})


def test_a_file_that_names_no_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "title.j2").write_text("a")
    with pytest.raises(TemplateError, match=r"t/title\.j2"):
        Templates(tmp_path)


# versions


def test_a_version_changes_with_its_template_or_a_layout_and_with_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "templates"
    shutil.copytree(FOLDER, folder)
    before = Templates(folder)
    (folder / "message" / "in_app.title.j2").write_text("{{ title }}!")
    after = Templates(folder)
    assert re.fullmatch(r"[0-9a-f]{12}", before.version("message"))
    assert before.version("message") == TEMPLATES.version("message")
    assert after.version("message") != before.version("message")
    assert after.version("payment_failed") == before.version("payment_failed")
    (folder / "_layout" / "email.text.j2").write_text("{{ heading }}")
    assert Templates(folder).version("payment_failed") != before.version("payment_failed")


def test_a_file_that_changes_later_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    file = tmp_path / "t" / "in_app.title.j2"
    file.write_text("old")
    templates = Templates(tmp_path)
    file.write_text("new")
    assert templates.render("t", "in_app", {}) == {"title": "old"}


# words


@pytest.mark.parametrize(
    ("amount", "currency", "expected"),
    [
        ("189.97", "USD", "$189.97"),
        ("1249.00", "GBP", "£1,249.00"),
        ("12800", "JPY", "¥12,800"),
        ("1249.00", "CHF", "1,249.00 CHF"),
        ("much", "EUR", "€much"),
        ("1" * 5000, "USD", "$" + "1" * 5000),
    ],
)
def test_money(amount: str, currency: str, expected: str) -> None:
    assert money(amount, currency) == expected


def test_sentences_and_paragraphs() -> None:
    assert [sentence(text) for text in ("declined", "Why?", " it is late. ", "")] == ["Declined.", "Why?", "It is late.", ""]
    assert paragraphs("a\nb\n\n \n\nc\n") == [["a", "b"], ["c"]]
