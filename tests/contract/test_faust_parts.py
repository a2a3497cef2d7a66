"""What `streams/transport/faust_parts.py` builds on in Faust, mode and aiokafka is there, in the shape that it has today.

Most of it is private and may change with any release: hence exact pins, and this file. When a test fails after a version was
moved, read what changed there before anything is mended here.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import aiokafka
import faust
import mode
import pytest
from faust.assignor.partition_assignor import PartitionAssignor
from faust.exceptions import ImproperlyConfigured
from faust.tables.base import Collection
from faust.tables.manager import TableManager
from faust.tables.recovery import RebalanceAgain, Recovery, ServiceStopped
from faust.transport.base import Transport
from faust.transport.conductor import Conductor
from faust.transport.consumer import Consumer, Fetcher, ThreadDelegateConsumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from faust.web.base import BlueprintManager
from faust.web.views import View

from streams.app import Worker
from streams.embedded.worker import SharedWorker, Together
from streams.transport import faust_parts
from streams.views import pages

ROOT = Path(__file__).parents[2]
FAUST = Path(faust.__file__).parent
PINNED = {"faust-streaming": "0.15.3", "aiokafka": "0.14.0", "mode-streaming": "0.7.1"}


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in {"self", "cls"}]


def source(thing: Any) -> str:
    return inspect.getsource(thing)


# ---- versions


@pytest.mark.parametrize("name", sorted(PINNED))
def test_the_version_is_the_pinned_one(name: str) -> None:
    assert version(name) == PINNED[name]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"{name}=={PINNED[name]}" in project["dependencies"]
    assert re.search(rf"^{name}=={re.escape(PINNED[name])} ", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)


def test_faust_itself_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PINNED["faust-streaming"] == faust_parts.FAUST_VERSION
    faust_parts.check_version()
    monkeypatch.setattr(faust, "__version__", "0.15.4")
    with pytest.raises(ImproperlyConfigured):
        faust_parts.check_version()


def test_faust_allows_the_pinned_companions() -> None:
    assert [line for line in requires("faust-streaming") or () if line.startswith("mode")]


# ---- the group


def test_an_app_makes_its_transport_where_ours_does() -> None:
    assert parameters(faust.App._new_transport) == []
    assert "self.conf.broker_consumer" in source(faust.App._new_transport)
    assert {"assignor", "consumer", "tables", "topics", "rebalancing"} <= set(dir(faust.App))
    assert "consumer_generation_id" in source(driver)
    assert issubclass(faust_parts.NotifyApp, faust.App)


def test_the_transport_names_its_parts_as_class_attributes() -> None:
    assert driver.Transport.Consumer is driver.Consumer
    assert hasattr(driver.Transport, "Fetcher")
    assert "self.Consumer(" in source(Transport.create_consumer)
    assert faust_parts.BatchTransport.Consumer is faust_parts.BatchConsumer


def test_the_consumer_makes_its_thread_where_ours_does() -> None:
    assert parameters(driver.Consumer._new_consumer_thread) == []
    assert (
        source(driver.Consumer._new_consumer_thread).rstrip().endswith("AIOKafkaConsumerThread(self, loop=self.loop, beacon=self.beacon)")
    )
    assert "self._new_consumer_thread()" in source(ThreadDelegateConsumer.__init__)


def test_the_thread_is_told_of_partitions_after_its_consumer_exists() -> None:
    assert parameters(driver.AIOKafkaConsumerThread.on_partitions_assigned) == ["assigned", "generation_id"]
    assert inspect.iscoroutinefunction(driver.AIOKafkaConsumerThread.on_partitions_assigned)
    assert "thread.on_partitions_assigned" in source(driver.ConsumerRebalanceListener.on_partitions_assigned)
    assert parameters(driver.AIOKafkaConsumerThread._ensure_consumer) == []
    assert parameters(driver.AIOKafkaConsumerThread.verify_event_path) == ["now", "tp"]


def test_a_paused_partition_is_never_fetched() -> None:
    assert "partitions" in parameters(aiokafka.AIOKafkaConsumer.pause)
    from aiokafka.consumer.fetcher import Fetcher as Fetching

    assert re.search(r"elif tp_state\.paused:\s+resume_futures", source(Fetching._get_actions_per_node))
    assert aiokafka.TopicPartition("t", 1) == TP("t", 1)


def test_a_consumer_is_not_idle_while_it_fetches() -> None:
    from aiokafka.consumer.subscription_state import SubscriptionState

    assert "self._subscription = SubscriptionState(" in source(aiokafka.AIOKafkaConsumer.__init__)
    assert "self._fetch_count += 1" in source(SubscriptionState.fetch_context)
    assert "await self._consumer.start()" in source(driver.AIOKafkaConsumerThread.on_start)


def test_a_member_with_tables_uses_fausts_assignor() -> None:
    assert "has_changelog_tables" in source(driver.AIOKafkaConsumerThread._create_worker_consumer)
    assert "group_instance_id=conf.consumer_group_instance_id" in source(driver.AIOKafkaConsumerThread._create_worker_consumer)
    assert parameters(PartitionAssignor.assigned_actives) == []
    assert parameters(PartitionAssignor.external_topics_metadata) == []
    # why a static member id holds the address: docs/adr/0007-static-members-carry-their-address.md
    assert "assert metadata.url == str(self._url)" in source(PartitionAssignor.on_assignment)


# ---- records and offsets


def test_a_batch_travels_as_a_message() -> None:
    tp = TP("t", 0)
    message = ConsumerMessage("t", 0, 0, 0.0, 0, None, None, b"batch", None, tp=tp, generation_id=7)
    assert (message.value, message.tp, message.generation_id, message.acked) == (b"batch", tp, 7, False)
    # a stream drops what was read for an earlier generation
    assert "message.generation_id != self.app.consumer_generation_id" in source(faust.Stream)
    # and the conductor raises KeyError for a partition that was taken a moment ago
    assert "self._tp_to_callback.__getitem__" in source(Conductor)


def test_the_consumer_has_what_ours_calls_and_replaces() -> None:
    assert parameters(Consumer.ack) == ["message"]
    assert parameters(Consumer.wait_empty) == []
    assert parameters(Consumer.force_commit) == ["topics", "start_new_transaction"]
    assert parameters(Consumer.perform_seek) == []
    assert parameters(Consumer._commit) == ["offsets"]
    assert parameters(Consumer.assignment) == []
    for function in (Consumer.wait_empty, Consumer.force_commit, Consumer.perform_seek, Consumer._commit, Consumer.commit):
        assert inspect.iscoroutinefunction(inspect.unwrap(function)), function
    made = source(Consumer.__init__)
    assert "self.callback = callback" in made
    assert "self._committed_offset = defaultdict(lambda: None)" in made


def test_commit_goes_through_what_ours_replaces() -> None:
    assert "self.force_commit(" in source(Consumer.commit)
    assert "self.ack(" not in source(Consumer.commit)
    assert "_committed_offset" in source(Consumer.on_partitions_revoked) or "_committed_offset" in source(Consumer)


def test_offsets_are_settled_before_partitions_are_given_up() -> None:
    assert "self._consumer_wait_empty" in source(faust.App._on_partitions_revoked)
    assert "consumer.wait_empty()" in source(faust.App._consumer_wait_empty)


def test_the_fetcher_is_one_task_that_ours_replaces() -> None:
    assert isinstance(Fetcher.__dict__["_fetcher"], mode.services.ServiceTask)
    assert isinstance(faust_parts.BatchFetcher.__dict__["_fetcher"], mode.services.ServiceTask)


# ---- recovery and tables


def test_recovery_is_one_task_that_ours_replaces() -> None:
    assert isinstance(Recovery.__dict__["_restart_recovery"], mode.services.ServiceTask)
    assert isinstance(faust_parts.BatchRecovery.__dict__["_restart_recovery"], mode.services.ServiceTask)
    assert parameters(Recovery) == ["app", "tables", "kwargs"]
    assert parameters(Recovery._wait)[0] == "coro"
    assert "generation_id" in parameters(Recovery.on_recovery_completed)
    assert isinstance(Recovery.signal_recovery_start, property)
    assert Recovery._generation_id == 0
    assert "raise RebalanceAgain" in source(Recovery._wait)
    assert "raise ServiceStopped" in source(Recovery._wait)
    assert issubclass(RebalanceAgain, Exception)
    assert issubclass(ServiceStopped, Exception)


def test_recovery_ends_with_the_seek_that_starts_our_reading() -> None:
    # on_recovery_completed, or what it calls, performs the seek
    assert "perform_seek()" in source(Recovery)
    assert "signal_recovery_start.set()" in source(Recovery.on_rebalance)


def test_the_table_manager_starts_recovery_where_ours_does() -> None:
    assert isinstance(TableManager.recovery, property)
    assert TableManager._recovery is None
    assert inspect.iscoroutinefunction(TableManager._update_channels)
    assert {"await self._update_channels()", "await self.recovery.start()"} <= {line.strip() for line in source(TableManager).splitlines()}


def test_a_table_has_what_ours_replaces() -> None:
    assert parameters(faust.Table.apply_changelog_batch)[0] == "batch"
    assert parameters(faust.Table.on_recovery_completed) == ["active_tps", "standby_tps"]
    assert {"app", "name", "partitions", "key_type", "value_type", "changelog_topic"} <= set(parameters(Collection))


def test_a_schema_has_what_ours_replaces() -> None:
    for function in (faust.Schema.loads_key, faust.Schema.loads_value):
        assert parameters(function) == ["app", "message", "loads", "serializer"]


# ---- the end


def test_a_worker_ends_where_ours_does() -> None:
    shutdown = source(mode.Worker._shutdown_loop)
    assert shutdown.index("self._gather_futures()") < shutdown.index("self._gather_all()") < shutdown.index("self._sentinel_task()")
    assert parameters(mode.Worker._gather_all) == parameters(mode.Worker._sentinel_task) == []
    assert inspect.iscoroutinefunction(mode.Worker._sentinel_task)
    assert "self.conf.Worker(" in source(faust.App.Worker)


# ---- what else of Faust is used beside them


def test_the_web_keeps_its_pages_in_blueprints() -> None:
    assert hasattr(BlueprintManager(), "applied")
    assert {"get_methods", "on_request_error"} <= set(dir(View))
    assert {"view_name", "view_path"} <= set(View.__annotations__)


# ---- nobody else


@cache
def names_of_faust() -> frozenset[str]:
    """Return every private name that Faust defines or uses on its own objects."""
    found: set[str] = set()
    for path in FAUST.rglob("*.py"):
        found |= set(re.findall(r"(?:def |self\.)(_[a-z]\w*)", path.read_text("utf-8")))
    return frozenset(found)


def modules() -> Iterator[Path]:
    for folder in ("agents", "streams"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def own_names() -> set[str]:
    """Return the private names that our own modules define."""
    found: set[str] = set()
    for path in modules():
        found |= set(re.findall(r"(?:def |self\.|^\s*)(_[a-z]\w*)\s*(?:[:=(]|$)", path.read_text("utf-8"), re.MULTILINE))
    return found


@pytest.mark.parametrize("path", list(modules()), ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_else_touches_private_names_of_faust(path: Path) -> None:
    if path == Path(faust_parts.__file__):
        return
    private = names_of_faust() - own_names()
    touched = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in private
    }  # fmt: skip
    assert touched == set()


@pytest.mark.parametrize("kind", [Worker, Together, SharedWorker, pages.Page], ids=lambda kind: kind.__name__)
def test_our_subclasses_hide_no_private_name_of_their_bases(kind: type[Any]) -> None:
    bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] in {"faust", "mode"}]
    theirs = {name for base in bases for name in re.findall(r"(?:def |self\.|^    )(_[a-z]\w*)\s*[:=(]", source(base), re.MULTILINE)}
    ours = set(re.findall(r"(?:def |self\.)(_[a-z]\w*)\s*[:=(]", source(kind)))
    assert bases
    assert ours & theirs == set()


def test_the_inside_of_fausts_transport_and_tables_is_imported_in_one_module_only() -> None:
    # `streams.app` names the assignor's type, to ask it who owns what
    # and `aiokafka.abc` is how aiokafka wants to be given tokens
    allowed = {("streams/app.py", "faust.assignor.partition_assignor"), ("streams/transport/credentials.py", "aiokafka.abc")}
    inside = ("faust.transport", "faust.tables", "faust.assignor", "aiokafka")
    for path in modules():
        if path == Path(faust_parts.__file__):
            continue
        name = str(path.relative_to(ROOT))
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text("utf-8"), re.MULTILINE)
        assert {(name, module) for module in imported if module.startswith(inside)} <= allowed


def test_noack_is_used_only_where_the_runner_takes_over() -> None:
    # a record is acknowledged by its transaction; with `noack` anywhere else it would be by nobody
    used = {str(path.relative_to(ROOT)): len(re.findall(r"\bnoack\(", path.read_text("utf-8"))) for path in modules()}
    assert {name: count for name, count in used.items() if count} == {"streams/app.py": 1}
