"""The real commands in subprocesses: every launcher, TRL's example, bad input, resume, evaluate, export, wandb."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from tests.library.launch import launcher, run
from tests.library.paths import ROOT
from tests.library.ranks import Ranks
from tests.library.runs import read_metrics, write_run_inputs

TRL_EXAMPLE = ROOT / "tests" / "integration" / "trl_example.md"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    fields = write_run_inputs(folder) | {"eval_on_start": True, "run_name": "commands"}
    fields["report_to"] = ["wandb", "tensorboard"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def finished(recipe) -> tuple[Path, str]:
    """A finished two-rank run under the deepspeed launcher, and what it printed."""
    done = run([*launcher("deepspeed", 2), "--module", "engine", "train", "--config", str(recipe)])
    assert done.returncode == 0, done.stdout[-4000:]
    return recipe.parent / "run", done.stdout


def test_the_console_has_the_runs_own_lines_and_the_log_the_rest(finished):
    folder, printed = finished
    log = (folder / "logs" / "rank_0.log").read_text()
    assert "wandb: " in log and "wandb: " not in printed  # a library's lines
    assert "examples/s" not in printed  # a library's bar, which comes where no earlier test has read the same rows
    assert "FutureWarning" not in printed and "step 4/4" in printed and "step 4/4" not in log
    assert (folder / "logs" / "rank_1.log").is_file()


def test_train_under_deepspeed(finished):
    folder, printed = finished
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert {"train/loss", "train/grad_norm", "train/lr", "train/on_policy", "train/tokens", "perf/step_s"} <= metrics[
        1
    ].keys()
    assert {"eval/divergence", "eval/divergence_on_policy", "eval/perplexity"} <= metrics[0].keys() & metrics[4].keys()
    assert (folder / "config.yaml").is_file() and (folder / "checkpoints" / "step_4" / "manifest.json").is_file()
    for text in (
        "divergence, references",
        "perplexity",
        "before:",
        "after:",
        "run folder:",
        "wandb run:",
        "tensorboard run:",
        "student (HF):",
    ):
        assert text in printed
    before, after = (line["eval/divergence"] for line in (metrics[0], metrics[4]))
    assert f"{before:.4f}" in printed and f"{after:.4f}" in printed


def test_the_export_is_the_trained_student(finished, tmp_path):
    """`final/` and `export` of the last checkpoint load in transformers and give the same logits."""
    folder, _ = finished
    done = run(
        [sys.executable, "-m", "engine", "export", str(folder / "checkpoints" / "step_4"), str(tmp_path / "out")]
    )
    assert done.returncode == 0, done.stdout
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder / "final", tmp_path / "out")]
    ids = torch.tensor([[5, 80, 200, 7]])
    with torch.no_grad():
        first, second = (model(ids).logits for model in models)
    assert torch.equal(first, second)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"
    done = run([sys.executable, "-m", "engine", "export", str(folder / "checkpoints"), str(tmp_path / "no")])
    assert done.returncode == 2 and "is not a complete checkpoint" in done.stdout


def test_evaluate_gives_the_runs_own_figures(finished, recipe):
    folder, _ = finished
    words = ["evaluate", "--config", str(recipe), "--model_name_or_path", str(folder / "final"), "--report_to", "none"]
    done = run([sys.executable, "-m", "engine", *words])
    assert done.returncode == 0, done.stdout[-3000:]
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    for name in ("eval/divergence", "eval/perplexity", "eval/divergence_on_policy"):
        assert figures[name] == pytest.approx(read_metrics(folder)[-1][name], rel=1e-5)


def test_resume_keeps_the_wandb_run_and_repeats_no_step(finished, recipe, tmp_path):
    folder, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step_4")
    words = ["train", "--config", str(recipe), "--output_dir", str(copy), "--resume_from_checkpoint", "auto"]
    done = run([*launcher("torchrun", 2), "-m", "engine", *words])
    assert done.returncode == 0, done.stdout[-4000:]
    metrics = read_metrics(copy)
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(metrics, read_metrics(folder), strict=True):
        assert all(ours[name] == theirs[name] for name in ours if name.startswith(("train/", "eval/")))
    ids = {path.name.rsplit("-", 1)[-1] for path in (copy / "wandb").glob("offline-run-*")}
    assert len(ids) == 1 and len(list((copy / "wandb").glob("offline-run-*"))) == 2


TRL_SWAP = {
    "from trl import GKDConfig, GKDTrainer": "from engine import GKDConfig, GKDTrainer",
    '"Qwen/Qwen2-0.5B-Instruct"': "STUDENT",
    '"Qwen/Qwen2-1.5B-Instruct"': "TEACHER",
    "NUM_DUMMY_SAMPLES = 100": "NUM_DUMMY_SAMPLES = 4",
}


@pytest.mark.parametrize(
    "kind,num_ranks", [("python", 1), ("deepspeed", 2), pytest.param("torchrun", 2, marks=pytest.mark.slow)]
)
def test_trls_example_with_one_import_changed(recipe, tmp_path, kind, num_ranks):
    """The basic example of TRL's documentation, tiny models in place of Qwen2 and fewer rows."""
    code = TRL_EXAMPLE.read_text().split("```python\n")[1].split("```")[0]
    for old, new in TRL_SWAP.items():
        assert old in code
        code = code.replace(old, new)
    names = f"STUDENT = {str(recipe.parent / 'student')!r}\nTEACHER = {str(recipe.parent / 'teacher')!r}\n"
    script = tmp_path / "example.py"
    script.write_text(names + code.replace('"gkd-model"', repr(str(tmp_path / "gkd-model"))))
    done = run([*launcher(kind, num_ranks), str(script)])
    assert done.returncode == 0, done.stdout[-4000:]
    assert read_metrics(tmp_path / "gkd-model")[-1]["train/tokens"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "gkd-model" / "final")


def broken(tmp_path: Path, recipe: Path) -> dict[str, tuple[list[str], str]]:
    """Bad inputs by name: flags, and what the message must say."""
    rows = tmp_path / "rows"
    rows.mkdir()
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    files = {
        "empty": [],
        "role": [good, {"messages": [{"role": "robot", "content": "a"}]}],
        "late": [good, good, {"prompt": "a", "completion": "\ud800"}],
        "weight": [good, {"messages": [good["messages"][0], {**good["messages"][1], "weight": 2}]}],
        "turn": [{"messages": [{"role": "user", "content": "a"}]}] * 3,
    }
    for name, lines in files.items():
        (rows / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    GPT2Config(n_positions=16, vocab_size=259, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "gpt2")
    other = tmp_path / "other"
    shutil.copytree(recipe.parent / "teacher", other)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocab = vocabulary["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 7}')
    return {
        "misspelt field": (["--lmda", "1"], "did you mean `lmbda`"),
        "beta": (["--beta", "2"], "beta=2.0: must be in [0, 1]"),
        "empty dataset": (["--dataset_name", str(rows / "empty.jsonl"), "--eval_on_start", "false"], "empty"),
        "unknown role": (["--dataset_name", str(rows / "role.jsonl"), "--eval_on_start", "false"], "line 2"),
        "late row": (["--dataset_name", str(rows / "late.jsonl"), "--eval_on_start", "false"], "late.jsonl, line 3: "),
        "weight": (["--dataset_name", str(rows / "weight.jsonl"), "--eval_on_start", "false"], "weight=2: must be 0"),
        "positions": (["--model_name_or_path", str(tmp_path / "gpt2")], "the student (gpt2) has 16 positions"),
        "no answer": (["--dataset_name", str(rows / "turn.jsonl"), "--eval_on_start", "false"], "rows 1 to 3"),
        "tokenizers": (["--teacher_model_name_or_path", str(other)], "tokenizers differ"),
        "deepspeed": (["--deepspeed", str(tmp_path / "ds.json")], "`gradient_clipping`=7 contradicts"),
        "batch": (["--global_batch_size", "3"], "global_batch_size=3 cannot be split over 1 ranks"),
        "no checkpoint": (["--resume_from_checkpoint", str(tmp_path / "none")], "not a complete checkpoint"),
        "no model": (["--model_name_or_path", str(tmp_path / "nothing")], "nothing"),
    }


def refusals(recipe: Path, output_dir: Path, cases: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Exit status and message of each case, in one process in which loading a model is a failure."""
    import transformers

    from engine.cli import main

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    transformers.AutoModelForCausalLM.from_pretrained = refuse
    results = {}
    for name, flags in cases.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(["train", "--config", str(recipe), "--output_dir", str(output_dir), *flags])
        results[name] = (status, said.getvalue())
    return results


def test_bad_input_is_refused_before_any_model_loads(recipe, tmp_path):
    cases = broken(tmp_path, recipe)
    world = Ranks(1)
    try:
        flags = {name: words for name, (words, _) in cases.items()}
        (results,) = world.run(refusals, recipe, tmp_path / "run", flags)
    finally:
        world.stop()
    for name, (_, message) in cases.items():
        status, said = results[name]
        assert status == 2 and message in said, (name, said)


def test_a_truncated_checkpoint_is_named(finished, recipe, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "checkpoints" / "step_4", tmp_path / "step_4")
    victim = next((tmp_path / "step_4").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])
    words = ["train", "--config", str(recipe), "--resume_from_checkpoint", str(tmp_path / "step_4")]
    done = run([*launcher("deepspeed", 2), "--module", "engine", *words])
    assert done.returncode != 0
    assert f"{victim.name} has {victim.stat().st_size} bytes instead of" in done.stdout
