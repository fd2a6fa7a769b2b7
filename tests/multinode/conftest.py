"""Fixtures of the tests on several hosts. A machine that cannot have them skips all, and says what it lacks."""

from __future__ import annotations

import signal

import pytest

from tests.library.network import Network, why_not


@pytest.fixture(scope="session", autouse=True)
def possible():
    """Hosts need root and Debian packages; launch/test.sh installs these where it can."""
    reason = why_not()
    if reason:
        pytest.skip(f"no hosts to test on: {reason}")


@pytest.fixture(scope="session", autouse=True)
def leave_nothing_behind():
    """A SIGTERM to pytest, such as that of `timeout`, ends it as Ctrl-C does: through the fixtures that clean up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """Two hosts, n1 and n2, with two slots each."""
    hosts = Network(tmp_path_factory.mktemp("network"))
    yield hosts
    hosts.close()
