"""Export: the checkpoint's student in any dtype, without a process group, with a shard in memory and not the model."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import GKDConfig, GKDTrainer
from engine.cli import main
from engine.models import export
from tests.library.models import tiny_llama, tiny_tokenizer
from tests.library.paths import ROOT
from tests.library.runs import train, write_run_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("export")
    return write_run_inputs(folder) | {"max_steps": 2, "save_steps": 2, "lmbda": 0.0, "max_grad_norm": 0.0}


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[5, 80, 200, 7]])).logits


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_the_trained_students(ranks, inputs, tmp_path, monkeypatch, world_size, tied):
    fields = inputs | {"output_dir": str(tmp_path / "run")}
    if not tied:  # the teacher has a head of its own
        fields["model_name_or_path"] = inputs["teacher_model_name_or_path"]
    ranks(world_size).run(train, fields)
    assert not torch.distributed.is_initialized()
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    export.export_checkpoint(tmp_path / "run" / "checkpoints" / "step_2", tmp_path / "out", None)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) != tied
    assert len(set(index["weight_map"].values())) >= 2
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "run" / "final"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 259
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_dtype(ranks, inputs, tmp_path):
    ranks(2).run(train, inputs | {"output_dir": str(tmp_path / "run")})
    command = [sys.executable, "-m", "engine", "export", str(tmp_path / "run" / "checkpoints" / "step_2")]
    subprocess.run([*command, str(tmp_path / "bf16"), "--dtype", "bf16"], cwd=ROOT, check=True, capture_output=True)
    ours = load_file(tmp_path / "bf16" / "model.safetensors")
    theirs = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16


def test_a_shard_is_alive_and_not_the_model(tmp_path, monkeypatch):
    """32 tensors of 4 kB in shards of 8 kB: never more than a shard and the tensor that comes next."""
    monkeypatch.setattr(export, "SHARD_BYTES", 8192)
    alive, most = weakref.WeakSet(), [0]

    class Holder(torch.Tensor):
        pass

    def tensors():
        for number in range(32):
            tensor = torch.full((1024,), float(number)).as_subclass(Holder)
            alive.add(tensor)
            most[0] = max(most[0], len(alive))
            yield f"t{number}", tensor

    export.write_model_folder(tensors(), [], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 16 and most[0] <= 3
    assert load_file(tmp_path / "model-00016-of-00016.safetensors")["t31"][0] == 31


def save_larger(output_dir: str) -> None:
    """A checkpoint of a student of 76 MB in fp32, whose rank files take 230 MB."""
    tokenizer = tiny_tokenizer()
    config = GKDConfig(
        output_dir=output_dir, bf16=False, report_to="none", lmbda=0.0, max_steps=1, save_steps=1, max_length=32,
        max_new_tokens=8, per_device_train_batch_size=1, gradient_checkpointing=False,
    )  # fmt: skip
    student = tiny_llama(len(tokenizer), hidden_size=512, num_layers=8)
    teacher = tiny_llama(len(tokenizer))
    data = [{"prompt": "abc", "completion": "defgh"}] * 4
    trainer = GKDTrainer(student, teacher, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.run.student.engine.destroy()


# Prints the growth of the process's own memory in bytes while it exports (mapped files are the page cache's), and the
# bytes of the model.
MEASURE = """
import sys, threading, time
from pathlib import Path
from engine.models import export

def own_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

export.SHARD_BYTES = int(sys.argv[3])
before, peak, done = own_bytes(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own_bytes())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
export.export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), None)
done = True
thread.join()
print(peak - before, sum(f.stat().st_size for f in Path(sys.argv[2]).glob("*.safetensors")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_is_a_shard_not_the_model(ranks, tmp_path):
    ranks(1).run(save_larger, str(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(tmp_path / "out"), str(4 * 2**20)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    growth, model_bytes = map(int, done.stdout.split()[-2:])
    print(f"export of {model_bytes / 2**20:.0f} MiB in shards of 4 MiB grew by {growth / 2**20:.0f} MiB")
    # a shard, its bytes on the way to the file, a tensor's pieces, and what the allocator keeps
    assert model_bytes > 70 * 2**20 and growth < 24 * 2**20


def damage_optimizer(path: Path) -> str:
    victim = next(path.glob("*rank_1*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return f"{victim.name} has changed since it was written"


def cut(path: Path) -> str:
    victim = next(path.glob("*rank_0*model_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])
    return f"{victim.name} has {victim.stat().st_size} bytes instead of"


def lose_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "is not a complete checkpoint: no manifest.json"


@pytest.fixture(scope="module")
def checkpoint(ranks, inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks(2).run(train, inputs | {"output_dir": str(folder), "dataset_test_split": "none"})
    return folder / "checkpoints" / "step_2"


def run_export(words: list[str], capsys) -> tuple[int, str]:
    status = main(["export", *words])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("damage", [damage_optimizer, cut, lose_manifest])
def test_a_damaged_checkpoint_is_not_exported(checkpoint, tmp_path, capsys, damage):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "step_2"))
    message = damage(copy)
    status, said = run_export([str(copy), str(tmp_path / "out")], capsys)
    assert status == 2 and message in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"step_2"}


def test_a_folder_that_holds_something_is_left_alone(checkpoint, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    status, said = run_export([str(checkpoint), str(tmp_path)], capsys)
    assert status == 2 and "not an empty folder" in said
    status, said = run_export([str(checkpoint), str(tmp_path / "mine")], capsys)
    assert status == 2 and "not an empty folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert run_export([str(checkpoint), str(tmp_path / "empty")], capsys)[0] == 0
    assert torch.isfinite(logits_of(tmp_path / "empty")).all()


def test_a_disk_that_fills_leaves_nothing_half_written(checkpoint, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    try:
        status, said = run_export([str(checkpoint), str(tmp_path / "out")], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = said.splitlines()[-1]  # the progress of reading came before
    assert status == 1 and last.startswith("error: ") and "out cannot be written: model-00001.safetensors" in last
    assert list(tmp_path.iterdir()) == []
