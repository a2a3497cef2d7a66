"""The long form of an outage of one of two providers, plotted: docs/outage.png."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
import pytest

from channels.simulators.script import Script
from streams.embedded.stack import Stack
from tests.outage import FAILING, HELPING, Outage, Phase, play, two_providers

mpl.use("Agg")
from matplotlib import pyplot as plt

# docs/outage.png was drawn from a run of the default length
SECONDS = float(os.environ.get("OUTAGE_SECONDS", "60"))
PER_SECOND = int(os.environ.get("OUTAGE_PER_SECOND", "500"))
MAX_OPEN = 256  # a call's place is free when its end is in Kafka: 32 would carry half as many a second
PICTURE = Path(os.environ.get("OUTAGE_PICTURE", str(Path(__file__).parents[2] / "docs" / "outage.png")))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_an_outage_under_load_loses_nothing_and_moves_the_load(stack: Stack, tmp_path: Path) -> None:
    phases = [
        Phase(name="well", seconds=SECONDS / 3, script=Script(latency=0.005, jitter=0.01)),
        Phase(name="fails always", seconds=SECONDS, script=Script(unavailable=1)),
        Phase(name="fails 30%", seconds=SECONDS, script=Script(latency=0.005, jitter=0.01, refuse=0.3)),
        Phase(name="well again", seconds=SECONDS, script=Script(latency=0.005, jitter=0.01)),
    ]
    with two_providers(stack, tmp_path, max_open=MAX_OPEN) as (made, providers):
        seen = play(made, providers, phases, per_second=PER_SECOND, settle_seconds=300)
    draw(seen, PICTURE)
    late = sorted(seen.lateness().values())
    print(
        f"{len(seen.sent_at)} mails, {PER_SECOND}/s: lost {seen.lost()}, doubled {seen.doubled()}, "
        f"late p50 {late[len(late) // 2]:.2f} s, p99 {late[len(late) * 99 // 100]:.2f} s, most {late[-1]:.2f} s"
    )
    for name, begin, end in seen.phases:
        calls = sum(1 for at in seen.calls[FAILING] if begin <= at < end)
        print(f"{name}: share of the failing provider {seen.share_taken(begin, end):.1%}, calls to it {calls}")
    assert seen.lost() == 0
    assert seen.doubled() == 0


def draw(seen: Outage, picture: Path) -> None:
    """Draw share, circuit, calls and lateness over time."""
    figure, (shares, calls, lateness) = plt.subplots(3, 1, figsize=(10, 8), sharex=True, layout="constrained")
    end = max(end for _, _, end in seen.phases)
    for axes in (shares, calls, lateness):
        for index, (_, begin, until) in enumerate(seen.phases):
            axes.axvspan(begin, until, color="#f3f4f6" if index % 2 else "#ffffff", zorder=0)
        axes.grid(visible=True, alpha=0.3)
    for name, begin, until in seen.phases:
        shares.text((begin + until) / 2, 1.04, name, ha="center", fontsize=9)
    seconds = range(int(end) + 1)
    shares.plot(
        seconds, [seen.share_taken(at, at + 1) for at in seconds], color="#1d4ed8", label="share of mails taken by the failing provider"
    )
    shares.step(
        [at for at, _, _ in seen.shares], [out for _, _, out in seen.shares], color="#dc2626", alpha=0.5, label="its circuit is open"
    )
    shares.set_ylim(-0.02, 1.15)
    shares.legend(loc="center", fontsize=8)
    for name, colour, label in ((FAILING, "#dc2626", "failing"), (HELPING, "#15803d", "helping")):
        calls.plot(
            seconds, [sum(1 for at in seen.calls[name] if second <= at < second + 1) for second in seconds], color=colour, label=label
        )
    calls.set_ylabel("calls a second")
    calls.legend(loc="center right", fontsize=8)
    late = seen.lateness()
    points = sorted((seen.sent_at[who], seconds_late) for who, seconds_late in late.items())
    lateness.plot([at for at, _ in points], [value for _, value in points], ".", markersize=1, color="#374151")
    lateness.set_yscale("log")
    lateness.set_ylabel("seconds from publishing\nto its provider")
    lateness.set_xlabel("seconds")
    figure.suptitle("One of two providers fails, fails in part, and recovers")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
