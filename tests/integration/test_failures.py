"""A run that breaks says so once, with the traceback of the rank that broke it, last; and `check` on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from engine.check import CHECKPOINT_BYTES
from engine.config.source import ModelSource
from engine.models.backbone import count_parameters
from tests.library.launch import launcher, run
from tests.library.runs import write_run_inputs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    fields = write_run_inputs(folder) | {"max_steps": 2, "timeout_s": 30}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_failing_ranks_traceback_comes_once_and_last(recipe, tmp_path, rank):
    words = ["--module", "tests.integration.failing", "train", "--config", str(recipe), "--output_dir", str(tmp_path)]
    done = run([*launcher("deepspeed", 2), *words], FAIL=str(rank))
    assert done.returncode != 0
    assert done.stdout.count("Traceback (most recent call last)") == 1 == done.stdout.count("KeyError: 'the bug'")
    assert f"rank {rank} on " in done.stdout
    after = done.stdout.split("KeyError: 'the bug'")[1]
    assert "step" not in after.replace("_step", "") and "Error" not in after  # the launcher's own lines follow
    log = (tmp_path / "logs" / "rank_1.log").read_text()
    assert "Traceback (most recent call last)" in log


def test_check_on_one_machine_and_the_size_of_a_checkpoint(recipe):
    done = run([*launcher("deepspeed", 2), "--module", "engine", "check", "--config", str(recipe)])
    assert done.returncode == 0 and "all alike: fit to run" in done.stdout, done.stdout[-3000:]
    assert "inside hosts  all-reduce of" in done.stdout and "across hosts" not in done.stdout
    done = run([*launcher("deepspeed", 2), "--module", "engine", "train", "--config", str(recipe)])
    assert done.returncode == 0, done.stdout[-3000:]
    checkpoint = recipe.parent / "run" / "checkpoints" / "step_2"
    written = sum(path.stat().st_size for path in checkpoint.glob("*optim_states.pt"))
    expected = CHECKPOINT_BYTES * count_parameters(ModelSource(str(recipe.parent / "student")))
    assert written == pytest.approx(expected, rel=0.15)
