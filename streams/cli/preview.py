"""`notify preview`: what a rule's recipients read on each channel, from the schemas' samples and without a running system."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule as Line
from rich.text import Text

from agents.ports import KnownSource
from agents.stock import LEVELS, PRODUCTS, SEEN, Stock
from agents.triggers import RULES, Rule, ingest_action, ingest_inventory, ingest_payment
from schemas import topics
from schemas.codec import Codec
from schemas.errors import UnroutableError
from schemas.examples import samples
from schemas.messages import Broadcast, NotificationRequested, StockLevel, UserAction
from schemas.topics import Channel
from streams.cli import console
from streams.cli.errors import CliError
from streams.cli.send import known_rule, parse_pairs

EPILOG = console.examples(
    "notify preview payment_failed",
    "notify preview password_reset --channel sms --data 'code=12 34 56'",
    "notify preview message --channel push --data 'title=Your parcel is here' --data 'message=Collect it by Friday.'",
    "notify preview payment_confirmed --data name=Ada --html > mail.html",
)
WIDTH_COLUMNS = 100
_OF_EVERY_RULE = "name"
# what no sample leads to
_SAID = {"message": {"title": "Your parcel has arrived", "message": "Collect it by Friday.\nBring a photo ID.\n\nYour code is 4471."}}
_BLOCKS = frozenset({"p", "tr", "h1", "h2", "h3", "li", "div", "table", "title"})
_VOID = frozenset({"meta", "br", "img", "hr", "link"})


def preview(
    rule: Annotated[str, typer.Argument(metavar="RULE", help=f"The rule: {', '.join(RULES)}.")],
    *,
    channel: Annotated[list[Channel] | None, typer.Option(help="Only this channel; repeatable.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="In place of what the samples say; name is the recipient's; repeatable.")
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Print the e-mail's HTML as it is, for a browser.")] = False,
    as_json: console.JsonOption = False,
) -> None:
    """Show what a rule says on each of its channels, filled with what the samples say.

    Needs no running system. The words are those of this version's templates, and of nobody: no recipient is looked up.
    """
    from templates.render import Templates  # Jinja: other commands start without it

    found = known_rule(rule)
    given = parse_pairs(data or [])
    facts = example_data(found.name)
    for name in given.keys() - facts.keys() - {_OF_EVERY_RULE}:
        console.warn(f"{name} is none of what {found.name} is told with: {', '.join((_OF_EVERY_RULE, *facts))}.")
    facts |= given
    wanted = [Channel.EMAIL] if html and not channel else channel or found.channels
    for each in wanted:
        if each not in found.channels:
            raise CliError(f"{found.name} is not told by {each}. Its channels are {', '.join(found.channels)}.")
    templates = Templates()
    rendered = {each: templates.render(found.template, each, facts) for each in dict.fromkeys(wanted)}
    if html:
        if "html" not in rendered[wanted[0]]:
            raise CliError(f"There is no HTML on the channel {wanted[0]}: leave out --html, or ask for email.")
        sys.stdout.write(rendered[wanted[0]]["html"] + "\n")
    elif as_json:
        version = templates.version(found.template)
        channels: dict[str, dict[str, object]] = {str(each): dict(parts) for each, parts in rendered.items()}
        if Channel.SMS in rendered:
            from channels.sms import fitted

            sent = fitted(rendered[Channel.SMS]["text"])
            channels[Channel.SMS] |= {"encoding": sent.encoding, "segments": len(sent.parts)}
        console.print_document(
            {"rule": found.name, "ruleVersion": found.version, "templateVersion": version, "data": facts, "channels": channels}
        )
    else:
        out = console.stdout()
        for each, parts in rendered.items():
            out.print(_frame(found, each, parts, width=min(WIDTH_COLUMNS, out.width)))


def example_data(rule: str) -> dict[str, str]:
    """Return what a request for `rule` says, as the samples lead to it through the agents. Raises CliError when none does."""
    told = _SAID.get(rule) or next((dict(data) for name, data in _told() if name == rule), None)
    if told is None:
        raise CliError(f"No sample leads to {rule}: add one in schemas/samples.")
    return dict(told)


def html_as_text(html: str) -> str:
    """Return what a reader of an HTML page sees, as lines; an address of a link follows its words."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    lines = [" ".join(line.split()) for line in "".join(reader.words).split("\n")]
    return "\n".join(line for line in lines if line)


def _told() -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield rule and data of the request, or broadcast, that each of the samples becomes."""
    source = KnownSource(topic=topics.STOCK, partition=0, offset=0, at=datetime.now(UTC))
    for payment in samples("payments"):
        try:
            outputs = ingest_payment(payment, source, b"").outputs
        except UnroutableError:
            continue  # it names nobody
        yield from ((each.value.rule, each.value.data) for each in outputs if isinstance(each.value, NotificationRequested))
    for sample in samples("actions"):
        moment = datetime.fromisoformat(str(sample["occurredAt"]))
        action = UserAction(action_id="sample", user_id=sample["userId"], action=sample["action"], data=sample["data"], occurred_at=moment)
        outputs = ingest_action(action, source, {}).outputs
        yield from ((each.value.rule, each.value.data) for each in outputs if isinstance(each.value, NotificationRequested))
    yield from _told_of_stock(source)


def _told_of_stock(source: KnownSource) -> Iterator[tuple[str, Mapping[str, str]]]:
    stock = Stock(codec=Codec({}, {}), default_threshold=20, partitions=1, user_partitions=1, seen_seconds=0)
    levels: dict[bytes, bytes] = {}
    for sample in samples("inventory"):
        for adjusted in ingest_inventory(sample, source, b"").outputs:
            assert isinstance(adjusted.value, StockLevel)
            effects = stock.decide_level(adjusted.value, source, {LEVELS: levels, PRODUCTS: {}, SEEN: {}})
            levels.update({row.key: row.value for row in effects.rows if row.value is not None})
            yield from ((each.value.rule, each.value.data) for each in effects.outputs if isinstance(each.value, Broadcast))


def _cost(text: str) -> str:
    """Say what a text message costs, such as GSM-7, 2 segments, 171 of 2 x 153 characters."""
    from channels.sms import fitted

    sent = fitted(text)
    count, used = len(sent.parts), sum(map(sent.used, sent.parts))
    room = str(sent.room) if count == 1 else f"{count} x {sent.room}"
    return f"{sent.encoding}, {count} segment{'' if count == 1 else 's'}, {used} of {room} characters"


def _frame(rule: Rule, channel: Channel, parts: Mapping[str, str], *, width: int) -> Panel:
    shown: list[RenderableType] = []
    heading = parts.get("subject") or parts.get("title")
    if heading is not None:
        shown.append(console.cell(heading, "bold"))
    for part, text in sorted(parts.items(), reverse=True):  # the text before the HTML
        if part in {"subject", "title"}:
            continue
        if shown:
            shown.append(Line(f"{part}, as a reader sees it" if part == "html" else part, style="dim", align="left"))
        words = html_as_text(text) if part == "html" else text.strip()
        shown.append(Text("\n").join(console.cell(line) for line in words.split("\n")))
    if channel is Channel.SMS:
        shown += [Text(), Text(_cost(parts["text"]), style="dim")]
    title = Text.assemble(" ", (channel, "bold cyan"), " ")
    is_default = channel in rule.defaults
    return Panel(
        Group(*shown),
        title=title,
        title_align="left",
        subtitle=Text(" on by default " if is_default else " off until the user switches it on ", style="dim"),
        subtitle_align="right",
        border_style="cyan",
        padding=(0, 1),
        width=width,
    )


class _Reader(HTMLParser):
    """Collects what is seen of a page: not its style, nor what is hidden from the eye."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._open: list[tuple[str, bool, str | None]] = []  # tag, whether it is hidden, the address it leads to

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a line where a browser would."""
        facts = {name: value or "" for name, value in attrs}
        if tag in _BLOCKS or tag == "br":
            self.words.append("\n")
        elif tag in {"td", "th"}:
            self.words.append(" ")
        if tag not in _VOID:
            is_hidden = tag in {"style", "head", "script"} or "display:none" in facts.get("style", "").replace(" ", "")
            self._open.append((tag, is_hidden, facts.get("href") if tag == "a" else None))

    def handle_endtag(self, tag: str) -> None:
        """End the line, or say where a link leads."""
        while tag in {each for each, _, _ in self._open}:  # what was left open within it ends too
            ended, _, address = self._open.pop()
            if address:
                self.words.append(f" ({address})")
            if ended == tag:
                break
        if tag in _BLOCKS:
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep words; line breaks in the source are spaces."""
        if not any(is_hidden for _, is_hidden, _ in self._open):
            self.words.append(" ".join(data.split("\n")))
