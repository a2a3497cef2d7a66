"""What is said of a forgotten user's remains follows from what topics keep and from the settings."""

from __future__ import annotations

import re

import pytest

from schemas.topics import Lane
from streams.erasure import Remains, remains
from streams.provisioning import _config
from streams.settings import Settings
from streams.topics import DAY_SECONDS, specs

KEPT = {spec.name: _config(spec, 3) for spec in specs()}


def how_long(where: str, **env: str) -> str:
    (found,) = [each.how_long for each in remains(Settings.from_env(env)) if each.where == where]
    return found


@pytest.mark.parametrize(
    "each", [each for each in remains(Settings.from_env({})) if each.where.startswith("`")], ids=lambda each: each.where
)
def test_every_topic_that_is_named_is_kept_as_long_as_it_says(each: Remains) -> None:
    _, where, long = each
    names = [name for name in re.findall(r"`([^`]+)`", where) if name != "requests.*"]
    names += [f"requests.{lane}" for lane in Lane] if "`requests.*`" in where else []
    assert names
    for name in names:
        config = KEPT[name]
        if "delete" in config["cleanup.policy"]:
            assert long == f"{int(config['retention.ms']) // 1000 // DAY_SECONDS} days", name
        else:
            assert config["cleanup.policy"] == "compact"
            assert re.match(r"1 day at most where others|until it is lifted", long), name
            assert config["max.compaction.lag.ms"] == str(DAY_SECONDS * 1000)


def test_what_settings_say_is_told_by_them() -> None:
    assert how_long("PostgreSQL").startswith("13 months")
    assert how_long("PostgreSQL", NOTIFY_STORE_MONTHS="3").startswith("3 months")
    references = "the table `references` of `signals`"
    assert how_long(references).startswith("30 days")
    assert how_long(references, NOTIFY_REFERENCE_DAYS="1").startswith("1 day (")
    assert how_long(references, NOTIFY_REFERENCE_DAYS="0.5").startswith("0.5 days")


def test_nothing_that_may_hold_an_address_is_left_out() -> None:
    told = " ".join(each.where for each in remains(Settings.from_env({})))
    for place in ("`requests.*`", "`dead`", "`control`", "`provider-refs`", "`references`", "`Not-understood`", "`parked`"):
        assert place in told
