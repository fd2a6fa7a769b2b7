"""A loopback interface of one's own, so that the bytes counted on it are those of the ranks alone.

Linux and root only: a network namespace, which ends with the last process in it. It knows nothing of ranks or losses.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCSIFFLAGS = 0x8914  # linux/sockios.h
IFF_UP = 0x1  # linux/if.h


def why_not_private() -> str | None:
    """Why a process here cannot have a loopback of its own; None where it can."""
    try:
        with private_loopback():
            return None
    except OSError as error:
        return f"no network namespace of its own ({error.strerror}; it needs Linux and root)"


@contextmanager
def private_loopback() -> Iterator[None]:
    """Processes started inside the block by this thread share a network of their own, which is one loopback.

    Raises:
        OSError: where this process may not make one.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _call("unshare", CLONE_NEWNET)
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
            yield
        finally:
            _call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)


def _call(name: str, *arguments: int) -> None:
    """A function of the C library that returns -1 where it fails; Python has these two from 3.12 on."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except AttributeError as error:
        raise OSError(0, f"this system has no {name}") from error
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
