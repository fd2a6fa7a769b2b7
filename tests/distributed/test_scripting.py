"""What scripts do with a trainer beside training: saved models, states, metrics, pushes, generation in a callback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from engine import GKDConfig, GKDTrainer
from engine.models.export import move_model
from tests.library.hub import TOKEN, fake_hub, taken_for_the_hub
from tests.library.runs import assert_same_run, checkpoints_in, train, write_run_inputs

PROMPTS = ["<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n", "yes", "a longer one", "no", "seven"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return write_run_inputs(tmp_path_factory.mktemp("scripting"))


@pytest.fixture(scope="module")
def plain(ranks, inputs, tmp_path_factory) -> dict:
    fields = inputs | {"output_dir": str(tmp_path_factory.mktemp("plain") / "run")}
    ranks(2).run(train, fields)
    return fields


def complete(tokenizer, model, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    return tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :])


class Completions(TrainerCallback):
    """Greedy completions of this rank's share of the prompts after every step."""

    def __init__(self) -> None:
        self.trainer: GKDTrainer | None = None
        self.seen: dict[int, list[tuple[str, str]]] = {}

    def on_step_end(self, args, state, control, processing_class=None, **kwargs):
        trainer = self.trainer
        with trainer.accelerator.split_between_processes(PROMPTS) as prompts:
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            self.seen[state.global_step] = [(p, complete(processing_class, model, p)) for p in prompts]


def work(fields: dict) -> dict:
    """A script: it trains with completions at every step, and saves."""
    callback = Completions()
    trainer = GKDTrainer(args=GKDConfig(**fields), callbacks=[callback])
    callback.trainer = trainer
    trainer.train()
    with pytest.raises(ValueError, match="split_between_processes"):
        trainer.model_wrapped.generate(torch.tensor([[1]]))
    trainer.save_model()
    trainer.save_model(Path(fields["output_dir"]) / "other")
    trainer.save_state()
    trainer.log_metrics("train", {"train_loss": 0.5, "train_runtime": 2.0})
    trainer.save_metrics("train", {"train_loss": 0.5})
    trainer.save_metrics("eval", {"eval_loss": 0.25})
    trainer.run.student.engine.destroy()
    return callback.seen


@pytest.fixture(scope="module")
def worked(ranks, inputs, tmp_path_factory) -> tuple[dict, list[dict]]:
    fields = inputs | {"output_dir": str(tmp_path_factory.mktemp("worked") / "run")}
    return fields, ranks(2).run(work, fields)


def test_completions_in_a_callback_are_the_students_and_leave_no_trace(worked, plain):
    fields, seen = worked
    assert [prompt for rank in seen for prompt, _ in rank[4]] == PROMPTS
    final = Path(fields["output_dir"]) / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert [text for rank in seen for _, text in rank[4]] == [complete(tokenizer, model, p) for p in PROMPTS]
    assert_same_run(fields, plain, tolerance=0.0)


def test_a_saved_model_is_the_student_and_what_lies_there_stays(worked):
    folder = Path(worked[0]["output_dir"])
    final = {path.name: path.read_bytes() for path in (folder / "final").iterdir()}
    for saved in (folder, folder / "other"):
        assert {name: (saved / name).read_bytes() for name in final} == final
    assert {path.name for path in (folder / "other").iterdir()} == final.keys()
    assert checkpoints_in(folder) == [2, 4] and (folder / "metrics.jsonl").is_file()
    assert [path.name for path in folder.glob(".*")] == []


def test_state_and_metrics_are_files(worked):
    folder = Path(worked[0]["output_dir"])
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["max_steps"] == 4 and len(state["log_history"]) >= 4
    assert json.loads((folder / "all_results.json").read_text()) == {"train_loss": 0.5, "eval_loss": 0.25}
    assert json.loads((folder / "train_results.json").read_text()) == {"train_loss": 0.5}


def test_a_saved_model_replaces_an_earlier_one_of_more_files(tmp_path):
    source, folder = tmp_path / "new", tmp_path / "model"
    for place in (source / "templates", folder / "templates"):
        place.mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "mine.txt", "templates/old"):
        (folder / name).write_text("old")
    save_file({"a": torch.ones(2)}, source / "model.safetensors")
    (source / "templates" / "new").write_text("new")
    move_model(source, folder)
    assert not source.exists() and load_file(folder / "model.safetensors")["a"].tolist() == [1, 1]
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["mine.txt", "model.safetensors", "templates/new"]


def push(fields: dict, is_there: bool) -> tuple:
    """A script that pushes when it has trained a step; what it got, and what the hub has."""
    with fake_hub() as hub, taken_for_the_hub(hub.url if is_there else None):
        trainer = GKDTrainer(args=GKDConfig(**fields))
        trainer.train()
        commit = trainer.push_to_hub("Mine", dataset_name="org/chats", tags=["x"], token=TOKEN)
        trainer.run.student.engine.destroy()
    return commit and commit.commit_message, hub.commits, hub.files


def test_a_script_pushes_whatever_the_configuration_says(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run"), "max_steps": 1, "hub_model_id": "me/tiny"}
    first, second = ranks(2).run(push, fields, True)
    assert first[:2] == ("Mine", ["Mine"]) and second == (None, [], {})
    files = first[2]["me/tiny", "main"]
    assert files["model.safetensors"] == (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert {"config.yaml", "metrics.jsonl"} & files.keys() == set() and not any("/" in name for name in files)
    data = ModelCard(files["README.md"].decode()).data
    assert data.datasets == "org/chats" and "x" in data.tags and data.base_model is None


def test_a_push_that_fails_ends_no_script(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    assert [answer[0] for answer in ranks(2).run(push, fields, False)] == [None, None]
    assert (tmp_path / "run" / "model.safetensors").is_file()


def generation_config(fields: dict) -> tuple[dict, list[int]]:
    trainer = GKDTrainer(args=GKDConfig(**fields))
    trainer.run.student.engine.destroy()
    return trainer.generation_config.to_diff_dict(), trainer.generation_config.eos_token_id


def test_the_generation_config_is_that_of_rollouts(ranks, inputs, tmp_path):
    fields = inputs | {"output_dir": str(tmp_path), "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 11}
    ((settings, stop_id),) = ranks(1).run(generation_config, fields)
    tokenizer = AutoTokenizer.from_pretrained(inputs["model_name_or_path"])
    assert settings.items() >= {
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_new_tokens": 11,
        "pad_token_id": tokenizer.pad_token_id,
    }.items()  # fmt: skip
    assert stop_id == tokenizer.eos_token_id


def arguments(fields: dict, given: dict) -> str:
    with pytest.raises(ValueError) as raised:
        GKDTrainer(args=GKDConfig(**fields), **given)
    return str(raised.value)


def test_what_cannot_be_used_is_refused_with_the_way_there_is(ranks, inputs):
    given = {"data_collator": list, "compute_metrics": len, "peft_config": {}}
    (said,) = ranks(1).run(arguments, inputs, given)
    assert [line.split("=:")[0] for line in said.splitlines()] == [
        "data_collator", "compute_metrics", "peft_config"
    ]  # fmt: skip
    assert "formatting_func=" in said and "on_evaluate" in said
