"""Fixtures that every folder of tests may use, and the order of the folders."""

from pathlib import Path

import pytest
from hypothesis import settings

# how long an example takes is the machine's affair
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")

pytest_plugins = ["tests.stack_fixture"]

_FOLDERS = ("integration", "e2e", "contract", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders with long tests first: what is short fills the gap at the end when several processes share the files."""

    def place(item: pytest.Item) -> int:
        folder = Path(item.path).parent.name
        return _FOLDERS.index(folder) if folder in _FOLDERS else len(_FOLDERS)

    items.sort(key=place)
