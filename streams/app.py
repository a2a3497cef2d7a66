"""Joins the parts into the Faust app of one role: `NOTIFY_ROLE=<role> faust -A streams.app worker -l info`.

`build_app` is the only place where parts meet. Nothing connects before the settings are known to be whole; nothing is
read before the topics were found as they should be.
"""

from __future__ import annotations

import gc

# nothing that is imported is garbage: looking for some meanwhile, again and again, is a seventh of a worker's start
gc.disable()

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

import faust
import uvloop
from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as KafkaMessage
from faust.assignor.partition_assignor import PartitionAssignor
from faust.types import TP

from agents.control import Control
from agents.receipts import EXPIRE_EVERY_SECONDS, Matcher, report_key
from channels.config import Ports
from schemas import topics
from schemas.codec import Codec
from schemas.errors import (
    NotifyError,
    ProviderUnavailableError,
    RegistryUnavailableError,
    SettingsError,
)
from schemas.ids import digest
from schemas.messages import (
    ControlEntry,
    Delivery,
    DeliveryReport,
    Message,
)
from schemas.topics import Channel
from streams.clock import ClockWatch
from streams.deciding import DecidingShard, Timer
from streams.followers import KeyFollower, OrderFollower, open_key
from streams.gateways import Gateway, gateways_of
from streams.health import HealthWatch
from streams.inputs import Inputs, nothing
from streams.metrics import Metrics
from streams.outgoing import Providers
from streams.outside import FOLLOWERS, WRITTEN_BY_WEB
from streams.refusals import UnreachableError, ask, why_unreachable
from streams.registry import Registry
from streams.rights import missing, rights_of, sentence
from streams.roles import Role, step_back
from streams.runner import MakeShard, Runner
from streams.sending import SendingShard
from streams.settings import WORKER_NEEDS, Settings
from streams.shard import Input, Names, Tools, Turns
from streams.topics import Count, TopicSpec, physical
from streams.topology import FORWARD, Step, all_topics, steps_of
from streams.transport.admin import committed_offsets, topic_facts
from streams.transport.cluster import leave
from streams.transport.credentials import credentials
from streams.transport.faust_parts import (
    BatchSchema,
    BatchTableManager,
    KnowingAssignor,
    NotifyApp,
    PartitionedTable,
    PromptWorker,
    check_version,
)
from streams.transport.reader import Batch
from streams.unsubscribe import unsubscribe_url
from streams.views.pages import Health, OperationsContext, WebContext, install, install_operations

gc.freeze()  # or else the first thing that happens is a look through all of it
gc.enable()

if TYPE_CHECKING:
    from streams.views.queries import History

log = logging.getLogger(__name__)

EXIT_SETTINGS = 2
_POOL_THREADS = 64
_START_RETRY_SECONDS = 2.0
_START_PATIENCE_SECONDS = 30.0
STOP_SECONDS = 35.0  # longer than a drain; docker-compose.yml kills after 45
_START_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which steps a worker runs, and on which topics. Tests and benchmarks run steps of their own on the same parts.

    `inputs` None: what the role does. `tune` sees the tools before anything is read: faults are set there.
    """

    steps: tuple[Step, ...]
    topics: Sequence[TopicSpec]
    inputs: Callable[[Step, Codec], Mapping[str, Input]] | None = None
    tune: Callable[[Tools], None] = lambda _tools: None


class Worker(NotifyApp):
    """The app of one role."""

    def __init__(self, settings: Settings, role: Role, plan: Plan, **options: Any) -> None:
        self.settings = settings
        self.role = role
        self.plan = plan
        self.steps = plan.steps
        self.metrics = Metrics(role)
        self.runner: Runner | None = None
        self.watch: HealthWatch | None = None
        self.keys: KeyFollower | None = None
        self.orders: OrderFollower | None = None
        self.registry = Registry(settings.registry_url, settings.data_dir / "schemas", settings.registry_security)
        self.cluster = settings.cluster
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._publisher: Producer | None = None
        self._codec: Codec | None = None
        self._gateways: Mapping[str, Gateway] = {}
        self.tables_of: dict[tuple[str, str], PartitionedTable] = {}
        super().__init__(f"notify.{settings.env}.{role}", **options)

    # ---- start and stop

    async def on_first_start(self) -> None:
        """Check topics, register schemas, open channels and build the runner, before anything is consumed."""
        self.conf.datadir.mkdir(parents=True, exist_ok=True)
        await super().on_first_start()
        try:
            await self._prepare()
        except SettingsError as error:
            for problem in error.problems:
                log.critical("start.refused problem=%r", problem)
            leave("; ".join(error.problems))

    async def on_stop(self) -> None:
        """Stop, then close what `on_first_start` opened. Ends the process where that does not end in STOP_SECONDS."""
        # Faust waits for ever for a group that is joined anew in this moment, and would keep its partitions for so long
        ending = threading.Timer(STOP_SECONDS, leave, [f"the orderly stop took longer than {STOP_SECONDS:.0f} s"])
        ending.daemon = True
        ending.start()
        try:
            await super().on_stop()
            for close in reversed(self._closing):
                await close()
        finally:
            ending.cancel()

    async def _prepare(self) -> None:
        env = self.settings.env
        pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="kafka")
        specs = {spec.name: spec for spec in self.plan.topics}
        used = {topic for step in self.steps for topic in (*step.reads, *step.writes, *step.changelogs().values())}
        followed = self._followed()
        used |= {topics.DEAD} | followed
        loop = asyncio.get_running_loop()
        names = {topic: physical(env, topic) for topic in used}
        if self.plan.inputs is None:
            await loop.run_in_executor(pool, self._check_rights)
        facts = await loop.run_in_executor(pool, topic_facts, self.cluster, list(names.values()))
        wrong = [
            f"topic {names[topic]} has {facts[names[topic]].partitions} partitions, this worker expects {expected}"
            for topic in sorted(used)
            if facts[names[topic]].partitions != (expected := self._count(specs[topic].count))
        ]
        if wrong:
            raise SettingsError(wrong)
        written = WRITTEN_BY_WEB if self.role is Role.VIEWS else frozenset()
        codec = self._codec = await self._register([spec for name, spec in specs.items() if name in used | written])
        tools = Tools(
            cluster=self.cluster,
            names=Names(
                physical=names,
                logical={name: topic for topic, name in names.items()},
                specs=specs,
                partitions={topic: facts[name].partitions for topic, name in names.items()},
                ids={topic: facts[name].id for topic, name in names.items()},
            ),
            encoder=codec,
            metrics=self.metrics,
            role=self.role,
            pool=pool,
            turns=Turns(),
            dead_run_limit=self.settings.dead_run_limit,
        )
        self.plan.tune(tools)
        make_shard: dict[str, MakeShard] = {}
        if topics.KEYS in followed:
            self.keys = KeyFollower(
                self.cluster,
                names[topics.KEYS],
                group=f"{self.conf.id}.keys",
                partitions=self.settings.partitions,
                open_key=partial(open_key, codec, self.settings.seal_key),
            )
        inputs = Inputs(settings=self.settings, codec=codec, registry=self.registry, control=lambda: self._control, keys=self.keys)
        if topics.CONTROL in followed:
            self.orders = OrderFollower(
                self.cluster,
                names[topics.CONTROL],
                group=f"{self.conf.id}.control",
                decode=inputs.own(ControlEntry, nothing).decode,
                learn=inputs.learn,
            )
        if self.role.lane is not None and self.plan.inputs is None:
            make_shard["send"] = await self._sending()
        if self.role is Role.SIGNALS and self.plan.inputs is None:
            expiry = Timer(seconds=EXPIRE_EVERY_SECONDS, decide=Matcher(self.settings.partitions).expire)
            make_shard["match"] = partial(DecidingShard, timer=expiry)
        if self.role is Role.STORE and self.plan.inputs is None:
            make_shard["keep"] = self._storing(tools)
        runner = Runner(
            tools,
            group=self.conf.id,
            steps={step: self.plan.inputs(step, codec) if self.plan.inputs else inputs.of(step) for step in self.steps},
            make_shard=make_shard,
        )
        runner.committed = self._committed
        if self.keys is not None:
            runner.on_assigned.append(self._follow_keys)
        if self.orders is not None:
            runner.on_assigned.append(self._follow_orders)
            self.orders.changed.append(self._tell_shards)
        runner.on_acquired += [self._show_tables, self._check_seal_key, self._share_quotas]
        self.owner = self.runner = runner
        self.watch = HealthWatch(runner)
        self.add_future(self.watch.watch())
        self.add_future(ClockWatch(self.registry, self.metrics).watch())
        self._read_bounces(runner)
        self._closing.append(self.registry.close)

    def _followed(self) -> set[str]:
        """Return the topics that this worker follows beside its inputs."""
        if self.plan.inputs is not None or (self.role is Role.SIGNALS and not self.settings.webhooks):
            return set()  # signals needs them for subscribers only
        return {topic for topic, roles in FOLLOWERS.items() if self.role in roles}

    def _check_rights(self) -> None:
        """Raise SettingsError when Kafka does not answer, or does not grant what the role needs. Blocks."""
        look = partial(missing, self.cluster, rights_of(self.role, self.settings.env), self.settings.env)
        deadline = time.monotonic() + _START_PATIENCE_SECONDS
        while True:
            try:
                lacking = look()
                break
            except KafkaException as error:
                # a broker that has just started answers before it knows its groups
                if time.monotonic() > deadline:
                    raise SettingsError([why_unreachable(self.cluster)]) from error
            try:
                ask(self.cluster)
            except UnreachableError as error:
                raise SettingsError([str(error)]) from error
            time.sleep(_START_PAUSE_SECONDS)
        if lacking:
            raise SettingsError([sentence(lacking, who=self.cluster.security.shown, role=self.role)])

    async def _register(self, specs: Sequence[TopicSpec]) -> Codec:
        while True:
            try:
                return await self.registry.codec(self.settings.env, specs)
            except RegistryUnavailableError as error:
                log.warning("registry.unavailable error=%s: waiting, since these schemas were never registered from here", error)
                await asyncio.sleep(_START_RETRY_SECONDS)

    async def _follow_keys(self, partitions: set[int]) -> None:
        """Read the keys of the users of these partitions to their end; ingest's are others than the users'."""
        assert self.keys is not None
        await self.keys.follow(set(range(self.settings.partitions)) if self.role is Role.INGEST else partitions)

    async def _follow_orders(self, _partitions: set[int]) -> None:
        """Read the control topic, whose one partition is everybody's, to its end."""
        assert self.orders is not None
        await self.orders.follow_all()

    def _orders_version(self) -> int:
        assert self.orders is not None
        return self.orders.version

    def _tell_shards(self) -> None:
        """Let senders look at once whether a new order is about what they hold."""
        for shard in self.runner.shards.values() if self.runner is not None else ():
            shard.wake.set()

    @cached_property
    def _control(self) -> Control:
        assert self.orders is not None
        return Control(self.orders.entry, seal_key=self.settings.seal_key)

    async def _sending(self) -> MakeShard:
        from channels.registry import build_channels
        from channels.webhook import WebhookChannel  # here: what speaks to providers is a third of a worker's start

        settings = self.settings
        assert self.role.lane is not None
        control, lane_share = self._control, settings.lane_shares[self.role.lane]
        channels = build_channels(settings.providers, self._ports())
        if settings.webhooks:
            channels[Channel.WEBHOOK] = [WebhookChannel(each, max_open=settings.max_open_attempts) for each in settings.webhooks]
        for channel in chain.from_iterable(channels.values()):
            await channel.open()
            self._closing.append(channel.close)
        self._gateways = gateways_of(
            channels,
            {config.name: config for config in (*settings.providers, *(each.config for each in settings.webhooks))},
            max_open=settings.max_open_attempts,
            lane_share=lane_share,
            metrics=self.metrics,
        )
        providers = Providers(
            gateways=self._gateways,
            key_of=self.key_of,
            ledger_seconds=settings.dedupe_seconds,
            control=control,
            orders_version=self._orders_version,
            tiers_seconds=settings.retry_tiers_seconds[self.role.lane],
            lane_share=lane_share,
            partitions=settings.partitions,
        )
        return partial(SendingShard, providers=providers)

    def _ports(self) -> Ports:
        """Return what channels may ask of this worker."""
        from channels.bounces import key_of
        from streams.views.callbacks import twilio_callback_url

        return Ports(
            mail_from=self.settings.mail_from,
            max_open=self.settings.max_open_attempts,
            report=self._report,
            unsubscribe_url=self._unsubscribe_url,
            callback_url=partial(twilio_callback_url, self.settings.callback_url),
            return_key=key_of(self.settings.token_key),
        )

    def _unsubscribe_url(self, delivery: Delivery, address: str) -> str | None:
        """Return where a reader leaves the category of a delivery; None where he cannot."""
        if not self.settings.public_url:
            return None
        scope = self._control.scope_of(delivery.channel, address)
        return unsubscribe_url(self.settings.public_url, self.settings.token_key, delivery, scope)

    async def _report(self, report: DeliveryReport) -> None:
        """Publish a provider's later word. Raises ProviderUnavailableError: Kafka did not take it."""
        await self.publish(topics.RECEIPTS, report_key(report.provider, report.reference), report)

    def _read_bounces(self, runner: Runner) -> None:
        mailbox = self.settings.bounces
        if self.role is not Role.SIGNALS or mailbox is None or self.plan.inputs is not None:
            return
        from channels.bounces import key_of
        from channels.mime import parse_sender
        from streams.bounces import BounceReader

        def is_ours() -> bool:
            return any(shard.step.name == "match" and shard.partition == 0 for shard in runner.shards.values())

        reader = BounceReader(
            mailbox,
            domain=parse_sender(self.settings.mail_from).domain,
            key=key_of(self.settings.token_key),
            publish=self._report,
            is_ours=is_ours,
            metrics=self.metrics,
        )
        self.add_future(reader.run())

    def _share_quotas(self, runner: Runner) -> None:
        """Let this worker use as much of each provider's quota as it owns of the partitions."""
        owned = {shard.partition for shard in runner.shards.values()}
        for gateway in self._gateways.values():
            gateway.own(len(owned) / self.settings.partitions)

    def open_history(self) -> History | None:
        """Return what reads PostgreSQL for the web, not connected yet; None without a database."""
        if not self.settings.postgres_url:
            return None
        from streams.store.history import History as Database  # here: SQLAlchemy is a quarter of a worker's start

        history = Database(self.settings.postgres_url, application=self.conf.id)
        self._closing.append(history.close)
        return history

    def _storing(self, tools: Tools) -> MakeShard:
        from streams.store.database import Database
        from streams.storing import CONNECTIONS, Store, StoringShard

        database = Database(self.settings.postgres_url, application=self.conf.id, connections=CONNECTIONS)
        self._closing.append(database.close)
        store = Store(database, tools, kept_months=self.settings.store_months)
        self.add_future(store.keep_house())
        return partial(StoringShard, store=store)

    def _count(self, count: Count) -> int:
        return self.settings.counts[count]

    async def _committed(self, tps: set[TP]) -> Mapping[TP, int | None]:
        places = [(tp.topic, tp.partition) for tp in tps]
        assert self.runner is not None
        found = await self.runner.tools.in_thread(committed_offsets, self.cluster, self.conf.id, places)
        return {tp: found.get((tp.topic, tp.partition)) for tp in tps}

    def _show_tables(self, runner: Runner) -> None:
        for (step, table), shown in self.tables_of.items():
            shown.shards = {shard.partition: shard.tables[table] for shard in runner.shards.values() if shard.step.name == step}

    # ---- what the web needs

    async def key_of(self, user_id: str) -> bytes | None:
        """Return a user's key, None when he has none or it was destroyed. Leaves for a wrong seal key. Raises TimeoutError."""
        assert self.keys is not None
        return await self.keys.key_of(user_id)

    def _check_seal_key(self, runner: Runner) -> None:
        """Leave when one of the stored keys does not open with ours."""
        assert self._codec is not None
        tables = [shard.tables["keys"] for shard in runner.shards.values() if "keys" in shard.tables]
        followed = list(self.keys.tables()) if self.keys is not None else []
        for rows in (*tables, *followed):
            for row in islice(rows.values(), 1):
                open_key(self._codec, self.settings.seal_key, row)

    def owner_of(self, partition: int) -> str | None:
        """Return the base URL of the worker that owns a partition of the users' topics; None: this one, or nobody."""
        topic = physical(self.settings.env, topics.STATUS)
        for url, owned in cast("PartitionAssignor", self.assignor).external_topics_metadata().items():
            if partition in owned.get(topic, ()):
                return None if str(url).rstrip("/") == str(self.conf.canonical_url).rstrip("/") else str(url)
        return None

    def shard(self, table: str, partition: int) -> Mapping[bytes, bytes] | None:
        """Return the rows of a table's partition; None when they are not here."""
        return None if self.runner is None else self.runner.rows(table, partition)

    async def publish(self, topic: str, key: bytes, message: Message) -> None:
        """Publish a message and return when the broker has acknowledged it. Raises ProviderUnavailableError."""
        assert self._codec is not None
        if self._publisher is None:
            self._publisher = Producer(
                self.cluster.config(enable_idempotence=True, partitioner="murmur2_random", linger_ms=0, delivery_timeout_ms=8_000)
            )
            with suppress(KafkaException):  # publishing says what is wrong
                # an idempotent producer that has met no broker looks again after half a second
                await asyncio.to_thread(self._publisher.list_topics, timeout=_START_RETRY_SECONDS)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def on_delivery(error: KafkaError | None, _message: KafkaMessage) -> None:
            loop.call_soon_threadsafe(_settle, done, error)

        publisher = self._publisher
        try:
            publisher.produce(physical(self.settings.env, topic), self._codec.encode(message), key, on_delivery=on_delivery)
        except (BufferError, KafkaException) as error:
            raise ProviderUnavailableError("Kafka does not take the message", code="kafka") from error
        while not done.done():
            await loop.run_in_executor(None, publisher.poll, 0.05)
        await done

    def health_of_worker(self) -> Health:
        """Return what `/health` answers."""
        from streams.views.pages import Health

        return self.watch.health() if self.watch else Health(is_live=True, is_ready=False, details={"role": self.role})


def _settle(done: asyncio.Future[None], error: KafkaError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(ProviderUnavailableError(f"Kafka did not acknowledge: {error.name()}", code="kafka"))


def build_app(settings: Settings, plan: Plan | None = None) -> Worker:
    """Return the app of `settings.role`, not started. Connects nowhere. `plan` None: what the topology says."""
    check_version()
    assert settings.role is not None
    app = Worker(
        settings,
        settings.role,
        plan or Plan(steps=_steps(settings, settings.role), topics=all_topics()),
        broker=";".join(f"kafka://{server}" for server in settings.kafka.split(",")),
        broker_credentials=credentials(settings.kafka_security),
        autodiscover=False,
        TableManager=BatchTableManager,
        datadir=settings.data_dir / "faust" / f"{settings.role}-{settings.web_port}",
        topic_allow_declare=False,
        topic_disable_leader=True,
        topic_partitions=settings.partitions,
        table_standby_replicas=0,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=_static_member(settings),
        broker_commit_interval=1.0,
        broker_session_timeout=settings.session_timeout_seconds,
        PartitionAssignor=KnowingAssignor,
        Worker=PromptWorker,
        broker_heartbeat_interval=min(2.0, settings.session_timeout_seconds / 3),
        broker_request_timeout=90.0,
        stream_recovery_delay=0.0,
        web_enabled=True,
        web_bind=settings.web_host,
        web_host=settings.web_host,
        web_port=settings.web_port,
        canonical_url=_web_url(settings),
        web_tables_enabled=False,
        web_router_enabled=False,
        worker_redirect_stdouts=False,
    )
    app.health_failed = lambda error: leave(f"recovery failed: {type(error).__name__}: {error}")
    for step in app.steps:
        _bind(app, step)
    operations = OperationsContext(health=app.health_of_worker, registry=app.metrics.registry)
    if settings.role is Role.VIEWS:
        from streams.views.callbacks import Callbacks, fetch_from_amazon, install_callbacks
        from streams.views.requests import Asking, Rates, install_requests
        from streams.views.unsubscribe import install_unsubscribe
        from templates.render import Templates

        context = WebContext(
            health=app.health_of_worker,
            registry=app.metrics.registry,
            tables=app,
            partitions=settings.partitions,
            owner=app.owner_of,
            key_of=app.key_of,
            publish=app.publish,
            token_key=settings.token_key,
            now=lambda: datetime.now(UTC),
            history=app.open_history(),
        )
        install(app, context)
        install_requests(app, Asking(templates=Templates(), rates=Rates(per_second=settings.posts_per_second)))
        install_unsubscribe(app)
        callbacks = Callbacks(
            public_url=settings.callback_url,
            tokens={each.name: each.password for each in settings.providers if each.scheme.startswith("twilio")},
            ses_topics=settings.ses_topics,
            keys=settings.callback_keys,
            fetch=fetch_from_amazon,
            count=lambda source, outcome: app.metrics.callbacks.labels(source, outcome).inc(),
        )
        install_callbacks(app, callbacks)
    else:
        install_operations(app, operations)
    return app


def _steps(settings: Settings, role: Role) -> tuple[Step, ...]:
    return tuple(step for step in steps_of(role) if step.name != FORWARD or settings.webhooks)


def _static_member(settings: Settings) -> str | None:
    """Return the worker's static member id. The address is in it: the broker hands a returning member its old assignment.

    Faust's assignor puts each member's URL into the assignment and refuses one with another URL than its own.
    """
    if settings.worker_name is None:
        return None
    return f"{settings.worker_name}-{settings.role}-{digest(_web_url(settings), size=4)}"


def _web_url(settings: Settings) -> str:
    return settings.web_url or f"http://{settings.web_host}:{settings.web_port}"


def _bind(app: Worker, step: Step) -> None:
    partitions = app.settings.counts[step.count]
    for table, changelog in step.changelogs().items():
        name = f"{step.name}-{table}"
        shown = PartitionedTable(app, name=name, changelog=physical(app.settings.env, changelog), partitions=partitions)
        app.tables.add(shown)
        app.tables_of[(step.name, table)] = shown
    for topic in step.reads:
        source = app.topic(physical(app.settings.env, topic), schema=BatchSchema(), partitions=partitions)

        async def agent(stream: Any) -> None:
            # not acknowledged to Faust: a record is done when the runner's transaction is committed
            async for batch in cast("faust.Stream[Batch]", stream).noack():
                assert app.runner is not None
                app.runner.accept(batch)

        app.agent(source, name=f"{step.name}.{topic}")(agent)


def app_from_environment() -> Worker:
    """Return the app that the environment describes, or end the process with every problem named at once."""
    try:
        app = build_app(Settings.from_env(os.environ, needs=WORKER_NEEDS))
    except NotifyError as error:
        problems = error.problems if isinstance(error, SettingsError) else [str(error)]
        sys.stderr.write("This worker cannot start:\n" + "".join(f"  - {problem}\n" for problem in problems))
        raise SystemExit(EXIT_SETTINGS) from None
    faulthandler.enable()  # what a C library does wrong is not without a word: the trace of every thread goes to stderr
    # as `faust -L uvloop` does, which nobody should have to remember: a tenth of a sender's processor time
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    step_back([app.role])
    return app


def __getattr__(name: str) -> Worker:
    # `faust -A streams.app` looks for `app`; importing this module alone does nothing
    if name == "app":
        globals()["app"] = app_from_environment()
        return globals()["app"]  # type: ignore[no-any-return]
    raise AttributeError(name)
