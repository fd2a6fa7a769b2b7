"""How a process becomes a rank, and how a script that says nothing of it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.library.paths import ROOT

# Handlers run from the last one registered to the first.
SCRIPT = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print("in a group at the end:", dist.is_initialized()))
from engine.cluster.startup import init_distributed
init_distributed(60)
assert dist.is_initialized()
"""


@pytest.mark.parametrize("last_line,is_left", [("", False), ("1 / 0", True)])
def test_a_script_leaves_the_group_when_it_ends_well(last_line, is_left):
    done = subprocess.run([sys.executable, "-c", SCRIPT + last_line], cwd=ROOT, capture_output=True, text=True)
    assert f"in a group at the end: {is_left}" in done.stdout, done.stderr
    assert done.returncode == int(is_left)
