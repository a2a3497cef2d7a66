"""How a text becomes segments and a number a country: the rules of the standards, without a provider."""

# ruff: noqa: RUF001 - characters that look like others are what this is about
from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from channels.sms import (
    MAX_SEGMENTS,
    ROOM,
    Encoding,
    Transliterate,
    carried,
    decode_gsm7,
    encode_gsm7,
    fitted,
    parse_number,
    route_of,
    segments,
)
from schemas.errors import ProviderRejectedError

# written out from 3GPP TS 23.038 section 6.2.1, by code, so that a slip in the table does not prove itself
SOME_CODES = {
    "@": 0x00, "£": 0x01, "$": 0x02, "¥": 0x03, "è": 0x04, "é": 0x05, "ù": 0x06, "ì": 0x07, "ò": 0x08, "Ç": 0x09, "\n": 0x0A,
    "Ø": 0x0B, "ø": 0x0C, "\r": 0x0D, "Å": 0x0E, "å": 0x0F, "Δ": 0x10, "_": 0x11, "Ω": 0x15, "Ξ": 0x1A, "Æ": 0x1C, "É": 0x1F,
    " ": 0x20, "¤": 0x24, "0": 0x30, "¡": 0x40, "A": 0x41, "Z": 0x5A, "Ä": 0x5B, "Ö": 0x5C, "Ñ": 0x5D, "Ü": 0x5E, "§": 0x5F,
    "¿": 0x60, "a": 0x61, "z": 0x7A, "ä": 0x7B, "ö": 0x7C, "ñ": 0x7D, "ü": 0x7E, "à": 0x7F,
}  # fmt: skip
EXTENSION = {"^": 0x14, "{": 0x28, "}": 0x29, "\\": 0x2F, "[": 0x3C, "~": 0x3D, "]": 0x3E, "|": 0x40, "€": 0x65}
EMOJI = "\N{GRINNING FACE}"


@pytest.mark.parametrize(("character", "code"), SOME_CODES.items())
def test_the_alphabet_is_that_of_the_standard(character: str, code: int) -> None:
    assert encode_gsm7(character) == bytes((code,))
    assert decode_gsm7(bytes((code,))) == character


@pytest.mark.parametrize(("character", "code"), EXTENSION.items())
def test_the_extension_table_is_that_of_the_standard(character: str, code: int) -> None:
    assert encode_gsm7(character) == bytes((0x1B, code))
    assert decode_gsm7(bytes((0x1B, code))) == character


def test_what_the_alphabet_lacks_is_not_encoded() -> None:
    for character in ("ç", "á", "`", "\x1b", "\t", "“", EMOJI, "я"):
        with pytest.raises(ValueError, match="alphabet"):
            encode_gsm7(character)


@pytest.mark.parametrize(
    ("text", "encoding", "count"),
    [
        ("", Encoding.GSM7, 1),
        ("a" * 160, Encoding.GSM7, 1),
        ("a" * 161, Encoding.GSM7, 2),
        ("a" * 306, Encoding.GSM7, 2),
        ("a" * 307, Encoding.GSM7, 3),
        ("a" * 918, Encoding.GSM7, 6),
        ("€" * 80, Encoding.GSM7, 1),
        ("€" * 81, Encoding.GSM7, 2),
        ("€" * 152, Encoding.GSM7, 2),  # 76 in each: half a character is left over
        ("€" * 153, Encoding.GSM7, 3),
        ("я" * 70, Encoding.UCS2, 1),
        ("я" * 71, Encoding.UCS2, 2),
        ("я" * 134, Encoding.UCS2, 2),
        ("я" * 135, Encoding.UCS2, 3),
        ("я" * 402, Encoding.UCS2, 6),
        (EMOJI * 35, Encoding.UCS2, 1),
        (EMOJI * 36, Encoding.UCS2, 2),
        (EMOJI * 66, Encoding.UCS2, 2),  # 33 in each
        (EMOJI * 67, Encoding.UCS2, 3),
        ("a" * 69 + EMOJI, Encoding.UCS2, 2),  # 71 code units
    ],
)
def test_segments_are_counted_as_telephones_count_them(text: str, encoding: Encoding, count: int) -> None:
    found = segments(text)
    assert (found.encoding, len(found.parts)) == (encoding, count)


@pytest.mark.parametrize("text", ["a" * 919, "я" * 403, "€" * 457, "x" * 1_000_000])
def test_a_text_of_more_segments_than_allowed_is_rejected(text: str) -> None:
    with pytest.raises(ProviderRejectedError) as caught:
        segments(text)
    assert caught.value.code == "too_long"
    assert text not in str(caught.value)


def test_how_many_segments_are_allowed_can_be_chosen() -> None:
    assert len(segments("a" * 919, most=7).parts) == 7
    with pytest.raises(ProviderRejectedError):
        segments("a" * 161, most=1)


@pytest.mark.parametrize(
    ("text", "most", "sent", "count"),
    [
        ("a" * 918, 6, "a" * 918, 6),
        ("a" * 919, 6, "a" * 915 + "...", 6),
        ("№" * 396, 6, "No." * 305 + "...", 6),  # as templates cut it, and three times as long in the alphabet
        ("…" * 396, 6, "..." * 306, 6),
        ("€" * 457, 6, "€" * 455 + "...", 6),  # 76 in each; 75 and the dots in the last
        ("я" * 403, 6, "я" * 399 + "...", 6),
        (EMOJI * 200, 6, EMOJI * (5 * 33 + 32) + "...", 6),
        ("a" * 160, 1, "a" * 160, 1),
        ("a" * 161, 1, "a" * 157 + "...", 1),
        ("a" * 156 + "     b", 1, "a" * 156 + "...", 1),
        ("x" * 1_000_000, 2, "x" * 303 + "...", 2),
    ],
)
def test_a_text_that_is_too_long_is_cut_in_the_characters_that_are_sent(text: str, most: int, sent: str, count: int) -> None:
    found = fitted(text, most=most)
    assert (found.text, len(found.parts)) == (sent, count)


@given(st.text("aé…№€ я\n" + EMOJI, max_size=500), st.integers(1, 6), st.sampled_from(Transliterate))
def test_whatever_is_cut_fits_and_what_fits_is_not_cut(text: str, most: int, kind: Transliterate) -> None:
    found = fitted(text, transliterate=kind, most=most)
    assert len(found.parts) <= most
    assert all(found.used(part) <= found.room for part in found.parts)
    try:
        assert found == segments(text, transliterate=kind, most=most)
    except ProviderRejectedError:
        assert found.text.endswith("...")


@pytest.mark.parametrize(
    ("text", "kind", "sent"),
    [
        ("“Łukasz’s” order – 5…", Transliterate.ALL, '"Lukasz\'s" order - 5...'),
        ("“Ann’s” order – 5…", Transliterate.PUNCTUATION, '"Ann\'s" order - 5...'),
        ("12\N{NO-BREAK SPACE}€\N{ZERO WIDTH SPACE}", Transliterate.PUNCTUATION, "12 €"),
        ("Paiement reçu à Orléans", Transliterate.ALL, "Paiement recu à Orléans"),
        ("Envío número 5: ¡llegó!", Transliterate.ALL, "Envio numero 5: ¡llego!"),
        ("Őrült Űrhajó", Transliterate.ALL, "Örült Ürhajo"),
        ("Straße, Grüße, ÄÖÜ", Transliterate.NONE, "Straße, Grüße, ÄÖÜ"),
        ("Cafe\N{COMBINING ACUTE ACCENT}", Transliterate.NONE, "Café"),
        ("a\r\nb\rc\td\x00\x1be\N{NEXT LINE}", Transliterate.NONE, "a\nb\nc de"),
    ],
)
def test_what_is_nearly_gsm_becomes_gsm(text: str, kind: Transliterate, sent: str) -> None:
    found = segments(text, transliterate=kind)
    assert (found.encoding, found.text) == (Encoding.GSM7, sent)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("“Łukasz” zażółć 日本", Transliterate.ALL),  # not enough: nothing is replaced
        ("“Łukasz”", Transliterate.PUNCTUATION),
        ("“Ann”", Transliterate.NONE),
        (f"fine {EMOJI} – “yes”", Transliterate.ALL),
    ],
)
def test_where_transliteration_is_not_enough_the_text_stays_as_it_was(text: str, kind: Transliterate) -> None:
    found = segments(text, transliterate=kind)
    assert (found.encoding, found.text) == (Encoding.UCS2, text)


texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cc", "Cs"]),
        st.sampled_from("abc €[]^~|{}\\\nçőŁ–“”ä" + EMOJI + "я"),
    ),
    max_size=700,
)


@given(text=texts, kind=st.sampled_from(Transliterate))
@example(text="a" * 152 + "€" + "b" * 10, kind=Transliterate.NONE)
@example(text="я" * 66 + EMOJI + "b" * 10, kind=Transliterate.NONE)
def test_segments_lose_nothing_break_no_character_and_are_as_few_as_can_be(text: str, kind: Transliterate) -> None:
    found = segments(text, transliterate=kind, most=99)
    alone, joined = ROOM[found.encoding]
    room = alone if len(found.parts) == 1 else joined
    assert found.room == room
    if found.encoding is Encoding.GSM7:
        coded = [encode_gsm7(part) for part in found.parts]
        assert all(len(part) <= room for part in coded)
        assert [found.used(part) for part in found.parts] == [len(part) for part in coded]
        assert b"".join(coded) == encode_gsm7(found.text)
        assert not any(part.endswith(b"\x1b") for part in coded)
        assert "".join(map(decode_gsm7, coded)) == found.text
    else:
        assert found.text == unicodedata.normalize("NFC", text)
        wide = [part.encode("utf-16-be") for part in found.parts]
        assert all(len(part) <= room * 2 for part in wide)
        assert [found.used(part) * 2 for part in found.parts] == [len(part) for part in wide]
        assert "".join(part.decode("utf-16-be") for part in wide) == found.text, "each part is whole by itself"
    # as few: no part's first character would have had room in the one before
    for before, after in zip(found.parts, found.parts[1:], strict=False):
        assert found.used(before) + found.used(after[0]) > room


@given(text=st.text(max_size=200))
def test_any_text_can_be_carried(text: str) -> None:
    found = segments(text, most=99)
    assert all(part.encode("utf-16-be") is not None for part in found.parts)
    assert not set(found.text) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160)]))


@given(text=texts)
def test_transliteration_never_takes_more_segments(text: str) -> None:
    assert len(segments(text, most=99).parts) <= len(segments(text, transliterate=Transliterate.NONE, most=99).parts)


def test_the_text_is_not_in_a_representation() -> None:
    assert "planted" not in repr(segments("planted"))
    assert "151" not in repr(parse_number("+4915123456789"))


@pytest.mark.parametrize(
    ("text", "e164", "country"),
    [
        ("+4915123456789", "+4915123456789", "DE"),
        ("+49 (0)151 234 567-89", "+4915123456789", "DE"),
        ("+12025550143", "+12025550143", "US"),
        ("+447400123456", "+447400123456", "GB"),
        ("+447911123456", "+447911123456", "GG"),
        ("+33 6 12 34 56 78", "+33612345678", "FR"),
        ("+4366412345678", "+4366412345678", "AT"),
        ("+4915123000001", "+4915123000001", "DE"),  # a magic recipient of the simulators
    ],
)
def test_a_number_is_brought_to_e164_with_its_country(text: str, e164: str, country: str) -> None:
    number = parse_number(text)
    assert (number.e164, number.country, route_of(text)) == (e164, country, country)


@pytest.mark.parametrize(
    "text", ["", "planted", "015123456789", "+49", "+4915", "+1202555014", "+999123456789", "+12025550143x55", "+" + "1" * 300]
)
def test_what_is_no_number_is_rejected_without_quoting_it(text: str) -> None:
    with pytest.raises(ProviderRejectedError) as caught:
        parse_number(text)
    assert caught.value.code == "address"
    assert not text or text not in str(caught.value)
    assert caught.value.__cause__ is None
    assert route_of(text) is None


def test_a_country_that_the_provider_does_not_carry_is_rejected() -> None:
    assert carried("+4915123456789", None).country == carried("+4915123456789", frozenset({"DE"})).country == "DE"
    with pytest.raises(ProviderRejectedError) as caught:
        carried("+4915123456789", frozenset({"AT", "CH"}))
    assert caught.value.code == "country_not_allowed"


def test_six_segments_are_the_default() -> None:
    assert MAX_SEGMENTS == 6
