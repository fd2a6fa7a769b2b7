"""Signals and clocks, in one process of its own group."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from engine.cluster import signals
from engine.cluster.signals import Due, Watch, Wishes
from engine.config import GKDConfig


def check_watch() -> None:
    cpu = torch.device("cpu")
    with Watch(GKDConfig(), cpu) as watch:
        assert watch.agree() == Due(False, None)
        assert watch.agree(Wishes(save=True, log=True)) == Due(True, None, log=True)
        assert watch.agree(Wishes(evaluate=True, end=True)) == Due(False, None, evaluate=True, end=True)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: watch._signal)
        os.kill(os.getpid(), signal.SIGTERM)  # within REPEAT_S: the same request, by another way
        time.sleep(0.1)
        assert watch.agree() == Due(True, "SIGUSR1")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was before

    with Watch(GKDConfig(save_minutes=0.001, max_minutes=0.004), cpu) as watch:
        assert watch.agree() == Due(False, None)
        time.sleep(0.08)
        assert watch.agree() == Due(True, None)
        watch.note_save()
        assert watch.agree() == Due(False, None)
        time.sleep(0.2)
        assert watch.agree() == Due(True, "max_minutes")


def check_repeated_signal(name: str, number: int, repeat_s: float) -> None:
    """In a forked child that would sleep on."""
    before = getattr(signals, name)
    setattr(signals, name, repeat_s)
    child = os.fork()
    if child == 0:
        with Watch(GKDConfig(), torch.device("cpu")):
            time.sleep(30)
        os._exit(0)
    time.sleep(0.3)
    os.kill(child, number)
    time.sleep(repeat_s + 0.2)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    setattr(signals, name, before)
    assert os.waitstatus_to_exitcode(status) == 128 + number


def check_thread() -> str:
    errors = []

    def enter() -> None:
        try:
            with Watch(GKDConfig(), torch.device("cpu")):
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return errors[0]


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.lengthy
def test_a_signal_stops_and_clocks_save_and_stop(ranks):
    ranks(1).run(check_watch)


def test_a_repeated_signal_ends_the_process(ranks):
    ranks(1).run(check_repeated_signal, "REPEAT_S", signal.SIGTERM, 0.3)
    ranks(1).run(check_repeated_signal, "REPEAT_INTERRUPT_S", signal.SIGINT, 0.3)


def test_only_the_main_thread_gets_signals(ranks):
    assert "main thread" in ranks(1).run(check_thread)[0]


@pytest.mark.parametrize("name", ["save_minutes", "max_minutes", "max_bad_steps"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0.*: must be positive"):
        GKDConfig(**{name: 0})
