"""When to save and when to stop: signals, wall-clock limits, and how all ranks come to one answer.

Knows ranks and clocks; nothing of models or checkpoints.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine.config import GKDConfig

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Launchers forward what the scheduler has already sent to every process: two signals this close are one request. Who
# presses Ctrl-C twice means it; launchers pass that on within a moment.
REPEAT_S = 2.0
REPEAT_INTERRUPT_S = 1.0
TIME_IS_UP = 255  # beside signal numbers
MAX_MINUTES = "max_minutes"


@dataclass(frozen=True)
class Wishes:
    """What this rank wants after a step, whatever the others want."""

    save: bool = False
    evaluate: bool = False
    log: bool = False
    end: bool = False


NO_WISHES = Wishes()


@dataclass(frozen=True)
class Due:
    """What is due after a step, the same on every rank: what any of them wishes.

    Attributes:
        stop: why the run is to break off here, or None.
        end: whether this step is to be the run's last, with all that follows the last one.
    """

    save: bool
    stop: str | None
    evaluate: bool = False
    log: bool = False
    end: bool = False

    @property
    def by_signal(self) -> bool:
        """Whether the run is to end because somebody asked, rather than as its time is up."""
        return self.stop not in (None, MAX_MINUTES)


class Watch:
    """Listens for `STOP_SIGNALS` inside its `with` block, and watches `save_minutes` and `max_minutes`.

    The first signal asks the run to stop at the end of its step; a second one, not too close to it, ends the
    process at once, with exit status 128 + signal, even where it hangs in a collective. Python runs signal handlers
    between bytecodes of the main thread only, which such a hang never reaches: a thread reads the signals from the
    interpreter's wake-up socket instead.
    """

    def __init__(self, config: GKDConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._started_s = self._saved_s = time.monotonic()
        self._signal, self._signal_s = 0, 0.0

    def __enter__(self) -> Watch:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("train() must run in the main thread: Python delivers signals nowhere else")
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # The socket is written only for signals that have a Python handler.
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        self._writer.close()  # which ends the thread

    def _listen(self) -> None:
        with self._reader:
            while received := self._reader.recv(1):
                if received[0] in STOP_SIGNALS:
                    self._receive(received[0])

    def _receive(self, number: int) -> None:
        now_s = time.monotonic()
        if not self._signal:
            self._signal, self._signal_s = number, now_s
            logger.warning(
                "%s: stopping after the step or evaluation at work, with a checkpoint; a second one ends at once",
                signal.Signals(number).name,
            )
        elif now_s - self._signal_s >= (REPEAT_INTERRUPT_S if number == signal.SIGINT else REPEAT_S):
            os._exit(128 + number)

    def note_save(self) -> None:
        """A checkpoint was written: `save_minutes` counts from here."""
        self._saved_s = time.monotonic()

    def agree(self, wishes: Wishes = NO_WISHES) -> Due:
        """What is due now: wishes and signals of any rank, times on rank 0's clock. One small collective.

        All ranks must call.
        """
        now_s, config = time.monotonic(), self.config
        is_clock = dist.get_rank() == 0
        is_up = is_clock and config.max_minutes is not None and now_s - self._started_s >= 60 * config.max_minutes
        save = is_clock and config.save_minutes is not None and now_s - self._saved_s >= 60 * config.save_minutes
        own = [max(self._signal, TIME_IS_UP * is_up), save or wishes.save, wishes.evaluate, wishes.log, wishes.end]
        flags = torch.tensor(own, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        number, *wanted = flags.tolist()
        save, evaluate, log, end = map(bool, wanted)
        stop = None
        if number:
            stop = MAX_MINUTES if number == TIME_IS_UP else signal.Signals(number).name
        return Due(save or stop is not None, stop, evaluate, log, end)
