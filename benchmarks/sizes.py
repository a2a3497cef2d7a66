"""How much each benchmark does: enough for figures by default, a smoke test with --quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one run of all benchmarks."""

    repetitions: int = 3
    events: int = 200_000  # 1: of each program that is fast enough
    slow_events: int = 24_000  # 1: of plain Faust
    payments: int = 20_000  # 2
    users: int = 2_000  # 2 and 4
    rows: int = 1_000_000  # 3: ours
    stock_rows: int = 100_000  # 3: of stock Faust, which takes proportionally longer
    samples: int = 1_000  # 4
    per_second: int = 50  # 4
    new_broker_seconds: float = 90.0  # 4: not counted, the first time
    backlog: int = 100_000  # 4
    few_events: int = 200_000  # 5
    many_events: int = 2_000_000  # 5
    watchers: int = 200_000  # 4
    state_rows: int = 10_000_000  # 6
    mails: int = 20_000  # 7: ours; slower programs send fewer
    provider_messages: int = 3_000  # 8 and 9


QUICK = Sizes(
    repetitions=1,
    events=4_000,
    slow_events=1_000,
    payments=300,
    users=50,
    rows=5_000,
    stock_rows=1_000,
    samples=100,
    new_broker_seconds=0.0,
    backlog=1_000,
    few_events=4_000,
    many_events=20_000,
    watchers=2_000,
    state_rows=20_000,
    mails=400,
    provider_messages=200,
)
