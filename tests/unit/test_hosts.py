"""What a host tells the others of itself, with interfaces named as NCCL and gloo read them; a store that is silent."""

import time

import pytest

from engine import hosts


@pytest.mark.parametrize(
    "backend,wanted,interface",
    [("gloo", "lo", "lo"), ("gloo", "ib7,lo", "lo"), ("nccl", "l", "lo"), ("nccl", "=lo", "lo"), ("gloo", "l", ""),
     ("nccl", "=l", ""), ("nccl", "^lo", "its default interface"), ("gloo", "", "its default interface")],
)  # fmt: skip
def test_interfaces_are_chosen_as_the_backend_does(monkeypatch, backend, wanted, interface):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(f"{backend.upper()}_SOCKET_IFNAME", wanted)
    record = hosts.describe_host(backend)
    assert record["interface"] == interface
    assert bool(record["problem"]) == (interface == "")
    if record["problem"]:
        assert f"{backend.upper()}_SOCKET_IFNAME={wanted}: {record['host']} has no such" in record["problem"]
        assert "lo 127.0.0.1" in record["problem"]


def test_a_launcher_that_sets_half_of_the_variables_is_told(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK is set and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        hosts.meet("gloo", 1)


def test_nobody_waits_for_a_store_that_does_not_answer():
    started = time.monotonic()
    assert hosts.bounded(lambda: time.sleep(30), 0.2) is None
    assert time.monotonic() - started < 5
    assert hosts.bounded(lambda: 7, 5) == 7
