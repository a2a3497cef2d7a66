"""`notify doctor`: one line a part of the system, ✓ or ✗, and what to do about each ✗."""

from __future__ import annotations

import imaplib
import os
import smtplib
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import typer
from confluent_kafka import ConsumerGroupState, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]  # exported, but not said so
from rich.table import Table
from rich.text import Text

from schemas.codec import schema_text
from schemas.errors import SettingsError
from streams import provisioning
from streams.cli import console, kafka, web
from streams.cli.acls import rights_for
from streams.cli.context import load_settings
from streams.cli.errors import EXIT_FAILURE, explain_kafka
from streams.cli.provision import wanted
from streams.provisioning import SAFE_REPLICAS, Action
from streams.refusals import UnreachableError, ask
from streams.registry import refusal
from streams.rights import OPERATOR, missing, refused_transactions, sentence
from streams.roles import Role
from streams.settings import CLIENT_NEEDS, Settings
from streams.topics import DEAD_MAX_BYTES, INBOUND_MAX_BYTES, physical, specs
from streams.topology import TOPOLOGY
from streams.transport.admin import learn_leaders, patiently

TIMEOUT_SECONDS = 5.0
MAX_CLOCK_DIFFERENCE_SECONDS = 2.0  # HTTP dates have whole seconds
SHOWN_NAMES = 3
_PORTS = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
_COMPATIBLE = frozenset({"BACKWARD", "BACKWARD_TRANSITIVE", "FULL", "FULL_TRANSITIVE"})

EPILOG = console.examples("notify doctor", "notify doctor --json | jq '.checks[] | select(.state == \"failed\")'")


class State(StrEnum):
    """How a check ended. Skipped: it could not be made, or need not hold here."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


_MARKS = {
    State.PASSED: Text("✓", style="bold green"),
    State.FAILED: Text("✗", style="bold red"),
    State.SKIPPED: Text(console.NOTHING, style="dim"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    part: str
    state: State
    found: str
    advice: str | None = None


def doctor(*, as_json: console.JsonOption = False) -> None:
    """Look at every part of the system; the exit code is 1 when something is wrong."""
    settings, web_url = load_settings(os.environ, needs=CLIENT_NEEDS)
    checks: list[Check] = []
    for check in examine(settings, web_url):
        checks.append(check)
        if not as_json:
            _print(check)
    failed = sum(check.state is State.FAILED for check in checks)
    if as_json:
        console.print_document(
            {
                "healthy": not failed,
                "checks": [{"part": check.part, "state": check.state, "found": check.found, "advice": check.advice} for check in checks],
            }
        )
    if failed:
        raise typer.Exit(EXIT_FAILURE)


def examine(settings: Settings, web_url: str) -> Iterator[Check]:
    """Yield one check after the other; none of them changes anything."""
    yield Check(part="settings", state=State.PASSED, found=f"environment {settings.env}, {settings.partitions} partitions by user")
    try:
        metadata = ask(settings.cluster)
    except UnreachableError as error:
        yield Check(part="kafka", state=State.FAILED, found=f"no answer at {settings.kafka}", advice=str(error))
        for part in ("rights", "topics", "replication", "workers"):
            yield Check(part=part, state=State.SKIPPED, found="Kafka does not answer")
    else:
        admin = kafka.admin(settings.cluster)
        brokers = f"{len(metadata.brokers)} broker{'' if len(metadata.brokers) == 1 else 's'}"
        yield Check(part="kafka", state=State.PASSED, found=f"{brokers} at {settings.kafka}, {settings.cluster.security.shown}")
        yield from _guarded("rights", lambda: _rights(settings))
        yield from _guarded("topics", lambda: _topics(admin, settings))
        yield from _guarded("replication", lambda: _replication(metadata, settings))
        yield from _guarded("workers", lambda: _workers(admin, metadata, settings))
    yield from _registry(settings)
    yield _mail(settings)
    yield from _signatures(settings)
    yield from _bounces(settings)
    yield _web(web_url)


def _guarded(part: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except KafkaException as error:
        yield Check(part=part, state=State.FAILED, found="could not be looked at", advice=explain_kafka(error))


def _rights(settings: Settings) -> Iterator[Check]:
    """Look whether Kafka grants what the worker of NOTIFY_ROLE needs; without a role, what this command line needs."""
    role = settings.role or OPERATOR
    rights = rights_for(role, settings.env)
    lacking = missing(settings.cluster, rights, settings.env)
    lacking += refused_transactions(settings.cluster, rights)
    if lacking:
        advice = sentence(lacking, who=settings.cluster.security.shown, role=role)
        yield _failed("rights", f"{len(lacking)} of {len(rights)} that the {role} needs are missing", advice)
    else:
        yield Check(part="rights", state=State.PASSED, found=f"all that the {role} needs")


def _topics(admin: AdminClient, settings: Settings) -> Iterator[Check]:
    changes = provisioning.plan(admin, wanted(settings))
    missing = [change.target.name for change in changes if change.action is Action.CREATE]
    different = [change.target.name for change in changes if change.action is Action.ALTER]
    refused = provisioning.problems(changes)
    if missing:
        yield _failed("topics", f"{_some(missing)} missing", "Run `notify topics ensure`.")
    if different:
        yield _failed(
            "topics",
            f"{_some(different)} kept in another way than wanted",
            "`notify topics ensure --dry-run` shows how; without it, it mends them.",
        )
    for problem in refused:
        yield _failed("topics", "another partition count than wanted", problem)
    if not missing and not different and not refused:
        yield Check(part="topics", state=State.PASSED, found=f"{len(changes)} are there, as wanted")
    for name, limit in _inbound_limits(admin, settings, missing).items():
        if limit > INBOUND_MAX_BYTES:
            advice = f"A record of more than {DEAD_MAX_BYTES:,} bytes would not fit into the dead letters. Lower its max.message.bytes."
            yield _failed("topics", f"{name} accepts records of {limit:,} bytes", advice)


def _inbound_limits(admin: AdminClient, settings: Settings, missing: Sequence[str]) -> dict[str, int]:
    names = [target.name for target in wanted(settings) if not target.is_ours and target.name not in missing]
    return {name: int(str(config["max.message.bytes"].value)) for name, config in provisioning.describe(admin, names).items()}


def _replication(metadata: ClusterMetadata, settings: Settings) -> Iterator[Check]:
    names = {target.name for target in wanted(settings)}
    partitions = [
        (name, partition)
        for name, topic in metadata.topics.items()
        if name in names and topic.error is None
        for partition in topic.partitions.values()
    ]
    leaderless = sorted({name for name, partition in partitions if partition.leader < 0})
    behind = sorted({name for name, partition in partitions if len(partition.isrs) < len(partition.replicas)})
    fewer = sorted({name for name, partition in partitions if len(partition.replicas) < settings.replication})
    if leaderless:
        yield _failed(
            "replication",
            f"{_some(leaderless)} without a leader",
            "Start the brokers that hold them: nothing can be read or written there.",
        )
    if behind:
        yield _failed(
            "replication",
            f"{_some(behind)} with replicas that are not in sync",
            "Look at the brokers' logs and disks: one more failure may stop writing.",
        )
    if fewer:
        yield _failed(
            "replication",
            f"{_some(fewer)} with fewer than {settings.replication} replicas",
            "Add replicas with kafka-reassign-partitions, or correct NOTIFY_REPLICATION.",
        )
    if leaderless or behind or fewer:
        return
    if settings.replication < SAFE_REPLICAS:
        replicas = "one replica" if settings.replication == 1 else f"{settings.replication} replicas"
        found = f"{replicas} each: right for a laptop; in production set NOTIFY_REPLICATION=3, which also asks for 2 in sync"
        yield Check(part="replication", state=State.PASSED, found=found)
    else:
        yield Check(
            part="replication",
            state=State.PASSED,
            found=f"{settings.replication} replicas each, all in sync, at least 2 in sync to write, no unclean election",
        )


def _workers(admin: AdminClient, metadata: ClusterMetadata, settings: Settings) -> Iterator[Check]:
    counts = {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.error is None}
    groups = {f"notify.{settings.env}.{role}": role for role in Role}
    described = admin.describe_consumer_groups(list(groups), request_timeout=TIMEOUT_SECONDS)
    for group, role in groups.items():
        try:
            description: Any = described[group].result(2 * TIMEOUT_SECONDS)
            state, members = description.state, len(description.members)
        except KafkaException:  # newer brokers answer so for a group that never was
            state, members = ConsumerGroupState.DEAD, 0
        inputs = [physical(settings.env, name) for step in TOPOLOGY if step.role is role for name in step.reads]
        lag = _lag(admin, group, [TopicPartition(name, number) for name in inputs for number in range(counts.get(name, 0))])
        waiting = "" if lag is None else f", about {lag:,} records behind" if lag else ", nothing waits"
        if members == 0 and lag is None:
            yield Check(part=f"worker {role}", state=State.SKIPPED, found="has never run here")
        elif members == 0:
            yield _failed(f"worker {role}", f"none runs{waiting}", f"Start one with `NOTIFY_ROLE={role} faust -A streams.app worker`")
        elif state is ConsumerGroupState.STABLE:
            yield Check(part=f"worker {role}", state=State.PASSED, found=f"{members} running{waiting}")
        else:
            yield Check(part=f"worker {role}", state=State.PASSED, found=f"{members}, sharing out their partitions just now{waiting}")


def _lag(admin: AdminClient, group: str, places: list[TopicPartition]) -> int | None:
    committed = provisioning.committed_offsets(admin, group, places)
    if not committed:
        return None
    read = [TopicPartition(topic, number) for topic, number in committed]
    asked = dict.fromkeys(read, provisioning.offset_spec(provisioning.StartAt.LATEST))

    def ends() -> dict[tuple[str, int], int]:
        learn_leaders(admin, (topic for topic, _ in committed), seconds=TIMEOUT_SECONDS)
        futures = admin.list_offsets(asked, request_timeout=TIMEOUT_SECONDS)
        return {(place.topic, place.partition): future.result(2 * TIMEOUT_SECONDS).offset for place, future in futures.items()}

    # the last place of a partition may be a commit marker, which no consumer's position passes until there is more to read
    behind = [end - committed[place] for place, end in patiently(ends, seconds=TIMEOUT_SECONDS).items()]
    return sum(records for records in behind if records > 1)


def _registry(settings: Settings) -> Iterator[Check]:
    part, url = "registry", settings.registry_url
    try:
        level = web.call("GET", f"{url}/config", timeout_seconds=TIMEOUT_SECONDS, security=settings.registry_security)
    except (TimeoutError, aiohttp.ClientError) as error:
        why = refusal(error, settings.registry_security)
        yield _failed(part, f"no answer at {url}", f"{why}. Start it, or correct NOTIFY_REGISTRY_URL. Until then new schemas are parked")
        yield Check(part="clock", state=State.SKIPPED, found="the registry, whose clock is compared, does not answer")
        return
    if level.status in {401, 403}:
        yield _failed(part, f"refuses us at {url}", refusal(level.status, settings.registry_security))
        yield _clock(level)
        return
    name = level.body.get("compatibilityLevel") if isinstance(level.body, dict) else None
    if name in _COMPATIBLE:
        yield Check(part=part, state=State.PASSED, found=f"answers at {url}, compatibility {name}")
    else:
        advice = f'Anybody could register a schema that old readers cannot read. PUT {{"compatibility": "BACKWARD"}} to {url}/config.'
        yield _failed(part, f"answers at {url}, compatibility {name or 'unknown'}", advice)
    yield _schemas(settings)
    yield _clock(level)


def _schemas(settings: Settings) -> Check:
    registered, fresh, incompatible = 0, 0, []
    asked: Any = {"timeout_seconds": TIMEOUT_SECONDS, "security": settings.registry_security}
    for spec in specs():
        if spec.schema is None:
            continue
        subject = f"{physical(settings.env, spec.name)}-value"
        body = {"schema": schema_text(spec.schema), "schemaType": "AVRO"}
        try:
            known = web.call("POST", f"{settings.registry_url}/subjects/{subject}", body=body, **asked)
            if known.status == 200:
                registered += 1
                continue
            answer = web.call(
                "POST",
                f"{settings.registry_url}/compatibility/subjects/{subject}/versions/latest",
                body=body,
                **asked,
            )
        except (TimeoutError, aiohttp.ClientError) as error:
            return _failed("schemas", f"the registry stopped answering ({type(error).__name__})", "Look at its log.")
        if isinstance(answer.body, dict) and answer.body.get("is_compatible") is False:
            incompatible.append(subject)
        else:
            fresh += 1
    if incompatible:
        advice = "This release cannot register its schema there, and its workers will not start. Compare it with the registered one."
        return _failed("schemas", f"{_some(incompatible)} incompatible", advice)
    later = f", {fresh} will be when the first worker or command writes there" if fresh else ""
    return Check(part="schemas", state=State.PASSED, found=f"{registered} of {registered + fresh} registered{later}")


def _clock(answer: web.Answer) -> Check:
    try:
        theirs = parsedate_to_datetime(answer.headers["date"]).timestamp() + 0.5
    except (KeyError, ValueError):
        return Check(part="clock", state=State.SKIPPED, found="neither Kafka nor the registry says what time it is there")
    difference = time.time() - theirs
    if abs(difference) > MAX_CLOCK_DIFFERENCE_SECONDS:
        advice = "Synchronise both clocks (chrony, systemd-timesyncd): decisions go by the timestamps of records."
        return _failed("clock", f"{difference:+.0f} s from the registry's", advice)
    return Check(part="clock", state=State.PASSED, found="agrees with the registry's to the second")


def _mail(settings: Settings) -> Check:
    if not settings.smtp_url:
        return Check(part="mail", state=State.SKIPPED, found="NOTIFY_SMTP_URL is not set here; senders need it")
    url = urlsplit(settings.smtp_url)
    host, port = url.hostname or "", url.port or _PORTS[url.scheme]
    place = f"{host}:{port}"
    try:
        if url.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context())
        else:
            server = smtplib.SMTP(host, port, timeout=TIMEOUT_SECONDS)
        with server:
            code, _ = server.ehlo()
            if url.scheme == "smtp+starttls":
                server.starttls(context=ssl.create_default_context())
    except (OSError, smtplib.SMTPException) as error:
        advice = "Start it, or correct NOTIFY_SMTP_URL. Until then deliveries by e-mail wait; nothing is lost."
        return _failed("mail", f"no SMTP at {place} ({type(error).__name__})", advice)
    if code != 250:
        return _failed("mail", f"{place} answers EHLO with {code}", "Look at the mail server's log.")
    return Check(part="mail", state=State.PASSED, found=f"{place} answers EHLO")


def _signatures(settings: Settings) -> Iterator[Check]:
    """Look whether the DNS has the public half of each key that signs mails."""
    signing = [config for config in settings.providers if config.scheme in _PORTS and "dkim_key" in config.options]
    if not signing:
        return
    from dkim import DKIMException  # here: a command that signs nothing need not load it
    from dkim.dnsplug import get_txt

    from channels.email import signer_of

    for config in signing:
        part = f"signatures of {config.name}"
        try:
            signer = signer_of(config)
            assert signer is not None
            record = get_txt(f"{signer.name}.".encode("ascii"), timeout=TIMEOUT_SECONDS)
        except SettingsError as error:
            yield _failed(part, "cannot be made", str(error))
        except DKIMException:
            yield Check(part=part, state=State.SKIPPED, found="no name server answers")
        else:
            if record is not None and signer.is_published(record.decode("ascii", "replace")):
                yield Check(part=part, state=State.PASSED, found=f"the DNS has the key at {signer.name}")
            else:
                found = f"the DNS has {'no' if record is None else 'another'} key at {signer.name}"
                yield _failed(part, found, f'Publish "{signer.record}" there, in a TXT record')


def _bounces(settings: Settings) -> Iterator[Check]:
    mailbox = settings.bounces
    if mailbox is None:
        return
    from streams.bounces import waiting

    place = f"{mailbox.host}:{mailbox.port}"
    try:
        count = waiting(mailbox)
    except (OSError, imaplib.IMAP4.error, UnicodeError) as error:
        advice = "Start it, or correct NOTIFY_BOUNCES_URL. Until then nobody hears of bounces; they wait in the mailbox."
        yield _failed("bounces", f"the mailbox at {place} cannot be read ({type(error).__name__})", advice)
    else:
        yield Check(part="bounces", state=State.PASSED, found=f"{count} mails wait in the mailbox at {place}")


def _web(web_url: str) -> Check:
    try:
        answer = web.call("GET", f"{web_url}/health/ready", timeout_seconds=TIMEOUT_SECONDS)
    except (TimeoutError, aiohttp.ClientError) as error:
        advice = "Start a worker of the role views, or say with NOTIFY_WEB_HOST and NOTIFY_WEB_PORT where it is."
        return _failed("web", f"no answer at {web_url} ({type(error).__name__})", advice)
    if answer.status != 200:
        return _failed(
            "web", f"not ready at {web_url} ({answer.status})", "It may be recovering its tables; look again shortly, then at its log."
        )
    return Check(part="web", state=State.PASSED, found=f"ready at {web_url}")


def _failed(part: str, found: str, advice: str) -> Check:
    return Check(part=part, state=State.FAILED, found=found, advice=f"{advice[:1].upper()}{advice[1:].rstrip('.')}.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{', '.join(names[:SHOWN_NAMES])}{more}"


def _print(check: Check) -> None:
    line = Table.grid(padding=(0, 1))
    line.add_column(width=1)
    line.add_column(width=22, no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(
        _MARKS[check.state],
        Text(check.part, style="bold" if check.state is State.FAILED else ""),
        console.cell(check.found, "dim" if check.state is State.SKIPPED else ""),
    )
    if check.advice and check.state is State.FAILED:
        line.add_row("", "", Text.assemble(("→ ", "yellow"), console.cell(check.advice, "yellow")))
    console.stdout().print(line)
