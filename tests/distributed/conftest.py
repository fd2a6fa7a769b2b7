"""Ranks for the tests of this folder."""

import pytest

from tests.library.ranks import worlds


@pytest.fixture(scope="package")
def ranks():
    yield from worlds()
