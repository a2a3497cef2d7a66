"""What every SMS provider needs to know of a text and of a number: how many segments one is, and where the other is.

A segment carries 140 bytes: 160 characters of the GSM 7-bit alphabet, or 70 of UCS-2 as soon as one character is not in that
alphabet. Of a longer text each segment loses six bytes to the header that joins it with the others: 153 and 67 are left.
Sources: 3GPP TS 23.038 (alphabets) and 23.040 section 9.2.3.24 (joined messages); ITU-T E.164 (numbers).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from schemas.errors import ProviderRejectedError

if TYPE_CHECKING:
    from schemas.messages import Delivery

MAX_SEGMENTS: Final = 6

# by code point, from 0 to 127 (3GPP TS 23.038 section 6.2.1); 0x1B is the escape to the extension table, and no character
_ALPHABET: Final = (
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞ\x1bÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
# section 6.2.1.1; each takes two characters' room
_EXTENSION: Final = {"\f": 0x0A, "^": 0x14, "{": 0x28, "}": 0x29, "\\": 0x2F, "[": 0x3C, "~": 0x3D, "]": 0x3E, "|": 0x40, "€": 0x65}
_ESCAPE: Final = 0x1B

# what is sent for what the alphabet lacks. Punctuation: nobody misses it
_PUNCTUATION: Final = {
    "'": "\u2018\u2019\u201a\u201b\u2032\u02bc\u02b9`\u00b4\u2039\u203a",
    '"': "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043",
    " ": "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000",
    "": "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff",
    "\n": "\u2028\u2029",
    "...": "\u2026",
    "*": "\u2022\u25cf",
    ".": "\u00b7",
    "x": "\u00d7",
    "/": "\u2044\u00f7",
    "<": "\u2329",
    ">": "\u232a",
    "->": "\u2192",
    "(c)": "\u00a9",
    "(R)": "\u00ae",
    "TM": "\u2122",
    "No.": "\u2116",
    "1/2": "\u00bd",
    "1/4": "\u00bc",
    "3/4": "\u00be",
}
# letters without the accents that the alphabet lacks: readable, but a name is no longer spelt as its bearer spells it
_LETTERS: Final = {
    "A": "ÀÁÂÃĀĂĄǍ",
    "a": "áâãāăąǎª",
    "C": "ĆĈĊČ",
    "c": "çćĉċč",
    "D": "ĎĐÐ",
    "d": "ďđð",
    "E": "ÈÊËĒĔĖĘĚ",
    "e": "êëēĕėęě",
    "G": "ĜĞĠĢ",
    "g": "ĝğġģ",
    "H": "ĤĦ",
    "h": "ĥħ",
    "I": "ÌÍÎÏĨĪĬĮİǏ",
    "i": "íîïĩīĭįıǐ",
    "J": "Ĵ",
    "j": "ĵ",
    "K": "Ķ",
    "k": "ķ",
    "L": "ĹĻĽĿŁ",
    "l": "ĺļľŀł",
    "N": "ŃŅŇ",
    "n": "ńņň",
    "O": "ÒÓÔÕŌŎǑ",
    "o": "óôõōŏǒº",
    "Ö": "Ő",
    "ö": "ő",
    "R": "ŔŖŘ",
    "r": "ŕŗř",
    "S": "ŚŜŞŠȘ",
    "s": "śŝşšș",
    "T": "ŢŤŦȚ",
    "t": "ţťŧț",
    "U": "ÙÚÛŨŪŬŮŲǓ",
    "u": "úûũūŭůųǔ",
    "Ü": "Ű",
    "ü": "ű",
    "W": "Ŵ",
    "w": "ŵ",
    "Y": "ÝŶŸ",
    "y": "ýŷÿ",
    "Z": "ŹŻŽ",
    "z": "źżž",
    "OE": "Œ",
    "oe": "œ",
    "Th": "Þ",
    "th": "þ",
    "ß": "ẞ",
    "IJ": "Ĳ",
    "ij": "ĳ",
}


class Encoding(StrEnum):
    """How a text is carried."""

    GSM7 = "GSM-7"
    UCS2 = "UCS-2"


class Transliterate(StrEnum):
    """What may be replaced so that a text fits the GSM alphabet. Where that is not enough, nothing is replaced."""

    NONE = "none"
    PUNCTUATION = "punctuation"  # quotes, dashes, spaces, dots: nobody misses them
    ALL = "all"  # and letters lose the accents that the alphabet lacks: Łukasz is Lukasz


# encoding -> characters of a segment that stands alone, and of one that is joined with others
ROOM: Final = {Encoding.GSM7: (160, 153), Encoding.UCS2: (70, 67)}


def _table(*groups: dict[str, str]) -> dict[int, str]:
    return {ord(character): replacement for group in groups for replacement, characters in group.items() for character in characters}


_REPLACED: Final = {
    Transliterate.NONE: {},
    Transliterate.PUNCTUATION: _table(_PUNCTUATION),
    Transliterate.ALL: _table(_PUNCTUATION, _LETTERS),
}
_GSM: Final = frozenset(_ALPHABET.replace("\x1b", "")) | frozenset(_EXTENSION)
_SEPTETS: Final = {
    **{ord(character): chr(code) for code, character in enumerate(_ALPHABET) if code != _ESCAPE},
    **{ord(character): chr(_ESCAPE) + chr(code) for character, code in _EXTENSION.items()},
}
_CHARACTERS: Final = dict(enumerate(_ALPHABET))
_EXTENDED: Final = {code: character for character, code in _EXTENSION.items()}
_DOTS: Final = "..."  # the ellipsis is not in the alphabet
# no telephone shows them; an escape would change the character after it
_CONTROLS: Final = {**dict.fromkeys([*range(32), *range(127, 160)], ""), 9: " ", 10: "\n", 11: "\n", 12: "\n"}
_UNUSUAL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_TWICE_IN_GSM: Final = re.compile(f"[{re.escape(''.join(_EXTENSION))}]")
_TWICE_IN_UCS2: Final = re.compile("[\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmented:
    """A text as it is sent. `parts`: of each segment; together they are the text, after what was replaced in it."""

    encoding: Encoding
    parts: tuple[str, ...] = field(repr=False)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)

    @property
    def room(self) -> int:
        """How many characters a segment has room for; those of the extension table and those beyond the BMP take two."""
        alone, joined = ROOM[self.encoding]
        return alone if len(self.parts) == 1 else joined

    def used(self, part: str) -> int:
        """Return how much of a segment's room `part` takes."""
        return len(part) + len(_twice(self.encoding).findall(part))


def segments(text: str, *, transliterate: Transliterate = Transliterate.ALL, most: int = MAX_SEGMENTS) -> Segmented:
    r"""Return the segments that `text` needs, at least 1. None ends within a character, be it of two codes.

    160 characters in one GSM-7 segment, 153 each when joined; 70 and 67 in UCS-2. Control characters are left out, line
    ends become \n. Raises ProviderRejectedError with the code `too_long` above `most` segments.
    Source: 3GPP TS 23.038 and 23.040.
    """
    encoding, sent = _written(text, transliterate)
    found = _segmented(encoding, sent, most)
    if found is None:
        raise ProviderRejectedError(f"the text needs more than {most} segments", code="too_long")
    return found


def fitted(text: str, *, transliterate: Transliterate = Transliterate.ALL, most: int = MAX_SEGMENTS) -> Segmented:
    """Return the segments of `text`, or of as much of it as `most` of them hold with three dots at its end.

    What is replaced may be longer than what it replaces, so this is measured in the characters that are sent.
    """
    encoding, sent = _written(text, transliterate)
    found = _segmented(encoding, sent, most)
    if found is not None:
        return found
    room = ROOM[encoding][most > 1]
    sent = sent[: most * room]
    twice = frozenset(_twice(encoding).findall(sent))
    *parts, last = _split(sent, twice, room)[:most]
    return Segmented(encoding=encoding, parts=(*parts, _split(last, twice, room - len(_DOTS))[0].rstrip() + _DOTS))


def _segmented(encoding: Encoding, sent: str, most: int) -> Segmented | None:
    """Return the segments of what is sent; None where they are more than `most`."""
    alone, joined = ROOM[encoding]
    twice = _twice(encoding)
    length = len(sent) + len(twice.findall(sent))
    if length <= alone:
        return Segmented(encoding=encoding, parts=(sent,))
    parts = _split(sent, frozenset(twice.findall(sent)), joined) if length <= most * joined else []
    return Segmented(encoding=encoding, parts=tuple(parts)) if 0 < len(parts) <= most else None


def _written(text: str, transliterate: Transliterate) -> tuple[Encoding, str]:
    """Return how a text is carried, and it in the characters that are sent."""
    plain = _normalised(text)
    replaced = plain if _GSM.issuperset(plain) else plain.translate(_REPLACED[transliterate])
    return (Encoding.GSM7, replaced) if _GSM.issuperset(replaced) else (Encoding.UCS2, plain)


def encode_gsm7(text: str) -> bytes:
    """Return `text` in the GSM 7-bit alphabet, one septet a byte. Raises ValueError for what is not in it."""
    if not _GSM.issuperset(text):
        raise ValueError("holds characters that are not in the GSM alphabet")
    return text.translate(_SEPTETS).encode("ascii")


def decode_gsm7(septets: bytes) -> str:
    """Return the text of septets, one a byte. What the extension table does not know is what the alphabet has there."""
    characters: list[str] = []
    is_escaped = False
    for code in septets:
        if code == _ESCAPE and not is_escaped:
            is_escaped = True
            continue
        characters.append((_EXTENDED.get(code) if is_escaped else None) or _CHARACTERS.get(code, "\N{REPLACEMENT CHARACTER}"))
        is_escaped = False
    return "".join(characters)


@dataclass(frozen=True, slots=True)
class Number:
    """A valid telephone number. `country`: its ISO 3166 code, or 001 for a number of no country."""

    e164: str = field(repr=False)
    country: str


def parse_number(text: str) -> Number:
    """Return the number in `text`, which begins with + and may have blanks, hyphens and brackets.

    Raises ProviderRejectedError with the code `address` for what is not a number that can exist in its country's plan.
    """
    import phonenumbers  # here: most of what imports this module asks for no number

    try:
        parsed = phonenumbers.parse(text)
    except phonenumbers.NumberParseException:
        raise ProviderRejectedError("the address is not a telephone number", code="address") from None
    country = phonenumbers.region_code_for_number(parsed) if parsed.extension is None and phonenumbers.is_valid_number(parsed) else None
    if country is None:
        raise ProviderRejectedError("the address is not a valid telephone number", code="address")
    return Number(phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164), country)


def route_of(text: str) -> str | None:
    """Return the country of a number, which decides who can carry it; None when it is no valid number."""
    try:
        return parse_number(text).country
    except ProviderRejectedError:
        return None


def carried(text: str, routes: frozenset[str] | None) -> Number:
    """Return the number in `text`, if its country is one of `routes`.

    Raises ProviderRejectedError with the code `address`, or `country_not_allowed`. Whoever chooses the provider knows the
    routes too: this is for the case that it is wrong, since a message to an unexpected country can cost a lot.
    """
    number = parse_number(text)
    if routes is not None and number.country not in routes:
        raise ProviderRejectedError("the provider does not carry this country", code="country_not_allowed")
    return number


def mark(delivery: Delivery, bits: int) -> int:
    """Return a number of `bits` bits that is the same for each attempt of a redrive generation, to tell messages apart."""
    digest = blake2b(f"{delivery.delivery_id}.{delivery.generation}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & ((1 << bits) - 1)


def _normalised(text: str) -> str:
    # composed: e and its accent apart are one letter of the alphabet
    plain = unicodedata.normalize("NFC", text)
    if not _UNUSUAL.search(plain):
        return plain
    whole = plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)


def _twice(encoding: Encoding) -> re.Pattern[str]:
    return _TWICE_IN_GSM if encoding is Encoding.GSM7 else _TWICE_IN_UCS2


def _split(text: str, twice: frozenset[str], room: int) -> list[str]:
    parts: list[str] = []
    start = used = 0
    for at, character in enumerate(text):
        width = 2 if character in twice else 1
        if used + width > room:
            parts.append(text[start:at])
            start, used = at, 0
        used += width
    parts.append(text[start:])
    return parts
