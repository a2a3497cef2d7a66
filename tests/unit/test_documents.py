"""What is written about the system is true of it: generated parts, links, names of tests, settings, metrics and commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import typer

from agents.triggers import RULES
from schemas import topics
from schemas.topics import Channel, Lane, Tier
from streams import documents
from streams.cli import build
from streams.documents import BEGIN, END, PROVIDERS, ROOT, metrics, outdated
from streams.outside import FOLLOWERS, OUTSIDE
from streams.roles import Role
from streams.settings import VARIABLES
from streams.topology import REQUESTS, TO_RECIPIENTS, TO_SUBSCRIBERS, TOPOLOGY, Step, all_topics

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README = (ROOT / "README.md").read_text("utf-8")
# what the how-tos tell the reader to make
TO_BE_MADE = {"channels/sms.py", "templates/payment_cancelled"}


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


# ---- generated


def test_what_is_generated_is_up_to_date() -> None:
    assert outdated() == [], "run `make docs`"


def test_a_change_is_noticed_and_written_and_the_rest_of_the_readme_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    names = {path.name for path in outdated(tmp_path)}
    assert names == {"README.md", "settings.md", "metrics.md", "topics.md"}
    page = documents.pages(tmp_path)[tmp_path / "README.md"]
    assert page.startswith(f"before\n{BEGIN}\n```mermaid\n")
    assert page.endswith(f"```\n{END}\nafter\n")


def test_a_readme_without_a_place_for_the_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="no place for what is generated"):
        outdated(tmp_path)


def test_every_node_of_the_picture_is_declared_and_every_declared_one_connected() -> None:
    picture = documents.flow()
    declared = set(re.findall(r"^  ((?:topic|role|outside)_\w+)[\[(]", picture, re.MULTILINE))
    edges = re.findall(r"^  (\w+) (?:-->|==>|-\.->|<-->\|re-keyed\|) (\w+)$", picture, re.MULTILINE)
    assert declared == {node for edge in edges for node in edge}
    assert len(edges) == len(set(edges))


# ---- metrics and settings


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    named = {found for name in NAMES for found in re.findall(r"\bnotify_[a-z_]+[a-z]\b", text_of(name))}
    samples = {f"{name}_{end}" for name, kind, *_ in metrics() if kind == "histogram" for end in ("bucket", "sum", "count")}
    known = {name for name, *_ in metrics()}
    assert known <= set(re.findall(r"^\| `(notify_\w+)`", text_of("docs/metrics.md"), re.MULTILINE))
    assert named <= known | samples


def test_every_setting_is_documented_and_every_documented_one_exists() -> None:
    assert set(re.findall(r"^\| `(NOTIFY_\w+)`", text_of("docs/settings.md"), re.MULTILINE)) == set(VARIABLES)
    assert {found for name in NAMES for found in re.findall(r"\bNOTIFY_[A-Z_]+[A-Z]\b", text_of(name))} <= set(VARIABLES)


# ---- topics


def test_every_topic_has_a_writer_and_a_reader_or_is_declared_external() -> None:
    for spec in all_topics():
        outside = OUTSIDE.get(spec.name)
        writes = [step for step in TOPOLOGY if spec.name in (*step.writes, *step.changelogs().values())]
        reads = [step for step in TOPOLOGY if spec.name in (*step.reads, *step.changelogs().values())]
        assert writes or (outside and outside.writers), f"nobody writes {spec.name}"
        assert reads or FOLLOWERS.get(spec.name) or (outside and outside.readers), f"nobody reads {spec.name}"


def test_what_the_topology_names_exists_once() -> None:
    specs = [spec.name for spec in all_topics()]
    assert len(specs) == len(set(specs))
    assert {topic for step in TOPOLOGY for topic in (*step.reads, *step.writes)} <= set(specs)
    assert set(OUTSIDE) | set(FOLLOWERS) <= set(specs)
    read = [(step.role, topic) for step in TOPOLOGY for topic in step.reads]
    assert len(read) == len(set(read)), "an input of a role belongs to one step"


def test_every_channel_says_who_carries_it() -> None:
    assert set(PROVIDERS) == set(Channel)


# the modules in which a step's outputs are made; behind a colon the functions, where a module serves several steps
_PAYMENTS = "agents/triggers.py:ingest_payment,requests_of_payment"
_INVENTORY = "agents/triggers.py:ingest_inventory"
MODULES: Mapping[str, tuple[str, ...]] = {
    "payments": (_PAYMENTS, "streams/app.py"),
    "inventory": (_INVENTORY,),
    "actions": ("agents/triggers.py:ingest_action",),
    "parked": (_PAYMENTS, _INVENTORY),
    "level": ("agents/stock.py",),
    "decide": ("agents/router.py",),
    "send": ("streams/sending.py", "agents/sender.py"),
    "hold": ("agents/delay.py",),
    "engage": ("agents/signals.py",),
    "forward": ("agents/forward.py",),
    "match": ("agents/receipts.py",),
    "project": ("agents/inbox.py",),
    "keep": ("streams/storing.py",),
}


def outputs_of(place: str) -> Iterator[str]:
    """Yield the source of the topic of each `Output(...)` in a module, or in some of its functions."""
    module, _, functions = place.partition(":")
    tree = ast.parse(text_of(module))
    wanted = set(functions.split(","))
    roots = [tree] if not functions else [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    for node in (node for root in roots for node in ast.walk(root)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Output":
            yield ast.unparse(node.args[0])


def topics_named(expression: str, step: Step) -> set[str]:
    """Return the topics that an expression may name."""
    if expression == "source.topic":
        return set(step.reads)
    if found := re.fullmatch(r"topics\.([A-Z_]+)", expression):
        return {getattr(topics, found[1])}
    if expression.startswith("topics.deliver(") and step.role in {Role.ROUTER, Role.SIGNALS}:
        # subscribers are told by one step alone: no rule names their channel
        assert not any(Channel.WEBHOOK in rule.channels for rule in RULES.values())
        return set(TO_SUBSCRIBERS if "Channel.WEBHOOK" in expression else TO_RECIPIENTS)
    if found := re.fullmatch(r"topics\.(requests|deliver)\(.*\)", expression):
        return {spec.name for spec in all_topics() if spec.name.startswith(f"{found[1]}.")}
    if expression.startswith("topics.retry("):
        # a sender's retries stay in its lane; what is delayed comes from any
        lanes = [step.role.lane] if step.role.lane is not None else list(Lane)
        return {topics.retry(lane, tier) for lane in lanes for tier in Tier}
    raise AssertionError(f"an output to {expression}: teach this test what that is")


@pytest.mark.parametrize("step", TOPOLOGY, ids=lambda step: f"{step.role}.{step.name}")
def test_a_step_publishes_only_to_its_writes(step: Step) -> None:
    named = {topic for module in MODULES[step.name] for expression in outputs_of(module) for topic in topics_named(expression, step)}
    assert named <= set(step.writes)


def test_every_agent_that_publishes_belongs_to_a_step() -> None:
    listed = {place.partition(":")[0] for places in MODULES.values() for place in places}
    making = {str(path.relative_to(ROOT)) for folder in ("agents", "streams") for path in (ROOT / folder).rglob("*.py")}
    assert {module for module in making if list(outputs_of(module))} <= listed


def test_every_rule_finds_its_lane_among_the_requests() -> None:
    from agents.triggers import RULES

    assert {topics.requests(rule.lane) for rule in RULES.values()} <= set(REQUESTS)


# ---- links and names


def headings(name: str) -> set[str]:
    """Return the anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(name), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_resolves(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        if anchor:
            assert anchor in headings(str(found.relative_to(ROOT))), target


def test_the_readme_leads_to_every_document() -> None:
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", README))
    assert {name for name in NAMES if name not in {"README.md", "docs/performance.md"}} <= linked
    rows = re.findall(r"^\| \[(docs/[\w/.-]+\.md)\]", README, re.MULTILINE)
    assert len(rows) == len(set(rows)), "a document has two lines"


@cache
def names_in(module: str) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(text_of(module)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_test_that_is_named_exists(name: str) -> None:
    for module, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text_of(name)):
        assert (ROOT / module).exists(), module
        assert test in names_in(module), f"{module}::{test}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name: str) -> None:
    named = re.findall(r"`((?:agents|channels|schemas|streams|templates|tests|docs)/[\w/.-]+)`", text_of(name))
    assert [path for path in named if path not in TO_BE_MADE and not (ROOT / path).exists()] == []


# ---- commands

ALL_COMMANDS = build()


def command_names(group: typer.Typer = ALL_COMMANDS, prefix: str = "") -> Iterator[str]:
    for command in group.registered_commands:
        yield f"{prefix}{command.name}"
    for inner in group.registered_groups:
        yield f"{prefix}{inner.name}"
        assert inner.typer_instance is not None
        yield from command_names(inner.typer_instance, f"{prefix}{inner.name} ")


def test_every_command_that_is_named_exists() -> None:
    known = set(command_names())
    groups = {name.split()[0] for name in known if " " in name}
    for name in NAMES:
        # in code, at the start of it, of a line of it, or where a shell begins a command
        code = re.findall(r"```(?:sh|text)\n(.*?)```|`([^`\n]+)`", text_of(name), re.DOTALL)
        for part in (block or span for block, span in code):
            for first, second in re.findall(r"(?:^|\$\(|\| )notify ([a-z]+)(?: ([a-z]+))?", part, re.MULTILINE):
                is_known = f"{first} {second}" in known if first in groups and second else first in known
                assert is_known, f"{name}: notify {first} {second}"


def test_the_readme_has_a_line_for_every_command() -> None:
    lines = re.findall(r"^\| `notify ([a-z ]+)` \|", README, re.MULTILINE)
    table = set(lines)
    assert len(lines) == len(table), "a command has two lines"
    groups = {name.split()[0] for name in command_names() if " " in name}
    # `notify recall` is a command and a group
    both = {
        inner.name
        for inner in ALL_COMMANDS.registered_groups
        if inner.typer_instance and inner.typer_instance.info.invoke_without_command is True
    }
    assert table == set(command_names()) - groups | both


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_that_is_named_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    code = re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", text_of(name), re.DOTALL)
    named = {target for block, span in code for target in re.findall(r"^make ([a-z-]+)", block or span, re.MULTILINE)}
    assert named <= targets


def test_nothing_says_where_or_how_it_was_made() -> None:
    for name in NAMES:
        assert not re.search(r"/(work|home|root|tmp|Users)/|pypi\.|\.local/lib", text_of(name)), name
