"""Runs that are killed again and again, one rank or all, also inside a save, end as the run that never was."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from transformers import TrainerCallback

from tests.library.forked import ForkedRun
from tests.library.runs import metrics_of, weights_of, write_run_inputs

WORLD_SIZE, NUM_STEPS = 2, 24
# Places in a save, in the order in which it comes to them: before any file, between files, when the manifest is to be
# written, before and between the renames, before `latest` moves and before old checkpoints go.
SAVE_POINTS = ("prepare", "rank_file", "digests", "manifest", "rename", "latest", "prune")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """On-policy half of the time, accumulation 2, rollouts shared by two steps, epochs that end within a step."""
    folder = tmp_path_factory.mktemp("kills")
    fields = write_run_inputs(folder, num_rows=10) | {
        "lmbda": 0.5, "rollout_reuse": 2, "global_batch_size": 8, "max_steps": NUM_STEPS, "save_steps": 2,
        "weight_decay": 0.1, "save_total_limit": 2, "resume_from_checkpoint": "auto", "timeout_s": 20,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


class NoteStart(TrainerCallback):
    """Writes the step from which a process goes on into a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with open(self.path, "a") as file:
                file.write(f"{state.global_step}\n")


def die_in_save(point: str | None, number: int, starts: str) -> list[TrainerCallback]:
    """Note where this process starts, and kill it when its save `number` gets to `point`."""
    from engine.checkpoint import checkpoint
    from engine.zero import partitions

    saves = [0]

    def killing(owner, name: str, here: str, after: bool = False):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs) if after else None
            if point == here and saves[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result if after else original(*args, **kwargs)

        setattr(owner, name, wrapped)

    killing(partitions, "save_checkpoint", "prepare")
    killing(partitions, "save_checkpoint", "rank_file", after=True)
    killing(checkpoint, "flushed_digests", "digests", after=True)
    killing(checkpoint, "publish", "manifest")  # which is written, but the folder is still hidden
    killing(checkpoint, "publish", "rename", after=True)  # the folder has its name, `latest` still the old text
    killing(checkpoint, "remove_universal_copies", "latest")
    killing(checkpoint.Checkpoints, "_prune", "prune")
    save = checkpoint.Checkpoints._write

    def counted(self, *args, **kwargs):
        saves[0] += 1
        return save(self, *args, **kwargs)

    checkpoint.Checkpoints._write = counted
    return [NoteStart(starts)]


def start(recipe: Path, folder: Path, point: str | None = None, number: int = 0) -> ForkedRun:
    words = ["train", "--config", str(recipe), "--output_dir", str(folder / "run")]
    before = functools.partial(die_in_save, point, number, str(folder / "starts"))
    return ForkedRun(WORLD_SIZE, words, folder / "logs", before)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run = start(recipe, folder)
    assert run.wait(120) == [0] * WORLD_SIZE, run.text()
    return folder / "run"


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 where there is none."""
    paths = (folder / "run" / "checkpoints").glob("step_*/manifest.json")
    return max((int(path.parent.name[5:]) for path in paths), default=0)


def starts(folder: Path) -> list[int]:
    path = folder / "starts"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_once(run: ForkedRun, folder: Path, kind: str, saved: int, draw: random.Random) -> None:
    """Kill one rank or all, some steps after step `saved` from which the run goes on, at a random instant of a step or
    inside the next save. Does nothing to a run that ends first."""
    target = saved + draw.randint(1, 6)
    run.wait_until(lambda: steps_done(folder) >= target)
    if kind == "save":
        run.wait_until(lambda: any((folder / "run" / "checkpoints").glob(".saving_*")), poll_s=0.0005)
    time.sleep(draw.uniform(0.0, 0.02 if kind == "save" else 0.1))
    victims = list(range(WORLD_SIZE)) if kind == "all" else [draw.randrange(WORLD_SIZE)]
    for rank in victims:
        run.signal(rank, signal.SIGKILL)
    run.wait(40)


def steps_done(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def assert_like_the_whole(folder: Path, whole: Path) -> None:
    assert metrics_of(folder / "run") == metrics_of(whole)
    assert (weights_of(folder / "run") == weights_of(whole)).all()
    names = {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    assert {name for name in names if name.startswith((".", "step_"))} == {"step_22", "step_24"}  # nothing half-written


def survive(recipe: Path, whole: Path, folder: Path, kills: int, seed: int) -> list[str]:
    """Start, kill, start again, `kills` times; a run that gets to its end first is compared, and another begun."""
    draw, done, saved = random.Random(seed), [], 0
    while True:
        begun = len(starts(folder))
        run = start(recipe, folder)
        if run.wait_until(lambda before=begun: len(starts(folder)) > before):
            assert starts(folder)[-1] == saved  # nothing lost but the unsaved steps
        if len(done) == kills:
            break
        kind = ("one", "all", "save")[len(done) % 3]
        kill_once(run, folder, kind, saved, draw)
        if any(status == -signal.SIGKILL for status in run.wait(0)):
            saved = newest(folder)
            done.append(f"{kind}: killed after step {steps_done(folder)}, newest checkpoint {saved}")
        else:
            assert_like_the_whole(folder, whole)
            shutil.rmtree(folder)
            saved = 0
    assert run.wait(120) == [0] * WORLD_SIZE, run.text()
    assert_like_the_whole(folder, whole)
    return done


def test_three_kills(recipe, whole, tmp_path):
    print("\n".join(survive(recipe, whole, tmp_path / "run", kills=3, seed=0)))


@pytest.mark.slow
def test_twenty_four_kills(recipe, whole, tmp_path):
    print("\n".join(survive(recipe, whole, tmp_path / "run", kills=24, seed=1)))


@pytest.mark.parametrize("point", ["rank_file", "latest"])
def test_a_kill_inside_a_save(recipe, whole, tmp_path, point):
    check_kill_inside_a_save(recipe, whole, tmp_path, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", [p for p in SAVE_POINTS if p not in ("rank_file", "latest")])
def test_kills_at_every_place_of_a_save(recipe, whole, tmp_path, point):
    check_kill_inside_a_save(recipe, whole, tmp_path, point)


def check_kill_inside_a_save(recipe: Path, whole: Path, folder: Path, point: str) -> None:
    """Killed in its third save, of step 6: resumes at 4, or at 6 where the checkpoint had got its name."""
    run = start(recipe, folder, point, 3)
    status = run.wait(60)
    assert -signal.SIGKILL in status, run.text()
    expected = 6 if point in ("rename", "latest", "prune") else 4
    assert newest(folder) == expected
    assert start(recipe, folder).wait(60) == [0] * WORLD_SIZE
    assert starts(folder) == [0, expected]
    assert_like_the_whole(folder, whole)
