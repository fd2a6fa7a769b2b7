"""Paths as people write them: `~` and `${VAR}` are filled in. Imports nothing of the engine."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand_path(text: str, name: str) -> str:
    """`text` with `~` and `$VAR` or `${VAR}` filled in; `name` is what the user knows it by.

    Raises:
        ValueError: for a variable that is not set, or a user that is not there.
    """
    missing = [a or b for a, b in _VARIABLE.findall(text) if (a or b) not in os.environ]
    if missing:
        raise ValueError(f"{name}={text!r}: the environment variable {missing[0]} is not set")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~"):
        raise ValueError(f"{name}={text!r}: there is no user {expanded[1:].split('/')[0]!r}")
    if "${" in expanded:
        raise ValueError(f"{name}={text!r}: a variable is written ${{NAME}}")
    return expanded
