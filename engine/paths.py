"""Paths as people write them: `~` and `${VAR}` are filled in. Imports nothing of the engine."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand_path(text: str, name: str) -> str:
    """`text` with `~` and `$VAR` or `${VAR}` filled in; `name` is what the user knows it by.

    Raises:
        ValueError: for a variable that is not set.
    """
    missing = [a or b for a, b in _VARIABLE.findall(text) if (a or b) not in os.environ]
    if missing:
        raise ValueError(f"{name}={text!r}: the environment variable {missing[0]} is not set")
    return os.path.expanduser(os.path.expandvars(text))
