"""Beside the real TRL, in a venv of its own: the same losses and weights under `loss_normalization: trl`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.library.launch import free_port, run
from tests.library.models import CHATML
from tests.library.paths import ROOT
from tests.library.runs import train, train_metrics, weights_of, write_run_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL 1.16 with the transformers compared needs Python 3.11"),
]

VENV = ROOT / ".cache" / "trl_venv"
CONSTRAINTS = ROOT / "launch" / "constraints.txt"
STEPS = 10
# TRL scores what the template writes behind the end of the last turn, and the engine does not: nothing, here.
TEMPLATE = CHATML.replace("<|im_end|>\n", "<|im_end|>")


@pytest.fixture(scope="session")
def trl_python() -> Path:
    """An interpreter that has TRL 1.16 and, for the rest, the versions of this engine's venv; kept between runs."""
    python, stamp = VENV / "bin" / "python", VENV / ".installed"
    if not stamp.is_file() or stamp.read_text() != CONSTRAINTS.read_text():
        pins = CONSTRAINTS.read_text().splitlines()
        torch_pin = next(line for line in pins if line.startswith("torch=="))  # alone: an open range pulls gigabytes
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True, timeout=120)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
        subprocess.run([*pip, torch_pin], check=True, timeout=900)
        subprocess.run([*pip, "trl==1.16.0"], check=True, timeout=900)
        stamp.write_text(CONSTRAINTS.read_text())
    return python


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """Eight rows of different lengths, which are one global batch: their order does not matter."""
    folder = tmp_path_factory.mktemp("trl")
    fields = write_run_inputs(folder, num_rows=8)
    for name in ("student", "teacher"):
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    return fields


def trl_losses(python: Path, num_ranks: int, fields: dict, out: Path) -> list[float]:
    rows = [json.loads(line) for line in (Path(fields["dataset_name"]) / "train.jsonl").read_text().splitlines()]
    names = ("lmbda", "temperature", "beta", "max_steps", "learning_rate", "weight_decay", "gradient_checkpointing",
             "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "bf16", "seed")  # fmt: skip
    settings = {
        "student": fields["model_name_or_path"], "teacher": fields["teacher_model_name_or_path"], "rows": rows,
        "out": str(out), "fields": {name: fields[name] for name in names} | {"output_dir": str(out) + "-run"},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".json")
    path.write_text(json.dumps(settings))
    script = str(Path(__file__).with_name("trl_side.py"))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks), "--master_port", free_port()]
    command = [str(python), *(launch if num_ranks > 1 else []), script, str(path)]
    done = run(command, PYTHONPATH="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads((out / "losses.json").read_text())


@pytest.mark.parametrize(
    ("num_ranks", "per_device", "accumulation"),
    [(1, 8, 1), (1, 4, 2), (2, 2, 2)],
    ids=["whole", "accumulated", "2 ranks"],
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ten_steps_are_trls(ranks, trl_python, inputs, tmp_path, beta, num_ranks, per_device, accumulation):
    fields = inputs | {
        "output_dir": str(tmp_path / "ours"), "lmbda": 0.0, "temperature": 1.0, "beta": beta, "max_steps": STEPS,
        "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": per_device, "seed": 7,
        "gradient_accumulation_steps": accumulation, "loss_normalization": "trl", "save_steps": None,
        "dataset_test_split": None,
    }  # fmt: skip
    ranks(num_ranks).run(train, fields)
    losses = [line["train/loss"] for line in train_metrics(fields["output_dir"])]
    theirs = trl_losses(trl_python, num_ranks, fields, tmp_path / "theirs" / "student")
    print(f"\nbeta {beta}, {num_ranks} ranks, step: ours, TRL's")
    for step, (our, their) in enumerate(zip(losses, theirs, strict=True), start=1):
        print(f"{step:>3} {our:.8f} {their:.8f}")
    assert len(theirs) == STEPS and losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(theirs, rel=1e-4)
    saved = load_file(tmp_path / "theirs" / "student" / "model.safetensors")
    ours, other = weights_of(fields["output_dir"]), torch.cat([saved[n].flatten() for n in sorted(saved)]).double()
    assert ((ours - other).norm() / other.norm()).item() < 1e-4
