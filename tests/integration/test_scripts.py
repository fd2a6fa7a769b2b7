"""Scripts as people write them for TRL's GKDTrainer run with the one import changed, at one rank and at two.

The scripts in `scripts/` run with the real TRL as they are. A test changes the import, and names of models and data.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.library.hub import TOKEN, FakeHub, fake_hub
from tests.library.launch import launcher, run
from tests.library.paths import ROOT
from tests.library.runs import checkpoints_in, read_lines, read_metrics, write_run_inputs

SCRIPTS = ROOT / "tests" / "integration" / "scripts"
IMPORT = re.compile(r"^from trl(\.experimental\.gkd)? import GKDConfig, GKDTrainer$", re.MULTILINE)
AT = [pytest.param("python", 1, id="1"), pytest.param("deepspeed", 2, id="2")]
# Of one rank under `python`, the other two scripts tell.
AT_TWO = [pytest.param("python", 1, id="1", marks=pytest.mark.slow), AT[1]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with `student`, `teacher` and `data`, whose rows have the prompt as text, too."""
    folder = tmp_path_factory.mktemp("scripts")
    write_run_inputs(folder)
    for path in (folder / "data").glob("*.jsonl"):
        rows = [
            {**row, "prompt": f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"}
            for row in read_lines(path)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(name: str, kind: str, num_ranks: int, inputs: Path, folder: Path, *words: str, **environment: str) -> str:
    """Run a script to its end with the import changed, and its models, data and output folder; what it printed."""
    code, count = IMPORT.subn("from engine import GKDConfig, GKDTrainer", (SCRIPTS / f"{name}.py").read_text())
    assert count == 1
    places = {"STUDENT": inputs / "student", "TEACHER": inputs / "teacher", "DATA": inputs / "data"}
    for constant, place in {**places, "OUTPUT": folder / "out"}.items():
        code = re.sub(rf'^{constant} = ".*"$', f"{constant} = {str(place)!r}", code, flags=re.MULTILINE)
    script = folder / f"{name}.py"
    script.write_text(code)
    done = run([*launcher(kind, num_ranks), str(script), *words], **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("kind,num_ranks", AT_TWO)
def test_strategies_metrics_and_save_model(inputs, tmp_path, kind, num_ranks):
    printed = start("strategies", kind, num_ranks, inputs, tmp_path)
    out, steps_per_epoch = tmp_path / "out", 24 // (4 * num_ranks)
    assert len(re.findall(rf"trained {2 * steps_per_epoch} steps, loss \d\.\d+, eval_loss \d\.\d+", printed)) == 1
    assert checkpoints_in(out) == [2 * steps_per_epoch]
    entries = history(out)
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 2 * steps_per_epoch + 1))
    evaluated = [e["step"] for e in entries if "eval_loss" in e]
    assert evaluated[:steps_per_epoch] == list(range(2, 2 * steps_per_epoch + 1, 2))
    assert sum("train_loss" in e for e in entries) == 1
    results = {split: json.loads((out / f"{split}_results.json").read_text()) for split in ("train", "eval", "all")}
    assert results["train"]["train_samples"] == 24 and results["eval"]["eval_loss"] > 0
    assert results["all"] == results["train"] | results["eval"]
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in saved.parameters()) > 0 and AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize("kind,num_ranks", AT)
def test_the_best_model_and_callbacks(inputs, tmp_path, kind, num_ranks):
    """The first call is stopped by a callback at step 4; the second goes on from there."""
    (tmp_path / "out").mkdir()
    for step, words in ((4, []), (8, ["--resume"])):
        printed = start("best_model", kind, num_ranks, inputs, tmp_path, *words)
        assert re.search(rf"step {step}, best \d\.\d+ at step_\d", printed)
    lines = read_lines(tmp_path / "out" / "losses.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["loss"] > 0 and 0 <= line["lr"] <= 1e-3 for line in lines)
    assert {line["step"]: line["train/loss"] for line in read_metrics(tmp_path / "out")} == pytest.approx(
        {line["step"]: line["loss"] for line in lines}
    )
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    best = min((e for e in state["log_history"] if "eval_loss" in e), key=lambda e: e["eval_loss"])
    assert state["best_metric"] == best["eval_loss"] and state["best_global_step"] == best["step"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best-model")


@pytest.mark.parametrize("kind,num_ranks", AT_TWO)
def test_positional_arguments_and_mapped_rows(inputs, tmp_path, kind, num_ranks):
    printed = start("positional", kind, num_ranks, inputs, tmp_path)
    metrics = read_metrics(tmp_path / "out")
    assert [line["step"] for line in metrics] == [1, 2] and "eval/divergence" not in metrics[-1]
    assert all(line["train/on_policy"] == 1 for line in metrics)
    assert f"losses {[line['train/loss'] for line in metrics]}" in printed
    assert checkpoints_in(tmp_path / "out") == []
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.fixture
def hub():
    with fake_hub() as hub:
        yield hub


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL's parser, for Python 3.11 or newer")
@pytest.mark.parametrize("kind,num_ranks", AT)
def test_trls_example_with_its_parser(inputs, tmp_path, hub: FakeHub, kind, num_ranks):
    """TrlParser, ScriptArguments, ModelConfig and LogCompletionsCallback are TRL's; the model lands on the hub."""
    words = ["--model_name_or_path", inputs / "student", "--teacher_model_name_or_path", inputs / "teacher",
             "--dataset_name", inputs / "data", "--output_dir", tmp_path / "out", "--eval_strategy", "steps",
             "--eval_steps", 2, "--save_steps", 2, "--max_steps", 4, "--per_device_train_batch_size", 2,
             "--max_length", 64, "--max_new_tokens", 8, "--bf16", "false", "--report_to", "wandb", "--logging_steps", 1,
             "--push_to_hub", "--hub_model_id", "me/distilled", "--hub_token", TOKEN]  # fmt: skip
    start("trl_parser", kind, num_ranks, inputs, tmp_path, *map(str, words), **hub.environment())
    out = tmp_path / "out"
    assert [line["step"] for line in read_metrics(out) if "eval/divergence" in line] == [2, 4]
    tables = sorted(out.glob("wandb/offline-run-*/files/media/table/completions*.json"))
    rows = json.loads(tables[-1].read_text())["data"]
    assert [row[0] for row in rows] == ["2"] * 4 + ["4"] * 4 and all("<|im_start|>user\ntest" in row[1] for row in rows)

    files = hub.files["me/distilled", "main"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert {"Training in progress, step 2", "End of training"} <= set(hub.commits)
    assert "2306.13649" in ModelCard(files["README.md"].decode()).text
    nowhere = [path for path in (*out.rglob("*"), *files) if TOKEN.encode() in content(path, files)]
    assert nowhere == []
    assert not any(str(tmp_path).encode() in text for name, text in files.items() if name != "model.safetensors")


def content(path: Path | str, files: dict[str, bytes]) -> bytes:
    if isinstance(path, str):
        return files[path]
    return path.read_bytes() if path.is_file() else b""
