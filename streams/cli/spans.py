"""Spans of time, and moments, as people write them."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import typer

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def seconds_of(text: str, option: str) -> int:
    """Return a span such as 90s, 15m, 12h or 7d in seconds, at least 1. Raises BadParameter, naming `option`."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no span such as 90s, 15m, 12h or 7d", param_hint=option)
    return int(found[1]) * _UNIT_SECONDS[found[2]]


def moment_of(text: str, option: str, *, now: datetime) -> datetime:
    """Return a moment, given as a span before `now` or in RFC 3339 with its offset. Raises BadParameter, naming `option`."""
    if re.fullmatch(r"[0-9]+[smhd]", text.strip()):
        return now - timedelta(seconds=seconds_of(text, option))
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        problem = f"{text!r} is neither a span such as 15m or 7d nor a time such as 2026-11-23T08:00:00Z"
        raise typer.BadParameter(problem, param_hint=option)
    return moment
