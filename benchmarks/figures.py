"""Repeated measurements as figures: median and range, ratios of one run, and whether a target is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

Format = Callable[[float], str]
# by name: they are easily taken for an x and a hyphen
TIMES, TO = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured, once a repetition."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    def show(self, form: Format) -> str:
        """Return median [least to most]; the median alone when there is but one."""
        if len(self.values) == 1:
            return form(self.values[0])
        return f"{form(self.median)} [{form(min(self.values))}{TO}{form(max(self.values))}]"


def figure(values: Sequence[float]) -> Figure:
    """Return the figure of `values`."""
    return Figure(tuple(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Return ours divided by theirs, repetition by repetition."""
    return Figure(tuple(a / b for a, b in zip(ours, theirs, strict=True)))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of `values` that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1_000_000) * len(ordered) // 1_000_000) - 1))]


def whole(value: float) -> str:
    """Return a number with thousands separated."""
    return f"{value:,.0f}"


def tenth(value: float) -> str:
    """Return a number with one decimal."""
    return f"{value:,.1f}"


def hundredth(value: float) -> str:
    """Return a number with two decimals."""
    return f"{value:.2f}"


def times(value: float) -> str:
    """Return a ratio."""
    return f"{value:.1f}{TIMES}" if value >= 10 else f"{value:.2f}{TIMES}"


def verdict(*, is_met: bool) -> str:
    """Return how a target is reported."""
    return "met" if is_met else "**not met**"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
