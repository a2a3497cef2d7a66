"""Spans of time as people write them."""

from __future__ import annotations

import re

import typer

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def seconds_of(text: str, option: str) -> int:
    """Return a span such as 90s, 15m, 12h or 7d in seconds, at least 1. Raises BadParameter, naming `option`."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no span such as 90s, 15m, 12h or 7d", param_hint=option)
    return int(found[1]) * _UNIT_SECONDS[found[2]]
