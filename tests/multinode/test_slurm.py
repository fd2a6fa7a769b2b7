"""launch/slurm.sbatch under a real Slurm with two nodes: trains, and goes on after it was told to stop."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.library.runs import read_metrics, train_metrics, write_run_inputs
from tests.library.slurm import Slurm

NUM_STEPS, SAVE_STEPS = 40, 10


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    fields = write_run_inputs(folder) | {"max_steps": NUM_STEPS, "save_steps": SAVE_STEPS, "report_to": "wandb"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(slurm, recipe) -> Path:
    """A whole run on two nodes."""
    log = recipe.parent / "job.log"
    job = slurm.submit(log, ["train", str(recipe)])
    assert slurm.finish(job, deadline_s=120) == "COMPLETED", log.read_text()[-4000:]
    return recipe.parent / "run"


def test_sbatch_trains_on_two_nodes(finished, recipe):
    metrics, log = read_metrics(finished), (recipe.parent / "job.log").read_text()
    assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    assert log.count(f"step {NUM_STEPS}/{NUM_STEPS} | loss") == 1  # rank 0 alone
    manifest = json.loads((finished / "checkpoints" / f"step_{NUM_STEPS}" / "manifest.json").read_text())
    assert manifest["layout"]["world_size"] == 4


@pytest.mark.slow
def test_check_names_the_nodes(slurm, recipe, tmp_path):
    job = slurm.submit(tmp_path / "job.log", ["check", str(recipe)])
    assert slurm.finish(job, deadline_s=120) == "COMPLETED", (tmp_path / "job.log").read_text()[-4000:]
    assert "4 ranks: ranks 0, 1 on n1; ranks 2, 3 on n2" in (tmp_path / "job.log").read_text()


def stop_and_finish(slurm: Slurm, recipe: Path, folder: Path, words: list[str]) -> tuple[int, bool]:
    """Start a job, stop it in the middle with the command `words` and its number, let Slurm finish it; returns the step
    at which it stopped, and whether it saved a checkpoint there."""
    log = folder.with_suffix(".log")
    job = slurm.submit(log, ["train", str(recipe), "--output_dir", str(folder)])
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < SAVE_STEPS + 2:
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.05)
    slurm.run([*words, job])
    while slurm.state(job) == "RUNNING":
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)
    stopped_at = read_metrics(folder)[-1]["step"]
    is_saved = (folder / "checkpoints" / f"step_{stopped_at}" / "manifest.json").exists()
    assert slurm.finish(job, deadline_s=150) == "COMPLETED", log.read_text()[-4000:]
    return stopped_at, is_saved


def went_on(folder: Path, finished: Path) -> bool:
    """Whether the run has the steps and figures of one that was never stopped, and is one run in wandb."""
    run_ids = {path.name.rsplit("-", 1)[-1] for path in (folder / "wandb").glob("offline-run-*")}
    return train_metrics(folder) == train_metrics(finished) and len(run_ids) == 1


@pytest.fixture(scope="module")
def signalled(slurm, recipe, tmp_path_factory) -> tuple[Path, int, bool]:
    """A job that got, in the middle, the signal which Slurm sends before the time limit."""
    folder = tmp_path_factory.mktemp("signalled") / "run"
    return folder, *stop_and_finish(slurm, recipe, folder, ["scancel", "--batch", "--signal=USR1"])


def test_the_time_limits_signal_requeues_and_the_job_goes_on(finished, signalled):
    folder, stopped_at, _ = signalled
    assert stopped_at < NUM_STEPS and went_on(folder, finished)


def test_the_signal_saves_where_the_run_stands(signalled):
    _, _, is_saved = signalled
    assert is_saved


@pytest.mark.slow
def test_a_requeued_job_goes_on(slurm, finished, recipe, tmp_path):
    stopped_at, _ = stop_and_finish(slurm, recipe, tmp_path / "run", ["scontrol", "requeue"])
    assert stopped_at < NUM_STEPS and went_on(tmp_path / "run", finished)
