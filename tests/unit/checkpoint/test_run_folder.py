"""What counts as an earlier run, which starts it forbids, and what starting anew removes."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.checkpoint.run_folder import clear, problem_with_start, results_of_a_run
from engine.config import GKDConfig


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def config(folder: Path, **fields) -> GKDConfig:
    return GKDConfig(output_dir=str(folder), **fields)


def test_a_start_that_failed_leaves_a_folder_unused(tmp_path):
    write(tmp_path, "config.yaml", "logs/rank_1.log", "notes.txt", "wandb/x")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/divergence": 1.0}\n')
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path, "checkpoints/.saving_step_2/a", "checkpoints/best/mine.pt")
    assert results_of_a_run(tmp_path) == [] == results_of_a_run(tmp_path / "none")
    assert problem_with_start(config(tmp_path), None) is None


@pytest.mark.parametrize(
    "name,shown",
    [
        ("checkpoints/step_4/manifest.json", "checkpoints/step_4"),
        ("metrics.jsonl", "metrics.jsonl"),
        ("final/a", "final"),
        ("best/a", "best"),
    ],
)
def test_each_result_alone_makes_a_used_folder(tmp_path, name, shown):
    write(tmp_path, name)
    if name == "metrics.jsonl":
        (tmp_path / name).write_text('{"step": 0}\n{"step": 1}\n{"step"')
    said = problem_with_start(config(tmp_path), None)
    assert shown in said and "--resume_from_checkpoint auto" in said and "--overwrite_output_dir" in said
    assert problem_with_start(config(tmp_path, overwrite_output_dir=True), None) is None


def test_auto_without_a_checkpoint_starts_only_where_nothing_is_lost(tmp_path):
    auto = config(tmp_path, resume_from_checkpoint="auto")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert problem_with_start(auto, None) is None
    write(tmp_path, "final/config.json")
    said = problem_with_start(auto, None)
    assert "none of its checkpoints is whole" in said and "--overwrite_output_dir" in said


def test_another_runs_checkpoint_does_not_go_on_in_a_used_folder(tmp_path):
    write(tmp_path, "checkpoints/step_4/a", "checkpoints/step_2/a")
    other = tmp_path / "elsewhere" / "checkpoints" / "step_9"
    said = problem_with_start(config(tmp_path, resume_from_checkpoint=str(other)), other)
    assert "checkpoints/step_4 and 1 more" in said and "is a checkpoint of another" in said
    own = tmp_path / "checkpoints" / "step_2"
    assert problem_with_start(config(tmp_path, resume_from_checkpoint=str(own)), own) is None


def test_clearing_leaves_what_no_run_wrote(tmp_path):
    write(tmp_path, "checkpoints/step_4/a", "checkpoints/latest", "checkpoints/.universal_x/a", "final/config.json")
    write(tmp_path, "best/config.json", "metrics.jsonl", "tables/completions.jsonl", "bad_steps/step_1_rank_0.jsonl")
    write(tmp_path, "checkpoints/best/mine.pt", "notes.txt", "wandb/x")
    clear(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["checkpoints/best/mine.pt", "notes.txt", "wandb/x"]


def test_going_on_and_starting_anew_exclude_each_other():
    with pytest.raises(ValueError, match="set one of them"):
        GKDConfig(overwrite_output_dir=True, resume_from_checkpoint="auto")
