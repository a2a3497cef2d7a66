"""The long form of the crash test: `make soak`. SOAK_SECONDS (default 1,800) of payments under random faults."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from schemas.ids import notification_id
from schemas.messages import DecisionRecord, Delivery, StatusChange
from schemas.topics import Channel, Lane, deliver
from streams.embedded.stack import Stack
from tests.harness import System, WorkerProcess, system, wait_for

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
USERS = 500
BATCH_EVENTS = 500
ROLES = ("ingest", "router", "sender-normal", "sender-critical", "signals", "views")


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
    dice = random.Random(1)
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
            done[hurt(made, stack, dice.choice(list(made.workers.values())), dice).partition(" ")[0]] += 1
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
        mails = Counter({found: n for found, n in made.mails().items() if found in mailed})
        decisions = Counter(made.decode(m, DecisionRecord).notification_id for m in made.read("decisions"))
        deliveries = Counter(made.decode(m, Delivery).delivery_id for m in made.read(deliver(Channel.EMAIL, Lane.NORMAL)))
        queued = Counter(c.delivery_id for m in made.read("status") if (c := made.decode(m, StatusChange)).status == "queued")
        kills = sum(len(worker.exits) for worker in made.workers.values() if worker.name.startswith("sender"))
        print(f"\nsoak: {sent} requests, faults {dict(done)}, lost 0, mails doubled {mails.total() - sent}, senders ended {kills} times")
        assert decisions == dict.fromkeys(ids, 1)
        assert deliveries == dict.fromkeys(mailed, 1)
        assert set(queued.values()) == {1}
        assert mails.total() - sent <= 32 * (kills + done["broker"] * 3)
