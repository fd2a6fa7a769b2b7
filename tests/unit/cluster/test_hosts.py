"""What a host tells the others of itself, with interfaces named as NCCL and gloo read them; a store that is silent."""

import socket
import threading
import time

import pytest

from engine.cluster import hosts


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


SAY = {"nothing": b"", "something else": b"SSH-2.0-OpenSSH_9.2\r\n"}


@pytest.mark.parametrize("said", SAY)
def test_a_foreign_listener_is_given_up_in_time(said, monkeypatch):
    """What listens where rank 0 should be is not its store: it takes the connection and answers nothing, or noise."""
    monkeypatch.setattr(hosts, "CONNECT_SLACK_S", 0.5)
    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return
                held[-1].sendall(SAY[said])

        threading.Thread(target=serve, daemon=True).start()
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        started_s = time.monotonic()
        with pytest.raises(ConnectionError, match="rank 1 .* found no rank 0 at 127.0.0.1.*something else listen"):
            hosts.meet("gloo", 1)
        assert time.monotonic() - started_s < 6
    for connection in held:
        connection.close()
