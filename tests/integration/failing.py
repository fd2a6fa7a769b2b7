"""`engine`, with rank FAIL raising in its second step."""

from __future__ import annotations

import os
import sys

from engine.cli import main
from engine.trainer import GKDTrainer

step = GKDTrainer._train_step


def failing_step(self) -> dict[str, float]:
    if self.state.step == 1 and self.run.rank == int(os.environ["FAIL"]):
        raise KeyError("the bug")
    return step(self)


if __name__ == "__main__":
    GKDTrainer._train_step = failing_step
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
