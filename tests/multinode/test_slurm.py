"""launch/slurm.sbatch under a real Slurm with two nodes: trains, and goes on after it was told to stop."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.models import write_run_inputs
from tests.multinode.slurm import Slurm, why_not

NUM_STEPS = 60


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm to test on: {reason}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    fields = write_run_inputs(folder) | {"max_steps": NUM_STEPS, "save_steps": 10, "report_to": "wandb"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(slurm, recipe) -> Path:
    """A whole run on two nodes."""
    log = recipe.parent / "job.log"
    job = slurm.submit(log, ["train", str(recipe)])
    assert slurm.finish(job, deadline_s=120) == "COMPLETED", log.read_text()[-4000:]
    return recipe.parent / "run"


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_metrics(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k == "step" or k.startswith("train/")} for line in read_metrics(folder)]


def test_sbatch_trains_on_two_nodes(finished, recipe):
    metrics, log = read_metrics(finished), (recipe.parent / "job.log").read_text()
    assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    assert log.count(f"step {NUM_STEPS}/{NUM_STEPS} |") == 1  # rank 0 alone
    manifest = json.loads((finished / "checkpoints" / f"step_{NUM_STEPS}" / "manifest.json").read_text())
    assert manifest["world_size"] == 4


def test_check_names_the_nodes(slurm, recipe, tmp_path):
    job = slurm.submit(tmp_path / "job.log", ["check", str(recipe)])
    assert slurm.finish(job, deadline_s=120) == "COMPLETED", (tmp_path / "job.log").read_text()[-4000:]
    assert "4 ranks: ranks 0, 1 on n1; ranks 2, 3 on n2" in (tmp_path / "job.log").read_text()


@pytest.mark.parametrize("stop", ["time limit", "requeue"])
def test_a_stopped_job_goes_on_to_the_same_losses(slurm, finished, recipe, tmp_path, stop):
    """The signal that Slurm sends before the time limit, or `scontrol requeue`, in the middle of a run."""
    folder, log = tmp_path / "run", tmp_path / "job.log"
    job = slurm.submit(log, ["train", str(recipe), "--output_dir", str(folder)])
    end = time.monotonic() + 120
    while not (folder / "checkpoints" / "step_10" / "manifest.json").exists():
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.05)
    if stop == "requeue":
        slurm.run(["scontrol", "requeue", job])
    else:
        slurm.run(["scancel", "--batch", "--signal=USR1", job])
    while slurm.state(job) == "RUNNING":
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)
    stopped_at = read_metrics(folder)[-1]["step"]
    assert slurm.finish(job, deadline_s=150) == "COMPLETED", log.read_text()[-4000:]
    assert stopped_at < NUM_STEPS
    assert train_metrics(folder) == train_metrics(finished)
    assert len({path.name.rsplit("-", 1)[-1] for path in (folder / "wandb").glob("offline-run-*")}) == 1
