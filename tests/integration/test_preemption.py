"""Signals, wall-clock limits, dead ranks and full disks: every rank ends as agreed, and the run can go on."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import TrainerCallback

from tests.library.forked import ForkedRun
from tests.library.launch import free_port, launcher
from tests.library.paths import ROOT
from tests.library.runs import checkpoints_in, metrics_of, read_metrics, weights_of, write_run_inputs

STEP_S = 0.15  # long enough for a signal to fall into a chosen step


class SlowSteps(TrainerCallback):
    """Lengthens every step."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


def slow_steps(seconds: float = STEP_S) -> list[TrainerCallback]:
    return [SlowSteps(seconds)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    fields = write_run_inputs(folder) | {"max_steps": 12, "save_steps": None, "global_batch_size": 4}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def start(recipe: Path, folder: Path, *flags: str, before=slow_steps) -> ForkedRun:
    words = ["train", "--config", str(recipe), "--output_dir", str(folder / "run"), *flags]
    return ForkedRun(2, words, folder / "logs", before)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run = start(recipe, folder, before=None)
    assert run.wait(120) == [0, 0], run.text()
    return folder / "run"


def steps_in(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_on_one_rank_stops_all_with_a_checkpoint(recipe, whole, tmp_path, number):
    """Exit status 0 within a step; a launcher's echo of the signal changes nothing; the resumed run is the same."""
    run = start(recipe, tmp_path)
    assert run.wait_until(lambda: steps_in(tmp_path) >= 3), run.text()
    before = steps_in(tmp_path)
    run.signal(1, number)
    run.signal(1, number)
    assert run.wait(30) == [0, 0], run.text()
    stopped = steps_in(tmp_path)
    assert before <= stopped <= before + 2  # the step in which the signal came, and perhaps one that had just begun
    assert checkpoints_in(tmp_path / "run") == [stopped] and not (tmp_path / "run" / "final").exists()
    assert f"stopped after step {stopped} of 12 by {number.name}; checkpoint of step {stopped}" in run.text()
    run = start(recipe, tmp_path, "--resume_from_checkpoint", "auto", before=None)
    assert run.wait(60) == [0, 0], run.text()
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    assert (weights_of(tmp_path / "run") == weights_of(whole)).all()


def slow_evaluation() -> None:
    from engine.evaluation import Evaluator

    original = Evaluator.run

    def slow(self):
        logging.getLogger("engine").warning("evaluation begins")
        time.sleep(1.5)
        return original(self)

    Evaluator.run = slow


def test_ctrl_c_in_the_last_evaluation_leaves_the_export_to_a_resume(recipe, tmp_path):
    """Saving is off, and still nothing is lost."""
    run = start(recipe, tmp_path, "--max_steps", "2", before=slow_evaluation)
    assert run.wait_until(lambda: "evaluation begins" in run.text()), run.text()
    for rank in (0, 1):
        run.signal(rank, signal.SIGINT)
    assert run.wait(30) == [0, 0], run.text()
    assert checkpoints_in(tmp_path / "run") == [2] and not (tmp_path / "run" / "final").exists()
    assert "stopped after step 2 of 2 by SIGINT; checkpoint of step 2" in run.text()
    words = ["--max_steps", "2", "--resume_from_checkpoint", "auto"]
    assert start(recipe, tmp_path, *words, before=None).wait(60) == [0, 0]
    assert (tmp_path / "run" / "final" / "config.json").is_file() and steps_in(tmp_path) == 2


def test_ctrl_c_before_training_ends_at_once(recipe, tmp_path):
    """Rank 0 waits for a rank that never comes, outside Python."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": free_port()}
    environment |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "engine", "train", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while True:  # until its store listens
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(environment["MASTER_PORT"])), 1):
            break
        assert time.monotonic() < end and job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    assert job.wait(5) == -signal.SIGINT
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_signal_to_the_whole_job_under_the_deepspeed_launcher(recipe, tmp_path):
    """As a scheduler sends it: to every process. The launcher hands it on to ranks that have it already."""
    command = [*launcher("deepspeed", 2), "--module", "engine", "train", "--config", str(recipe)]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "5000"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + 150
        while steps_in(tmp_path) < 3:
            assert job.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGTERM)
        job.wait(30)
        end = time.monotonic() + 30
        while "stopped after step" not in log.read_text():
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert checkpoints_in(tmp_path / "run") == [steps_in(tmp_path)]


def test_a_second_signal_ends_a_hanging_rank_at_once(recipe, tmp_path):
    """Rank 1 is frozen, so that rank 0 hangs in a collective, where Python's own signal handlers never run."""
    from engine.cluster.signals import REPEAT_S

    run = start(recipe, tmp_path)
    assert run.wait_until(lambda: steps_in(tmp_path) >= 1), run.text()
    run.signal(1, signal.SIGSTOP)
    time.sleep(2 * STEP_S)
    run.signal(0, signal.SIGTERM)
    time.sleep(REPEAT_S + 0.2)
    assert run.processes[0].is_alive()
    run.signal(0, signal.SIGTERM)
    run.processes[0].join(2)
    status = run.processes[0].exitcode
    run.kill_all()
    assert status == 128 + signal.SIGTERM, run.text()


def test_max_minutes_ends_a_run_and_save_minutes_saves(recipe, tmp_path):
    flags = ["--max_minutes", "0.05", "--save_minutes", "0.01"]
    run = start(recipe, tmp_path, *flags, before=functools.partial(slow_steps, 0.4))
    assert run.wait(60) == [0, 0], run.text()
    stopped = steps_in(tmp_path)
    assert 1 < stopped < 12 and f"stopped after step {stopped} of 12 by max_minutes" in run.text()
    saved = checkpoints_in(tmp_path / "run")
    assert len(saved) > 1 and saved[-1] == stopped  # by the clock, and at the end


def test_a_dead_rank_ends_the_others(recipe, tmp_path):
    run = start(recipe, tmp_path, "--timeout_s", "20")
    assert run.wait_until(lambda: steps_in(tmp_path) >= 1), run.text()
    run.signal(1, signal.SIGKILL)
    killed_s = time.monotonic()
    status = run.wait(25)
    assert status[0] not in (0, None) and status[1] == -signal.SIGKILL
    assert time.monotonic() - killed_s < 10  # gloo sees the closed connection; NCCL would wait for timeout_s


def test_a_stuck_rank_ends_the_others_after_the_time_out(recipe, tmp_path):
    """Also in the groups that DeepSpeed and the loss make, whose own default is half an hour."""
    run = start(recipe, tmp_path, "--timeout_s", "4")
    assert run.wait_until(lambda: steps_in(tmp_path) >= 1), run.text()
    run.signal(1, signal.SIGSTOP)
    stopped_s = time.monotonic()
    run.processes[0].join(30)
    waited_s, status = time.monotonic() - stopped_s, run.processes[0].exitcode
    run.kill_all()
    assert status not in (0, None) and 3 < waited_s < 20, (status, waited_s, run.text())


class FullDisk(TrainerCallback):
    """From `at_step` on, rank 1 cannot write files of more than 20 kB (its limit stands in for a full disk)."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.at_step and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def full_disk(at_step: int) -> list[TrainerCallback]:
    return [FullDisk(at_step)]


@pytest.mark.parametrize("reaction", ["raise", "warn"])
def test_a_full_disk_leaves_the_earlier_checkpoint(recipe, whole, tmp_path, reaction):
    flags = ["--save_steps", "4", "--save_total_limit", "1", "--save_on_error", reaction]
    run = start(recipe, tmp_path, *flags, before=functools.partial(full_disk, 6))
    expected = [0, 0] if reaction == "warn" else [1, 1]
    assert run.wait(60) == expected, run.text()
    assert checkpoints_in(tmp_path / "run") == [4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving_*"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_4"
    text = "".join(log.read_text() for log in run.logs)  # all ranks raise it; the first to do so has the console
    assert text.count("step_8: cannot be written: rank 1: ") == 1 and "rank 0:" not in text and "MiB free)" in text
    if reaction == "warn":
        assert steps_in(tmp_path) == 12 and metrics_of(tmp_path / "run") == metrics_of(whole)
    else:
        assert "error: checkpoint step_8" in text
        run = start(recipe, tmp_path, "--resume_from_checkpoint", "auto", before=None)
        assert run.wait(60) == [0, 0], run.text()
        assert metrics_of(tmp_path / "run") == metrics_of(whole)


def test_metrics_split_the_step(whole):
    """The phases cover most of a step, none counts twice, and there is no peak to compare with on CPU."""
    lines = read_metrics(whole)
    names = ["teacher", "student", "loss", "backward", "optimizer", "idle"]
    for line in lines[1:]:  # the first step allocates
        parts = sum(line[f"perf/{name}_s"] for name in names) + line.get("perf/rollout_s", 0.0)
        assert 0.5 * line["perf/step_s"] < parts <= line["perf/step_s"]
        assert line["perf/tflops_per_s"] > 0 and "perf/mfu" not in line and line["perf/memory_peak_gib"] > 0.01
    assert any("perf/rollout_s" in line for line in lines)
