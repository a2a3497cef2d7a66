"""Templates to content: read and compiled once, sandboxed, strict about what is missing.

`<template>/<channel>.<part>.j2` is one part, such as `payment_failed/email.subject.j2`; folders whose names begin with an
underscore hold what templates extend. Only parts named html are escaped. Pushes and text messages are cut to what telephones
take: the whole stands in the app. Data are data: they are never compiled, control characters and characters that reorder
text (Unicode UAX 9: U+202A to E, U+2066 to 9) are taken out of them, and they cannot replace what a template or the
deployment sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schemas.errors import TemplateError

FOLDER = Path(__file__).parent
MAX_PART_BYTES = 100 * 1024
MAX_LINE_CHARACTERS = 250  # of a subject or title: RFC 5322 allows 998 bytes a line

# parts that are one line: mail headers, and headings in the app and of a push
_LINES = frozenset({"subject", "title"})


@dataclass(frozen=True, slots=True)
class _Cut:
    """How long a part may be: `size` bytes in `encoding`, which has at most 4 a character. What is longer ends in `end`."""

    size: int
    encoding: str
    end: str


_LINE = _Cut(4 * MAX_LINE_CHARACTERS, "utf-32-le", "…")
# A push has 4,096 bytes in all (FCM, APNs; Web Push has 3,993 before it is encrypted, RFC 8291), JSON's escapes and what
# the channel adds included: were each character here a quotation mark, title and message would take 3,200 of them. A text
# message is at most six segments: of 67 units of 2 bytes in UCS-2, of which one is lost where a pair of surrogates would be
# split. What is all GSM-7 takes less, and so the dots are three: the ellipsis is not GSM-7.
_CUTS: Mapping[tuple[str, str], _Cut] = {
    ("push", "title"): _Cut(100, "utf-8", "…"),
    ("push", "message"): _Cut(1_500, "utf-8", "…"),
    ("sms", "text"): _Cut(6 * 66 * 2, "utf-16-le", "..."),
}

_LINE_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_UNWANTED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SPACE = re.compile(r"\s+")

_SYMBOLS = {"USD": "$", "GBP": "£", "EUR": "€", "JPY": "¥"}
_PLAIN_NUMBER = re.compile(r"([0-9]{1,20})(\.[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Where mails may lead. What is None is not linked: a dead link is worse than none."""

    orders_url: str | None = None  # an order's id is appended as a path segment
    preferences_url: str | None = None
    help_url: str | None = None


def money(amount: str, currency: str) -> str:
    """Return an amount for people: "$1,249.00", or "1,249.00 CHF" where the sign would be ambiguous or unknown."""
    number = _PLAIN_NUMBER.fullmatch(amount)
    grouped = f"{int(number[1]):,}{number[2] or ''}" if number else amount
    symbol = _SYMBOLS.get(currency)
    return f"{symbol}{grouped}" if symbol else f"{grouped} {currency}"


def sentence(text: str) -> str:
    """Return `text` beginning with a capital and ending with a full stop, as a sentence in a paragraph."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}" if text else text


def paragraphs(text: str) -> list[list[str]]:
    """Return the paragraphs of `text`, each as its lines. An empty line separates two."""
    return [paragraph.split("\n") for paragraph in re.split(r"\n[ \n]*\n", text.strip())]


def filled(details: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those pairs of label and value whose value is not empty."""
    return [(label, value) for label, value in details if value]


# what a template may use although not every request has it
_OPTIONAL = {"name": ""}

_FILTERS: dict[str, Callable[..., object]] = {"money": money, "sentence": sentence, "paragraphs": paragraphs, "filled": filled}


def cleaned(value: str) -> str:
    """Return `value` without control and reordering characters. Line breaks become line feeds, tabs spaces."""
    if value.isprintable():
        return value
    return _UNWANTED.sub("", _LINE_BREAK.sub("\n", value).replace("\t", " "))


class Templates:
    """Every template under `folder`, compiled. Raises TemplateError when one cannot be."""

    def __init__(self, folder: Path = FOLDER, *, links: Links | None = None) -> None:
        sources = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.glob("*/*.j2"))}
        environment = ImmutableSandboxedEnvironment(
            # from memory: a file that changes under a running worker would change a pinned version
            loader=jinja2.DictLoader(sources),
            undefined=jinja2.StrictUndefined,
            autoescape=lambda name: name is not None and name.endswith(".html.j2"),
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
            cache_size=-1,
        )
        environment.globals.clear()
        environment.filters.update(_FILTERS)
        self._fixed: dict[str, Any] = asdict(links or Links())
        self._parts: dict[tuple[str, str], list[tuple[str, jinja2.Template]]] = {}
        for name in sources:
            template, file = name.split("/")
            try:
                compiled = environment.get_template(name)
                if not template.startswith("_"):
                    channel, part = file.removesuffix(".j2").split(".")
                    self._parts.setdefault((template, channel), []).append((part, compiled))
            except (jinja2.TemplateError, ValueError) as error:
                raise TemplateError(f"{name}: {error}") from error
        self._versions = {template: _version(template, sources) for template, _ in self._parts}

    def version(self, template: str) -> str:
        """Return 12 hexadecimal digits that change whenever `template`, or a layout, does. Raises TemplateError."""
        try:
            return self._versions[template]
        except KeyError:
            raise TemplateError(f"{template}: there is no such template") from None

    def render(self, template: str, channel: str, data: Mapping[str, str]) -> dict[str, str]:
        """Return the parts of `template` for `channel`, such as title and message, filled with `data`.

        Subjects and titles are one line. `data` may hold the recipient's `name`, which mails greet him by. A push and a
        text message are cut, with an ellipsis, to what telephones take.
        Raises TemplateError, which names template and part, when a placeholder is not
        in `data` (it names that too), or when a part is larger than 100 KiB.
        """
        parts = self._parts.get((template, channel))
        if parts is None:
            raise TemplateError(f"{template}: there is no template for channel {channel}")
        # what is fixed comes last: data that brings a help_url must not lead readers astray
        values = _OPTIONAL | {name: cleaned(value) for name, value in data.items()} | self._fixed
        return {part: _rendered(template, channel, part, compiled, values) for part, compiled in parts}


def _rendered(template: str, channel: str, part: str, compiled: jinja2.Template, values: dict[str, Any]) -> str:
    try:
        # what Template.render does, less its copy of the data and its rewriting of tracebacks
        text = "".join(compiled.root_render_func(compiled.new_context(values, shared=True)))
    except jinja2.TemplateError as error:
        raise TemplateError(f"{template}/{channel}.{part}: {error.message}") from error
    if part in _LINES:
        text = _SPACE.sub(" ", text)
    cut = _CUTS.get((channel, part)) or (_LINE if part in _LINES else None)
    if cut is not None:
        return _shortened(text.strip(), cut)
    # no character has more than 4 bytes
    if len(text) > MAX_PART_BYTES // 4 and len(text.encode()) > MAX_PART_BYTES:
        raise TemplateError(f"{template}/{channel}.{part}: is larger than {MAX_PART_BYTES} bytes")
    return text


def _shortened(text: str, cut: _Cut) -> str:
    if 4 * len(text) <= cut.size:
        return text
    raw = text.encode(cut.encoding)
    if len(raw) <= cut.size:
        return text
    kept = raw[: cut.size - len(cut.end.encode(cut.encoding))]
    return kept.decode(cut.encoding, "ignore").rstrip() + cut.end  # half a character at the end is ignored


def _version(template: str, sources: Mapping[str, str]) -> str:
    digest = sha256()
    for name, source in sources.items():
        if name.startswith((f"{template}/", "_")):
            digest.update(f"{name}\0{source}\0".encode())
    return digest.hexdigest()[:12]
