"""What takes long: `make soak`. SOAK_SECONDS (default 1,800) of payments under random faults, and again as a whole day.

SOAK_SEED chooses other faults.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psutil
import pytest

from agents.stock import product_audience, warehouse_audience
from schemas import topics
from schemas.ids import notification_id
from schemas.messages import Command, DecisionRecord, Delivery, StatusChange, UserAction
from schemas.topics import Channel, Lane, deliver
from streams.cli.wire import Wire
from streams.embedded.stack import Stack
from streams.topics import specs
from tests.harness import System, WorkerProcess, system, wait_for

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
USERS = 500
BATCH_EVENTS = 500
ROLES = ("ingest", "router", "sender-normal", "sender-critical", "delay", "signals", "views", "store")
# a worker that stops lets its calls end, or else leaves with 75; -SIGTERM: it had not begun yet. Any other end, such as of one that
# was killed or fenced, may cut all open calls off, and one that was frozen may give its calls up when it wakes
ORDERLY = {0, -signal.SIGTERM}
PAYMENT_ROLES = ("ingest", "router", "sender-normal", "delay", "signals", "views", "store")
DAY_ROLES = (*PAYMENT_ROLES, "stock", "sender-critical", "sender-bulk")
HOURS = 24
DAY_EVENTS_PER_SECOND = 60
STEP_SECONDS = 2.0
# beside the payments: one in so many of them a password is reset, and in each step so many products run out and come back
RESET_EVERY = 20
PRODUCTS, ADJUSTMENTS, STAFF, WATCHERS = 20, 2, 3, 5


def flat(number: int) -> dict[str, object]:
    return {
        "transactionId": f"soak-{number}",
        "paymentId": f"soak-pay-{number}",
        "userId": f"soak-{number % USERS}",
        "orderId": f"ord-{number}",
        "amount": 10.0,
        "currency": "USD",
        "status": "confirmed",
    }


def hurt(system: System, stack: Stack, worker: WorkerProcess, dice: random.Random) -> str:
    """Do one bad thing and return its name."""
    kind = dice.choices(("kill", "freeze", "terminate", "broker"), (5, 2, 2, 1))[0]
    if kind == "broker":
        asyncio.run(_restart(stack))
    elif kind == "freeze":
        worker.signal(signal.SIGSTOP)
        threading.Timer(dice.uniform(1, 15), worker.signal, [signal.SIGCONT]).start()
    else:
        worker.signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    return f"{kind} {worker.name}" if kind != "broker" else "broker"


async def _restart(stack: Stack) -> None:
    await stack.broker.kill()
    await stack.broker.start()


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 900)
def test_faults_at_random_for_a_long_time_lose_nothing(stack: Stack, tmp_path: Path) -> None:
    dice = random.Random(int(os.environ.get("SOAK_SEED", "1")))
    with system(stack, tmp_path) as made:
        for role in ROLES:
            made.start(role)
        for role in ("ingest", "router", "sender-normal", "views"):
            made.start(role, name="b")
        made.await_ready(seconds=180)
        made.load_preferences({"userId": f"soak-{i}", "email": f"soak-{i}@example.com"} for i in range(USERS))
        end = time.monotonic() + SECONDS
        done: Counter[str] = Counter()
        sent = 0
        for round_ in itertools.count():
            if time.monotonic() > end:
                break
            made.produce("payments", made.frame_payments(flat(i) for i in range(sent, sent + BATCH_EVENTS)))
            sent += BATCH_EVENTS
            done[hurt(made, stack, dice.choice(list(made.workers.values())), dice)] += 1
            wanted = sent - 4 * BATCH_EVENTS  # a backlog of a few rounds is part of the test
            wait_for(lambda: made.count("decisions") >= wanted, seconds=240, what=f"round {round_} decided")  # noqa: B023
        ids = {
            notification_id(
                producer="payments", event_id=f"payment:soak-pay-{i}:confirmed", rule="payment_confirmed", user_id=f"soak-{i % USERS}"
            )
            for i in range(sent)
        }
        mailed = {f"{found}-email" for found in ids}
        wait_for(lambda: mailed <= made.mails().keys(), seconds=600, what="every mail")
        for name, worker in made.workers.items():
            is_done = partial(lambda each: each.is_ready() and each.metric("notify_lag_records") == 0, worker)
            wait_for(is_done, seconds=120, what=f"{name} ready and at the end of what it reads")
        mails = Counter({found: n for found, n in made.mails().items() if found in mailed})
        decisions = Counter(made.decode(m, DecisionRecord).notification_id for m in made.read("decisions"))
        deliveries = Counter(made.decode(m, Delivery).delivery_id for m in made.read(deliver(Channel.EMAIL, Lane.NORMAL)))
        queued = Counter(c.delivery_id for m in made.read("status") if (c := made.decode(m, StatusChange)).status == "queued")
        kinds: Counter[str] = Counter()
        for fault, times in done.items():
            kinds[fault.partition(" ")[0]] += times
        senders = [worker for worker in made.workers.values() if worker.name.startswith("sender-normal")]  # the lane of payments
        ends = Counter("stopped" if code in ORDERLY else "cut off" for worker in senders for code in worker.exits)
        frozen = sum(done[f"freeze {worker.name}"] for worker in senders)
        bound = made.settings.max_open_attempts * (ends["cut off"] + frozen)
        print(f"\nsoak: {sent} requests, faults {dict(kinds)}, lost 0, mails doubled {mails.total() - sent} (bound: {bound})")
        print(f"soak: senders {dict(ends)}, frozen {frozen} times")
        assert decisions == dict.fromkeys(ids, 1)
        assert deliveries == dict.fromkeys(mailed, 1)
        assert set(queued.values()) == {1}
        assert mails.total() - sent <= bound


class Day:
    """The events of a day and the notifications that have to come of them."""

    def __init__(self, made: System) -> None:
        self._made = made
        self._payments = itertools.count()
        self._adjustments = itertools.count()
        with Wire(made.settings) as wire:
            self._codec = wire.codec([spec for spec in specs() if spec.name in {topics.USER_ACTIONS, topics.COMMANDS}])
        self.mailed: set[str] = set()

    def prepare(self) -> None:
        """Store who there is, and who watches what."""
        people = [f"soak-{i}" for i in range(USERS)]
        self._made.load_preferences({"userId": user, "email": f"{user}@example.com"} for user in people)
        audiences = [(user, warehouse_audience("w1")) for user in people[:STAFF]]
        audiences += [(user, product_audience(f"p{n}")) for user in people[:WATCHERS] for n in range(PRODUCTS)]
        now = datetime.now(UTC)
        self._made.produce(
            topics.COMMANDS,
            [
                (
                    user.encode(),
                    self._codec.encode(Command(command_id=f"{user} {of}", user_id=user, kind="watch", audience=of, issued_at=now)),
                )
                for user, of in audiences
            ],
        )
        wait_for(lambda: len(self._made.rows(topics.WATCHES)) == len(audiences), seconds=60, what="every watch")

    def publish(self, payments: int) -> None:
        """Publish what happens in a step with so many payments."""
        now = datetime.now(UTC)
        numbers = list(itertools.islice(self._payments, payments))
        self._made.produce("payments", self._made.frame_payments(map(flat, numbers)))
        for number in numbers:
            self._expect("payments", f"payment:soak-pay-{number}:confirmed", "payment_confirmed", f"soak-{number % USERS}")
        resets = [number for number in numbers if number % RESET_EVERY == 0]
        actions = []
        for number in resets:
            user = f"soak-{number % USERS}"
            data = {"code": f"{number % 1_000_000:06}", "expiresInMinutes": "15"}
            action = UserAction(action_id=f"act-{number}", user_id=user, action="password_reset_requested", data=data, occurred_at=now)
            actions.append((user.encode(), self._codec.encode(action)))
            self._expect("user-actions", action.action_id, "password_reset", user)
        self._made.produce(topics.USER_ACTIONS, actions)
        adjustments = []
        for number in itertools.islice(self._adjustments, ADJUSTMENTS):
            product, is_out = f"p{number % PRODUCTS}", number // PRODUCTS % 2 == 0
            event = {
                "eventId": f"adj-{number}",
                "timestamp": (now + timedelta(milliseconds=number % 1_000)).isoformat(timespec="milliseconds"),
                "productId": product,
                "warehouseId": "w1",
                "previousQuantity": 50 if is_out else 0,
                "newQuantity": 0 if is_out else 50,
            }
            adjustments.append(event)
            for person in range(STAFF if is_out else WATCHERS):
                self._expect("inventory", f"adj-{number}", "out_of_stock" if is_out else "back_in_stock", f"soak-{person}")
        self._made.produce("inventory", self._made.frame_adjustments(adjustments))

    def _expect(self, producer: str, event_id: str, rule: str, user: str) -> None:
        self.mailed.add(f"{notification_id(producer=producer, event_id=event_id, rule=rule, user_id=user)}-email")


@dataclass
class Sample:
    """What a day's traffic had cost at one moment, by worker and table. Memory in MiB."""

    hour: float
    memory: dict[str, float]
    rows: dict[str, float]
    log_bytes: int


def day_rate(hour: float) -> float:
    """Return how busy an hour of the day is, 1 on average: little at four in the morning, most at four in the afternoon."""
    return 1 + 0.8 * math.sin((hour - 10) / 24 * 2 * math.pi)


def sampled(made: System, stack: Stack, hour: float) -> Sample:
    memory: dict[str, float] = {}
    rows: dict[str, float] = {}
    for name, worker in made.workers.items():
        assert worker.process is not None
        memory[name] = psutil.Process(worker.process.pid).memory_info().rss / 2**20
        for line in worker.get("/metrics")[1].decode().splitlines():
            if line.startswith("notify_table_rows{"):
                head, _, value = line.rpartition(" ")
                rows[f"{name.rsplit('-', 1)[0]} {head.split(chr(34))[1]}"] = float(value)
    log_bytes = sum(path.stat().st_size for path in stack.data_dir.glob(f"**/notify.{made.name}.*/*.log"))
    return Sample(hour, memory, rows, log_bytes)


def plot(samples: list[Sample], path: Path) -> None:
    """Draw memory, rows and log over the day."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    hours = [sample.hour for sample in samples]
    figure, axes = plt.subplots(3, 1, figsize=(9, 11), sharex=True, layout="constrained")
    for name in samples[-1].memory:
        axes[0].plot(hours, [sample.memory.get(name, float("nan")) for sample in samples], label=name.removesuffix("-a"))
    axes[0].set_ylabel("resident memory, MiB")
    for table in sorted(samples[-1].rows):
        if not table.endswith("progress") and max(sample.rows.get(table, 0) for sample in samples) > 0:
            axes[1].plot(hours, [sample.rows.get(table, 0) for sample in samples], label=table)
    axes[1].set_ylabel("rows")
    axes[2].plot(hours, [sample.log_bytes / 2**20 for sample in samples], color="black")
    axes[2].set_ylabel("log of the environment's topics, MiB")
    axes[2].set_xlabel("simulated hour")
    for axis in axes[:2]:
        axis.legend(fontsize=7, ncols=3)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 900)
def test_a_day_of_traffic_leaves_memory_and_state_bounded(stack: Stack, tmp_path: Path) -> None:
    """Twenty-four hours of the day's ups and downs within SOAK_SECONDS; the dedupe window shrinks in proportion, to two hours."""
    window_seconds = SECONDS * 2 / HOURS
    with system(stack, tmp_path) as made:
        for role in DAY_ROLES:
            made.start(role, NOTIFY_DEDUPE_DAYS=f"{max(60.0, window_seconds) / 86_400:.6f}")
        made.await_ready(seconds=180)
        day = Day(made)
        day.prepare()
        samples: list[Sample] = []
        began = time.monotonic()
        for step in range(round(SECONDS / STEP_SECONDS)):
            hour = step * STEP_SECONDS * HOURS / SECONDS
            day.publish(round(DAY_EVENTS_PER_SECOND * day_rate(hour) * STEP_SECONDS))
            if not samples or hour - samples[-1].hour >= HOURS / 150:
                samples.append(sampled(made, stack, hour))
            # the schedule of the day, not a wait for anything
            threading.Event().wait(max(0.0, began + (step + 1) * STEP_SECONDS - time.monotonic()))
        mailed = day.mailed
        wait_for(lambda: mailed <= made.mails().keys(), seconds=600, what="every mail")
        samples.append(sampled(made, stack, HOURS))
        plot(samples, Path(os.environ.get("SOAK_PLOT", tmp_path / "soak.png")))
        mails = Counter({found: n for found, n in made.mails().items() if found in mailed})
        middle, end = (samples[len(samples) * part // 10 :][: len(samples) // 5] for part in (4, 8))
        print(f"\nday: {len(mailed)} notifications, lost 0, doubled {mails.total() - len(mailed)}")
        for name in samples[-1].memory:
            before, after = (max(sample.memory.get(name, 0) for sample in each) for each in (middle, end))
            print(f"day: {name}: {before:.0f} MiB by the middle, {after:.0f} MiB at the end")
            assert after < before * 1.25 + 16, f"{name} grows"
        stock = ADJUSTMENTS * (STAFF + WATCHERS) / 2 / STEP_SECONDS
        peak = (DAY_EVENTS_PER_SECOND * 1.8 * (1 + 1 / RESET_EVERY) + stock) * max(60.0, window_seconds)
        seen = max(sample.rows["router decide.seen"] for sample in samples)
        attempts = max(sample.rows["sender-normal send.attempts"] for sample in samples)
        print(f"day: at most {seen:.0f} ids seen, {attempts:.0f} attempts, in a window that sees at most {peak:.0f} events")
        assert seen < 2 * peak
        assert attempts < 2 * 2 * peak
        assert mails.total() == len(mailed)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_database_away_for_a_minute_stops_nothing_and_is_caught_up_with(stack: Stack, tmp_path: Path) -> None:
    assert stack.postgres_process is not None
    with system(stack, tmp_path) as made:
        for role in PAYMENT_ROLES:
            made.start(role)
        made.await_ready(seconds=180)
        made.load_preferences({"userId": f"soak-{i}", "email": f"soak-{i}@example.com"} for i in range(USERS))
        asyncio.run(stack.postgres_process.kill())
        try:
            made.produce("payments", made.frame_payments(flat(i) for i in range(3_000)))
            wait_for(lambda: len(made.mails()) >= 3_000, seconds=60, what="every mail while the database is away")
            threading.Event().wait(60)
            assert made.workers["store-a"].process is not None
            assert made.workers["store-a"].process.poll() is None, "the store waits, it does not end"
        finally:
            asyncio.run(stack.postgres_process.start())
        wait_for(lambda: made.workers["store-a"].metric("notify_lag_records") == 0, seconds=120, what="the store at the end of the log")
