"""What is left of a user who was forgotten, where and how long: for docs/erasure.md and for whoever forgets him."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from schemas import topics
from streams.bounces import ASIDE
from streams.provisioning import COMPACTION
from streams.settings import Settings
from streams.topics import DAY_SECONDS, specs


class Remains(NamedTuple):
    """Something that is left. Names of topics, tables and settings are in backticks."""

    what: str
    where: str
    how_long: str


def remains(settings: Settings) -> Iterator[Remains]:
    """Yield what is left of a user, by what topics keep and `settings` say. PostgreSQL and `signals` go by their own settings."""
    yield Remains("his user id, ids of events, orders and payments, statuses, times", "`decisions`, `status`", _kept(topics.DECISIONS))
    months = f"{settings.store_months} months, the current one included (`NOTIFY_STORE_MONTHS` of `store`)"
    yield Remains("the same", "PostgreSQL", months)
    yield Remains("the same of his newest notifications", "the tables of `views`", "until newer ones push them out")
    yield Remains("other services' events of him: readable", "the topics of payments and inventory", "theirs to say: not erased from here")
    yield Remains("the same: his actions, and events whose schema was not known at first", "`user-actions`, `parked`", _kept(topics.PARKED))
    yield Remains(
        "what they said of him (a payment's amount and method; an action's code, device and place) before he had a key, and requests that "
        "others publish without sealing them: readable",
        "`requests.*`",
        _kept(topics.USER_ACTIONS),
    )
    yield Remains("the same, where it could not be decoded or decided: readable", "`dead`", _kept(topics.DEAD))
    yield Remains(
        "which mails and text messages were his, with a keyed hash of his address", "`provider-refs`", _kept(topics.PROVIDER_REFS)
    )
    days = f"{_days(settings.reference_seconds)} (`NOTIFY_REFERENCE_DAYS` of `signals`), and until later ones come"
    yield Remains("the same", "the table `references` of `signals`", days)
    yield Remains(
        "a keyed hash of his address, where nothing may be sent to it any more",
        "`control`",
        "until it is lifted: `notify suppress ADDRESS --lift`",
    )
    yield Remains(
        "bounces that were not understood: they may hold his address and the mail",
        f"the folder `{ASIDE}` of the mailbox of bounces",
        "until you delete them: nobody else does",
    )
    lag = _days(int(COMPACTION["max.compaction.lag.ms"]) / 1000)
    yield Remains(
        "his key (wrapped with `NOTIFY_SEAL_KEY`) and sealed rows, deleted but not yet cleaned up",
        "`keys`, `preferences`, `watches`",
        f"{lag} at most where others' rows are written to the partition, else until one is",
    )
    yield Remains("mails that were delivered", "his mailbox and the mail servers on the way", "not ours")
    yield Remains("keys and rows in backups", "your backups of `keys`", "until you delete them: such a backup brings him back")


def _kept(topic: str) -> str:
    (spec,) = [spec for spec in specs() if spec.name == topic]
    return _days(spec.retention_seconds or spec.forgets_seconds or 0)


def _days(seconds: float) -> str:
    days = seconds / DAY_SECONDS
    return f"{days:g} day{'' if days == 1 else 's'}"
