"""How providers' options are read (`ProviderConfig.option`): each function raises ValueError with the end of a sentence."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

E = TypeVar("E", bound=StrEnum)


class Switch(StrEnum):
    """Whether something is wanted."""

    YES = "yes"
    NO = "no"


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return what reads a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or not low <= int(text) <= high:
            raise ValueError(f"is not a whole number from {low} to {high}")
        return int(text)

    return parse


def one_of(kind: type[E]) -> Callable[[str], E]:
    """Return what reads a member of `kind` by its value."""

    def parse(text: str) -> E:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"is none of {', '.join(kind)}") from None

    return parse


def trust_in(file: str) -> ssl.SSLContext:
    """Return how servers are trusted by the authorities in a PEM file."""
    if not Path(file).is_file():
        raise ValueError("is not a file")
    try:
        return ssl.create_default_context(cafile=file)
    except (ssl.SSLError, OSError):
        raise ValueError("is no file of certificates in PEM") from None
