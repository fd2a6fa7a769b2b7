"""The command that started the process, as records of a run show it: without the secrets on it."""

from __future__ import annotations

import shlex
import sys

from engine.config import GKDConfig

HIDDEN = "<hidden>"


def command_line() -> str:
    return shlex.join(hide_secrets(sys.orig_argv))


def hide_secrets_from_libraries() -> None:
    """Take the secrets out of `sys.argv`, which wandb writes down by itself; whoever parses it has done so."""
    sys.argv[1:] = hide_secrets(sys.argv[1:])


def hide_secrets(words: list[str]) -> list[str]:
    """The words of a command, those that follow the flag of a secret field replaced."""
    flags = {f"--{name.replace('_', sign)}" for name, o in GKDConfig.options().items() if o.is_secret for sign in "_-"}
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, _ = word.partition("=")
        shown.append(HIDDEN if before in flags else f"{flag}={HIDDEN}" if equals and flag in flags else word)
    return shown
