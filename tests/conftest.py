"""Fixtures that several suites share."""

import os
import tempfile

import pytest

from tests.library.ranks import Ranks

_cache = tempfile.TemporaryDirectory(prefix="datasets_")
_worlds: dict[int, Ranks] = {}


def pytest_configure():
    """Token ids that tests write go where no run looks for them; `datasets` reads the variable when it is imported."""
    os.environ["HF_DATASETS_CACHE"] = _cache.name
    pytest.register_assert_rewrite("tests.library.runs")  # its asserts show the values, as a test's do


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)`: n rank processes, started once per session and restarted after a check that hung."""

    def get(world_size: int) -> Ranks:
        if world_size not in _worlds or not _worlds[world_size].alive:
            _worlds[world_size] = Ranks(world_size)
        return _worlds[world_size]

    yield get
    for world in _worlds.values():
        world.stop()
    _worlds.clear()
