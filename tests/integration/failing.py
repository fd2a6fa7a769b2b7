"""`engine`, with rank FAIL raising in its second step."""

from __future__ import annotations

import os
import sys

from transformers import TrainerCallback

from engine.cli import main
from tests.library.forked import add_callbacks


class Fail(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and os.environ["RANK"] == os.environ["FAIL"]:
            raise KeyError("the bug")


if __name__ == "__main__":
    add_callbacks([Fail()])
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
