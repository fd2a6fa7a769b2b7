"""Fixtures that several suites share."""

import pytest

from tests.ranks import Ranks

_worlds: dict[int, Ranks] = {}


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
