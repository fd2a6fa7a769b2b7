"""Tiny runs: what they are made from, running one on a rank, and reading what it left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import GKDConfig, GKDTrainer
from tests.library.models import tiny_llama, tiny_tokenizer

TIMING = ("perf/", "rollout/gather_s", "rollout/idle_s", "rollout/tokens_per_s")


def write_run_inputs(folder, num_rows: int = 24) -> dict:
    """Student, teacher and data of a tiny run in `folder`; returns the configuration fields that name them."""
    tokenizer = tiny_tokenizer()
    for name, hidden_size, seed in (("student", 16, 1), ("teacher", 24, 2)):
        model = tiny_llama(len(tokenizer), name == "student", hidden_size, seed, kv_heads=2 if name == "teacher" else 1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", num_rows), ("test", 6)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{split} {i}?"},
                    {"role": "assistant", "content": "yes " * (1 + i % 5)},
                ]
            }
            for i in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(folder / "student"), "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(data), "output_dir": str(folder / "run"), "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 4, "max_length": 64,
        "max_new_tokens": 8, "learning_rate": 1e-3, "gradient_checkpointing": False, "save_steps": 2,
        "logging_steps": 1,
    }  # fmt: skip


def train(fields: dict) -> dict:
    """Run on this rank; its sampled and trained-on tokens come back for comparison."""
    config = GKDConfig(**fields)
    trainer = GKDTrainer(args=config)
    seen = []
    original = trainer.loop._next_samples

    def recorded():
        samples, metrics = original()
        seen.append([(s.index, s.input_ids) for batch in samples for s in batch])
        return samples, metrics

    trainer.loop._next_samples = recorded
    trainer.train()
    trainer.run.student.engine.destroy()
    return {"seen": seen, "steps": trainer.loop.state.step}


def read_lines(path: str | Path) -> list[dict]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_metrics(folder: str | Path) -> list[dict]:
    """Every line of a run's metrics.jsonl, whole."""
    return read_lines(Path(folder) / "metrics.jsonl")


def train_metrics(folder: str | Path) -> list[dict]:
    """Every line's step and `train/` figures."""
    return [{k: v for k, v in line.items() if k == "step" or k.startswith("train/")} for line in read_metrics(folder)]


def metrics_of(folder: str | Path) -> list[dict]:
    """Every step's figures that do not depend on the clock."""
    return [{k: v for k, v in line.items() if not k.startswith(TIMING)} for line in read_metrics(folder)]


def checkpoints_in(folder: Path) -> list[int]:
    """Steps of a run's complete checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in (folder / "checkpoints").glob("step_*/manifest.json"))


def weights_of(folder: str | Path) -> torch.Tensor:
    tensors = load_file(Path(folder) / "final" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


def samples_of(results: list[dict]) -> list[list]:
    """Every step's samples over all ranks, in the order of the global batch."""
    return [sorted(sum(step, [])) for step in zip(*(r["seen"] for r in results), strict=True)]


def assert_same_run(ours: dict, theirs: dict, tolerance: float) -> None:
    for a, b in zip(metrics_of(ours["output_dir"]), metrics_of(theirs["output_dir"]), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance * 1e-2), (a["step"], name)
    a, b = weights_of(ours["output_dir"]), weights_of(theirs["output_dir"])
    assert ((a - b).norm() / b.norm()).item() <= tolerance


def copy_at_step(folder: Path, copy: Path) -> Path:
    """The run folder as it was when its checkpoint of step 3, of 3, 6 and 8, had been written."""
    shutil.copytree(folder, copy)
    for name in ("checkpoints/step_6", "checkpoints/step_8", "final"):
        shutil.rmtree(copy / name)
    return copy
