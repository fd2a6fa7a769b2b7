"""A run taken up at another world size or with other offload goes on as if nothing had happened."""

from __future__ import annotations

import json

import pytest

from engine import GKDConfig, GKDTrainer
from engine.zero.settings import DEFAULT_DEEPSPEED
from tests.library.runs import copy_at_step, metrics_of, samples_of, train, weights_of, write_run_inputs

STEPS, SAVED_AT = 8, 3  # in the middle of two steps that share rollouts
OFFLOAD = {
    **DEFAULT_DEEPSPEED,
    "zero_optimization": {**DEFAULT_DEEPSPEED["zero_optimization"], "offload_optimizer": {"device": "cpu"}},
}


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    return write_run_inputs(tmp_path_factory.mktemp("elastic")) | {
        "lmbda": 0.8, "rollout_reuse": 2, "num_generations": 2, "weight_decay": 0.1, "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 2, "global_batch_size": 8, "max_steps": STEPS, "save_steps": SAVED_AT,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(ranks, fields, tmp_path_factory):
    """`whole(n)`: folder and samples of the uninterrupted run on n ranks."""
    runs = {}

    def get(world_size: int):
        if world_size not in runs:
            folder = tmp_path_factory.mktemp(f"whole{world_size}") / "run"
            runs[world_size] = folder, ranks(world_size).run(train, fields | {"output_dir": str(folder)})
        return runs[world_size]

    return get


@pytest.mark.parametrize(
    "before,after,extra",
    [
        (1, 2, {}), (2, 4, {}), (4, 2, {"per_device_train_batch_size": 1}), (4, 1, {}),
        (2, 2, {"deepspeed": OFFLOAD}),
    ],
    ids=["1to2", "2to4", "4to2_smaller_micro_batch", "4to1", "2to2_offload"],
)  # fmt: skip
def test_resume_elsewhere(ranks, whole, fields, tmp_path, before, after, extra):
    """Losses, gradient norms and learning rates to 1e-4 over five steps, the same sampled tokens, the same weights."""
    folder, samples = whole(before)
    copy = copy_at_step(folder, tmp_path / "run")
    # accumulation follows the checkpoint's global batch by itself where the number of ranks changes
    own = {"global_batch_size": None} if before != after else {}
    resumed = fields | own | extra | {"output_dir": str(copy), "resume_from_checkpoint": "auto"}
    results = ranks(after).run(train, resumed)
    assert samples_of(results) == samples_of(samples)[SAVED_AT:]
    ours, theirs = metrics_of(copy), metrics_of(folder)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert ours[:SAVED_AT] == theirs[:SAVED_AT]
    for a, b in zip(ours[SAVED_AT:], theirs[SAVED_AT:], strict=True):
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)
    a, b = weights_of(copy), weights_of(folder)
    assert ((a - b).norm() / b.norm()).item() < 1e-5
    assert (copy / "checkpoints" / "step_6" / "manifest.json").is_file()
    assert not list((copy / "checkpoints").glob(".universal_*"))  # gone with the next checkpoint


def refused(fields: dict) -> str:
    with pytest.raises(ValueError) as error:
        GKDTrainer(args=GKDConfig(**fields))
    return str(error.value)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"global_batch_size": 16}, "was trained with 8 sequences a step, and this configuration gives 16"),
        ({"global_batch_size": None, "gradient_accumulation_steps": 1}, "this configuration gives 4"),
    ],
    ids=["another", "accumulation_alone"],
)
def test_another_global_batch_is_refused(ranks, whole, fields, tmp_path, change, message):
    copy = copy_at_step(whole(2)[0], tmp_path / "run")
    resumed = fields | change | {"output_dir": str(copy), "resume_from_checkpoint": "auto"}
    assert message in ranks(2).run(refused, resumed)[0]


def test_a_global_batch_that_the_ranks_cannot_share_is_refused(ranks, whole, fields, tmp_path):
    copy = copy_at_step(whole(1)[0], tmp_path / "run")
    resumed = fields | {"output_dir": str(copy), "resume_from_checkpoint": "auto"}
    resumed |= {"global_batch_size": None, "per_device_train_batch_size": 3}
    text = ranks(2).run(refused, resumed)[0]
    assert "8 sequences a step, which must be kept" in text and "cannot be split over 2 ranks" in text


def optimizer_after_load(fields: dict) -> list[tuple[float, set[float], int]]:
    """Weight decay, AdamW's step counts and distinct step tensors by parameter group, right after a resume."""
    trainer = GKDTrainer(args=GKDConfig(**fields))
    trainer.run.checkpoints.load(trainer.run.resume_from, trainer.run.student.engine)
    optimizer = trainer.run.student.engine.optimizer.optimizer
    steps = [state["step"] for state in optimizer.state.values()]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    trainer.run.student.engine.destroy()
    return decays, {float(step) for step in steps}, len({id(step) for step in steps}) == len(steps)


def test_conversion_keeps_parameter_groups_and_step_counts(ranks, whole, fields, tmp_path):
    """deepspeed 0.19.8 would decay the norms as well, and share one step counter among the groups."""
    copy = copy_at_step(whole(1)[0], tmp_path / "run")
    resumed = fields | {"output_dir": str(copy), "resume_from_checkpoint": str(copy / "checkpoints" / "step_3")}
    for decays, steps, are_separate in ranks(2).run(optimizer_after_load, resumed):
        assert decays == [0.1, 0.0] and steps == {3.0} and are_separate


def test_a_full_disk_is_told_before_converting(ranks, whole, fields, tmp_path):
    assert "GiB are free" in ranks(2).run(convert_on_full_disk, str(whole(1)[0]), str(tmp_path))[0]


def convert_on_full_disk(folder: str, work: str) -> str:
    from pathlib import Path
    from types import SimpleNamespace
    from unittest import mock

    from engine.checkpoint.elastic import universal_copy, zero_layout
    from engine.checkpoint.manifest import read_manifest
    from engine.errors import CheckpointError

    path = Path(folder) / "checkpoints" / "step_3"
    full = mock.patch("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with full, pytest.raises(CheckpointError) as error:
        universal_copy(path, read_manifest(path), zero_layout(GKDConfig(), 2), Path(work))
    return str(error.value)


def test_nvme_states_are_refused(ranks, whole):
    text = ranks(2).run(convert_from_nvme, str(whole(1)[0]))[0]
    assert "nvme on either side" in text


def convert_from_nvme(folder: str) -> str:
    from pathlib import Path

    from engine.checkpoint.elastic import universal_copy, zero_layout

    path = Path(folder) / "checkpoints" / "step_3"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["layout"]["offload_optimizer"] = "nvme"
    with pytest.raises(ValueError) as error:
        universal_copy(path, manifest, zero_layout(GKDConfig(), 2), Path(folder))
    return str(error.value)
