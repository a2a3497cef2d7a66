"""The pages of figures say what was measured, and the plan of docs/scaling.md follows from it, whatever was measured."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pipeline, report, scaling
from benchmarks.figures import TO
from benchmarks.state import KEPT, TABLES
from streams.topics import DAY_SECONDS
from streams.topology import all_topics

SCALING = report.REPORT.with_name("scaling.md")


@pytest.fixture
def results() -> dict[str, Any]:
    return report.load(report.RESULTS)


def with_everything(results: dict[str, Any]) -> dict[str, Any]:
    """Return results of this release, whatever release the stored ones are of."""
    found = copy.deepcopy(results)
    for run in found["2"]["result"]["runs"]:
        run["cpu_us_per_notification"]["signals"] = 300.0
        run["log_bytes_by_topic"] = {"decisions": 1_000.0, "requests.normal": 100.0, "provider-refs": 10.0, "router.decide.changelog": 1.0}
    table = found["6"]["result"]["tables"]["ledger"]
    found["6"]["result"]["tables"]["references"] = {**table, "rss_bytes": 2 * table["rss_bytes"]}
    return found


def without(results: dict[str, Any]) -> dict[str, Any]:
    """Return results of a release that measured less."""
    found = with_everything(results)
    for run in found["2"]["result"]["runs"]:
        del run["cpu_us_per_notification"]["signals"], run["log_bytes_by_topic"]
    del found["6"]["result"]["tables"]["references"]
    return found


def plans(results: dict[str, Any]) -> list[scaling.Plan]:
    return scaling.plans(results["2"]["result"], results["6"]["result"])


def test_the_pages_say_what_was_measured(results: dict[str, Any]) -> None:
    told = "run `python -m benchmarks --render`"
    assert report.REPORT.read_text("utf-8") == report.render(results), told
    page = SCALING.read_text("utf-8")
    assert page == scaling.rendered(page, results), told


def test_what_is_not_measured_is_said_and_what_is_measured_is_exact(results: dict[str, Any]) -> None:
    exact, bounded = scaling.page(with_everything(results)), scaling.page(without(results))
    assert "not measured" not in exact
    assert "estimated" not in exact
    assert "| cores of signals | not measured |" in bounded
    assert "references of 30 days (estimated)" in bounded
    for page, is_bounded in ((exact, False), (bounded, True)):
        (log,) = [line for line in page.splitlines() if line.startswith("| log,")]
        assert (TO in log) is is_bounded
    assert "`signals` did not run" in report.render(without(results))
    assert "`references` was not measured" in report.render(without(results))
    assert "300" in next(line for line in report.render(with_everything(results)).splitlines() if line.startswith("| signals "))


def test_the_log_is_weighed_by_what_each_topic_keeps(results: dict[str, Any]) -> None:
    kept = {spec.name: (spec.retention_seconds or spec.forgets_seconds or DAY_SECONDS) / DAY_SECONDS for spec in all_topics()}
    byte_days = scaling.log_byte_days(with_everything(results)["2"]["result"])
    expected = 1_000 * kept["decisions"] + 100 * kept["requests.normal"] + 10 * kept["provider-refs"] + kept["router.decide.changelog"]
    assert (byte_days.least, byte_days.most) == pytest.approx((expected, expected))
    assert (kept["decisions"], kept["requests.normal"], kept["router.decide.changelog"]) == (90, 14, 1)


def test_the_log_is_told_by_topic_and_of_one_environment_only(tmp_path: Path) -> None:
    for partition, size in (
        ("notify.bench1.requests.normal-0", 3),
        ("notify.bench1.requests.normal-11", 4),
        ("notify.bench1.provider-refs-0", 5),
        ("notify.bench11.provider-refs-0", 100),
        ("payments.bench1.events-0", 100),
    ):
        (tmp_path / "kafka" / partition).mkdir(parents=True)
        (tmp_path / "kafka" / partition / "00000000000000000000.log").write_bytes(bytes(size))
        (tmp_path / "kafka" / partition / "00000000000000000000.index").write_bytes(bytes(100))
    assert pipeline.log_bytes(tmp_path, "bench1") == {"requests.normal": 7, "provider-refs": 5}


def test_references_are_in_the_plan_whether_measured_or_not(results: dict[str, Any]) -> None:
    measured, estimated = plans(with_everything(results))[0], plans(without(results))[0]
    state = with_everything(results)["6"]["result"]
    rows = 1_000 * KEPT["references"].seconds
    assert measured.state_gib["references"] == pytest.approx(rows * state["tables"]["references"]["rss_bytes"] / state["rows"] / 2**30)
    payload = sum(map(len, next(TABLES["references"](1))))
    assert estimated.state_gib["references"] > rows * payload / 2**30
    for plan in (measured, estimated):
        assert plan.memory_gib > sum(plan.state_gib.values()) > plan.state_gib["references"]
        assert plan.workers * scaling.GIB_OF_A_MACHINE >= plan.memory_gib


def test_a_plan_for_production_can_lose_a_machine_and_grows_with_the_rate(results: dict[str, Any]) -> None:
    found = plans(with_everything(results))
    for plan in found:
        assert plan.brokers >= 3
        assert plan.workers >= 2
        assert plan.databases >= 1
        assert plan.partitions % 24 == 0
    for less, more in itertools.pairwise(found):
        assert less.dollars.most < more.dollars.least
        assert less.partitions <= more.partitions


def test_the_two_pages_count_the_same_rows(results: dict[str, Any]) -> None:
    """Section 6 of docs/performance.md and the plan for 10,000 a second."""
    plan = plans(with_everything(results))[1]
    (line,) = [line for line in report.render(with_everything(results)).splitlines() if line.startswith("| **together**")]
    assert f"| {sum(plan.state_gib.values()) / 1024:.2f} TiB |" in line
