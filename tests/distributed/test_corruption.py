"""Damaged checkpoints: each damage is named where the checkpoint is asked for, and passed over under `auto`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from engine import GKDConfig
from tests.library.runs import train, write_run_inputs


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory) -> Path:
    """A run on two ranks with checkpoints at steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("corruption")
    fields = write_run_inputs(folder) | {"max_steps": 3, "save_steps": 1, "lmbda": 0.0}
    ranks(2).run(train, fields)
    return folder / "run"


def truncate(path: Path) -> str:
    victim = next(path.glob("*rank_1*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])
    return f"{victim.name} has {victim.stat().st_size} bytes instead of {victim.stat().st_size + 100}"


def flip(path: Path) -> str:
    victim = next(path.glob("*rank_0*model_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return f"{victim.name} has changed since it was written"


def lose_a_rank(path: Path) -> str:
    victim = next(path.glob("*rank_1*optim_states.pt"))
    victim.unlink()
    return f"{victim.name} is missing"


def break_manifest(path: Path) -> str:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-50])
    return "manifest.json is damaged"


def lose_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "not a complete checkpoint: no manifest.json"


def find(output_dir: str, wanted: str) -> tuple[str | None, str, str]:
    """The checkpoint that is found, the error, and what was logged."""
    from engine.checkpoint.resumption import find_resumption

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("engine.checkpoint.resumption")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    found, error = None, ""
    try:
        fields = {"output_dir": output_dir, "per_device_train_batch_size": 2, "resume_from_checkpoint": wanted}
        found = find_resumption(GKDConfig(**fields), "torch.optim.AdamW")
    except ValueError as raised:
        error = str(raised)
    logger.removeHandler(handler)
    return found and found.path.name, error, "\n".join(records)


@pytest.mark.parametrize("damage", [truncate, flip, lose_a_rank, break_manifest, lose_manifest])
def test_damage_is_named_and_passed_over(ranks, finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_3"
    message = damage(newest)
    for found, error, _ in ranks(2).run(find, str(tmp_path / "run"), str(newest)):
        assert found is None and message in error
    results = ranks(2).run(find, str(tmp_path / "run"), "auto")
    assert [(found, error) for found, error, _ in results] == [("step_2", "")] * 2
    assert "step_3 is skipped" in results[0][2] and message in results[0][2]


def test_two_damaged_ones_are_both_passed_over(ranks, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    messages = [d(tmp_path / "run" / "checkpoints" / f"step_{n}") for d, n in ((flip, 3), (lose_manifest, 2))]
    found, _, logged = ranks(2).run(find, str(tmp_path / "run"), "auto")[0]
    assert found == "step_1" and all(message in logged for message in messages)


def test_latest_that_names_nothing(ranks, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_9")
    found, _, logged = ranks(2).run(find, str(tmp_path / "run"), "auto")[0]
    assert found == "step_3" and "latest names 'step_9', which is not a complete checkpoint" in logged
    missing = str(tmp_path / "run" / "checkpoints" / "step_9")
    assert "step_9 is not a complete checkpoint" in ranks(2).run(find, str(tmp_path / "run"), missing)[0][1]


def test_nothing_good_is_nothing_found(ranks, finished, tmp_path):
    """Whether a fresh start may follow, the run folder says: see tests/unit/checkpoint/test_run_folder.py."""
    shutil.copytree(finished, tmp_path / "run")
    for step in (1, 2, 3):
        flip(tmp_path / "run" / "checkpoints" / f"step_{step}")
    found, error, logged = ranks(2).run(find, str(tmp_path / "run"), "auto")[0]
    assert found is None and not error and "no complete checkpoint" in logged and logged.count("skipped") == 3
    assert ranks(2).run(find, str(tmp_path / "none"), "auto")[0][:2] == (None, "")


def test_the_newest_is_the_last_written(ranks, finished, tmp_path):
    """After a return to an older checkpoint, that branch's checkpoints are newer than those it has left behind."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    fields = write_run_inputs(tmp_path) | {"max_steps": 2, "save_steps": 1, "lmbda": 0.0, "save_total_limit": 2}
    fields |= {"output_dir": str(copy), "resume_from_checkpoint": str(copy / "checkpoints" / "step_1")}
    ranks(2).run(train, fields)
    assert ranks(2).run(find, str(copy), "auto")[0][0] == "step_2"
    assert sorted(p.name for p in (copy / "checkpoints").glob("step_*")) == ["step_2", "step_3"]
