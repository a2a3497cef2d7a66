"""A mail that bounces, from the delivery topic to its status: mail server, mailbox, IMAP and Kafka are real."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import aiosmtplib
import pytest

from channels.simulators.smtp import SmtpSimulator
from schemas import topics
from schemas.messages import ControlEntry, Delivery
from schemas.status import Suppression
from streams.embedded.stack import Stack
from tests.deliveries import a_delivery, changes, give_keys, publish
from tests.harness import System, system, wait_for
from tests.mail_servers import GreenMail, greenmail

INBOX = "bounces@bounces.flowmart.example"


@contextmanager
def mail_server(mailboxes: GreenMail) -> Iterator[SmtpSimulator]:
    """Run a mail server whose bounces are put into the mailbox that `signals` reads."""

    async def put(_recipient: str, raw: bytes) -> None:
        # GreenMail refuses the empty sender of a bounce
        await aiosmtplib.send(raw, sender="mta@x.example", recipients=[INBOX], hostname="127.0.0.1", port=mailboxes.smtp, start_tls=False)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = SmtpSimulator(on_report=put)
    try:
        asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(10)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def running(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with (
        greenmail(users=INBOX.replace("@", ":secret@")) as mailboxes,
        mail_server(mailboxes) as server,
        system(
            stack,
            tmp_path_factory.mktemp("bounces"),
            variables={
                "NOTIFY_SMTP_URL": "",
                "NOTIFY_PROVIDERS": f"{server.url}?name=relay&bounce_domain=bounces.flowmart.example",
                "NOTIFY_BOUNCES_URL": f"imap://{quote(INBOX)}:secret@127.0.0.1:{mailboxes.imap}?every=1",
            },
        ) as made,
    ):
        made.start("signals")
        made.start("sender-normal")
        made.await_ready()
        yield made


def ends(made: System, delivery: Delivery) -> list[tuple[str, str | None]]:
    return [(change.status, change.reason) for change in changes(made, delivery) if change.status in {"delivered", "bounced"}]


def test_a_bounce_and_a_complaint_become_status_and_suppression(running: System) -> None:
    bounced, complained, arrived = (
        a_delivery(f"{word}-user", word, address=f"{word}@far.example") for word in ("bounce", "complain", "deliver")
    )
    give_keys(running, [each.user_id for each in (bounced, complained, arrived)])
    publish(running, topics.deliver("email", "normal"), [bounced, complained, arrived])
    wait_for(lambda: ends(running, bounced) and ends(running, complained), seconds=120, what="both reported")
    assert ends(running, bounced) == [("bounced", "5.1.1")]
    assert ends(running, complained) == [("delivered", "abuse")]
    assert ends(running, arrived) == []
    wait_for(lambda: running.count(topics.CONTROL) >= 2, seconds=30, what="two suppressions")
    orders: list[ControlEntry] = running.messages(topics.CONTROL, ControlEntry)
    assert {order.reason for order in orders} == {Suppression.HARD_BOUNCE, Suppression.COMPLAINT}
    signals = running.workers["signals-a"]
    assert signals.metric("notify_bounces_total", outcome="reported") == 2
    done = running.notify("doctor", "--json")
    (check,) = [check for check in json.loads(done.stdout)["checks"] if check["part"] == "bounces"]
    assert (check["state"], check["found"].partition(" at ")[0]) == ("passed", "0 mails wait in the mailbox")
    for worker in running.workers.values():
        assert "far.example" not in worker.log_text()
