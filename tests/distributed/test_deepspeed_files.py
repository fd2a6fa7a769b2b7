"""Real steps under DeepSpeed JSONs that people have, and with the optimizers that a JSON can name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import GKDConfig, GKDTrainer
from engine.zero import partitions
from tests.library.paths import ROOT
from tests.library.runs import read_metrics, write_run_inputs
from tests.library.spoilt import train_spoilt

DEADLINE_S = 600  # for the slow ones
FILES = ROOT / "tests/deepspeed_files"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    fields = write_run_inputs(tmp_path_factory.mktemp("inputs"))
    return fields | {"save_steps": None, "max_steps": 2, "lmbda": 0.0, "max_grad_norm": 0.0}


def take_steps(fields: dict) -> dict:
    """Train, and say how the weights moved: their names, by the largest change of one."""
    trainer = GKDTrainer(args=GKDConfig(**fields))
    engine = trainer.run.student.engine
    before = {name: partitions.full_value(p) for name, p in engine.module.named_parameters()}
    trainer.train()
    after = {name: partitions.full_value(p) for name, p in engine.module.named_parameters()}
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    optimizer = type(engine.optimizer.optimizer).__name__
    engine.destroy()
    return {"optimizer": optimizer, "moved": moved}


def stage3(**optimizer) -> dict:
    return {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True, "optimizer": optimizer}


def slow(*values):
    """DeepSpeed compiles these optimizers' kernels when they are first used, for minutes."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "settings,optimizer",
    [
        (str(FILES / "llamafactory_ds_z3_config.json"), "AdamW"),
        (stage3(type="SGD", params={"momentum": 0.9}), "SGD"),
        slow(str(FILES / "swift_zero3_offload.json"), "DeepSpeedCPUAdam"),
        slow(str(FILES / "transformers_zero3_null_warmup_decay.json"), "FusedAdam"),
        slow(stage3(type="Muon", params={"momentum": 0.9}), "MuonWithAuxAdam"),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, str) else "",
)
def test_training_under_a_file(ranks, inputs, tmp_path, settings, optimizer):
    results = ranks(2).run(
        take_steps, inputs | {"deepspeed": settings, "output_dir": str(tmp_path)}, deadline_s=DEADLINE_S
    )
    for result in results:
        assert result["optimizer"] == optimizer
        assert all(change > 0 for change in result["moved"].values()), result["moved"]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(torch.isfinite(torch.tensor([line["train/loss"], line["train/grad_norm"]])).all() for line in lines)


def test_training_in_bf16_under_a_file(ranks, inputs, tmp_path):
    """Without `data_types`, which these files do not have, DeepSpeed accumulates the gradient in bf16."""
    settings = str(FILES / "llamafactory_ds_z3_config.json")
    fields = inputs | {"deepspeed": settings, "output_dir": str(tmp_path), "bf16": True, "global_batch_size": 8}
    for result in ranks(2).run(take_steps, fields):
        assert max(result["moved"].values()) > 0
    lines = read_metrics(tmp_path)
    assert [line["train/bad_steps"] for line in lines] == [0, 0] and all(line["train/grad_norm"] > 0 for line in lines)


MUON = stage3(type="Muon", params={"momentum": 0.9, "torch_adam": True})


@pytest.mark.slow  # torch compiles Muon's update
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_does_not_reach_muons_momentum(ranks, inputs, tmp_path, kind):
    fields = inputs | {"deepspeed": MUON, "output_dir": str(tmp_path), "max_steps": 3, "global_batch_size": 8}
    for result in ranks(2).run(train_spoilt, fields, kind, [2], 1, deadline_s=DEADLINE_S):
        first, second, third = (torch.from_numpy(weights) for weights in result["weights"])
        assert result["bad_steps"] == 1 and result["error"] is None
        assert torch.equal(first, second) and not torch.equal(second, third) and torch.isfinite(third).all()
