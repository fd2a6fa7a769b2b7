"""Rows in whole runs: prompts alone among answered rows, and a template that writes the date, resumed elsewhere."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.library.models import CHATML, tiny_tokenizer
from tests.library.runs import (
    assert_same_run,
    copy_at_step,
    metrics_of,
    read_lines,
    samples_of,
    train,
    write_run_inputs,
)

STEPS, SAVED_AT = 8, 3
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


def train_on(day: str, fields: dict) -> dict:
    """`train` on a day of one's choice."""
    import engine.assembly

    today = date.fromisoformat(day)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.assembly, "date", SimpleNamespace(today=lambda: today))
        return train(fields)


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("rows")
    fields = write_run_inputs(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder / "student")
    path = Path(fields["dataset_name"]) / "train.jsonl"
    rows = read_lines(path)
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = f"{'ask' if number % 4 else 'answered'} {number}"
        del row["messages"][1 if number % 4 else 2 :]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return fields | {
        "lmbda": 0.5, "seed": 3, "global_batch_size": 4, "max_steps": STEPS, "save_steps": SAVED_AT, "max_length": 46,
    }  # fmt: skip


def test_mixed_rows_and_the_date_resume_elsewhere(ranks, fields, tmp_path):
    """The same samples at another number of ranks and on another day; no step on the dataset has a prompt alone."""
    whole, decode = fields | {"output_dir": str(tmp_path / "whole")}, tiny_tokenizer().decode
    samples = samples_of(ranks(1).run(train_on, "2025-03-09", whole))
    on_policy = [bool(line["train/on_policy"]) for line in metrics_of(whole["output_dir"])]
    assert {True, False} <= set(on_policy[:SAVED_AT]) & set(on_policy[SAVED_AT:])
    assert all(line["train/tokens"] > 0 for line in metrics_of(whole["output_dir"]))
    for step, is_own in zip(samples, on_policy, strict=True):
        texts = [decode(input_ids) for _, input_ids in step]
        assert all(text.startswith("09 Mar 2025\n") for text in texts)
        assert is_own or all("answered" in text and "yes" in text for text in texts)
    assert any("ask" in decode(ids) for step, own in zip(samples, on_policy, strict=True) if own for _, ids in step)

    for line, step in zip(metrics_of(whole["output_dir"]), samples, strict=True):
        if line["train/on_policy"]:  # the longer prompts leave less than max_new_tokens
            clipped = sum("answered" in decode(input_ids) for _, input_ids in step)
            assert line["rollout/share_clipped"] == clipped / len(step)

    copy = copy_at_step(Path(whole["output_dir"]), tmp_path / "run")
    assert json.loads((copy / "checkpoints/step_3/manifest.json").read_text())["started"] == "2025-03-09"
    resumed = fields | {"output_dir": str(copy), "resume_from_checkpoint": "auto", "global_batch_size": None}
    assert samples_of(ranks(2).run(train_on, "2025-03-10", resumed)) == samples[SAVED_AT:]
    for ours, theirs in zip(metrics_of(copy), metrics_of(whole["output_dir"]), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


def train_on_tokens(fields: dict) -> dict:
    """`train` on the rows of `fields` as a script that tokenises them itself would hand them over."""
    import tests.library.runs as runs
    from engine import GKDConfig, GKDTrainer
    from engine.data.samples import build_rows

    config = GKDConfig(**fields)
    rows = build_rows(None, tiny_tokenizer(), config, "train")
    tokens = [
        {"input_ids": s.input_ids, "completion_mask": [int(scored) for scored in s.response_mask]}
        for s in (rows[i] for i in range(len(rows)))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "GKDTrainer", lambda args: GKDTrainer(args=args, train_dataset=tokens))
        return train(fields)


def test_tokenised_rows_train_as_the_messages_do(ranks, tmp_path):
    fields = write_run_inputs(tmp_path) | {"lmbda": 0.5, "seed": 3, "dataset_test_split": None}
    (tmp_path / "template.jinja").write_text(CHATML)
    messages = fields | {"output_dir": str(tmp_path / "a"), "chat_template_path": str(tmp_path / "template.jinja")}
    tokens = fields | {"output_dir": str(tmp_path / "b")}
    assert samples_of(ranks(2).run(train, messages)) == samples_of(ranks(2).run(train_on_tokens, tokens))
    assert_same_run(messages, tokens, tolerance=0)
    on_policy = {line["train/on_policy"] for line in metrics_of(tokens["output_dir"])}
    assert on_policy == {0.0, 1.0}
