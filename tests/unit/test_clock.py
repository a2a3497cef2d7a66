"""By how much our clock differs from the registry's."""

from __future__ import annotations

import pytest

from streams.clock import difference_seconds

DATE, AT = "Sun, 06 Nov 1994 08:49:37 GMT", 784111777.0


@pytest.mark.parametrize("ours", [-7_200, -6, 0, 6, 7_200])
def test_the_difference_is_told_to_the_second(ours: int) -> None:
    found = difference_seconds(DATE, asked_at=AT + 0.4 + ours, answered_at=AT + 0.6 + ours)
    assert found is not None
    assert abs(found - ours) < 1


@pytest.mark.parametrize("date", [None, "", "yesterday", "Sun, 99 Nov 1994 08:49:37 GMT"])
def test_without_a_date_nothing_is_told(date: str | None) -> None:
    assert difference_seconds(date, asked_at=AT, answered_at=AT) is None
