"""Rows that scripts bring in other shapes: tokenised, one text, or made by a `formatting_func`."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from engine.config import GKDConfig
from engine.data.samples import StepData, build_rows
from tests.library.models import tiny_tokenizer
from tests.library.rows import dialogues, talk

SHORT = {"max_length": 200, "max_new_tokens": 8, "per_device_train_batch_size": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "gkd-engine"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def build(data, tokenizer, formatting_func=None, **settings):
    return build_rows(data, tokenizer, GKDConfig(**(SHORT | settings)), "train", formatting_func=formatting_func)


def samples(rows) -> list[tuple]:
    return [(s.prompt_ids, s.input_ids, s.response_mask) for s in (rows[i] for i in range(len(rows)))]


def tokenised(rows: list[tuple], column: str) -> list[dict]:
    """The samples as a script's own `map` would have left them, with padding on both sides."""
    made = []
    for _, input_ids, mask in rows:
        ids, scored = [0, 0, *input_ids, 7, 7], [False, False, *mask, False, False]
        values = [t if s else -100 for t, s in zip(ids, scored, strict=True)] if column == "labels" else scored
        attention = [0, 0] + [1] * len(input_ids) + [0, 0]
        made.append({"input_ids": ids, "attention_mask": attention, column: [int(value) for value in values]})
    return made


CONVERSATIONS = [{"messages": talk("a", "yes", "b", "no no")}, *dialogues(3), {"messages": talk("only asked")}]


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "dataset"])
def test_tokenised_rows_are_the_same_samples(tokenizer, column, kind):
    expected = samples(build(CONVERSATIONS, tokenizer))
    assert samples(build(kind(tokenised(expected, column)), tokenizer)) == expected


def test_arrays_are_lists(tokenizer):
    row = {"input_ids": np.array([5, 6, 7]), "labels": np.array([-100, 6, 7])}
    assert samples(build([row], tokenizer)) == [([5], [5, 6, 7], [False, True, True])]


def test_tokens_that_say_what_is_scored_win_over_messages(tokenizer, caplog):
    row = {"messages": talk("a", "b"), "input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
    assert samples(build([row], tokenizer)) == [([5, 6], [5, 6, 7], [False, False, True])]
    assert "`input_ids` win over `messages`" in caplog.text
    said_by_nobody = {"messages": talk("a", "b"), "input_ids": [5, 6, 7]}
    assert samples(build([said_by_nobody], tokenizer)) == samples(build([{"messages": talk("a", "b")}], tokenizer))


@pytest.mark.parametrize(("max_length", "start"), [(20, 7), (9, 7), (8, 7), (7, 3), (5, 3), (4, 3)])
def test_what_does_not_fit_loses_its_last_runs(tokenizer, max_length, start):
    ids, mask = list(range(10, 20)), [False] * 3 + [True] * 2 + [False] * 2 + [True] * 2 + [False]
    row = {"input_ids": ids, "completion_mask": [int(scored) for scored in mask]}
    built = build([row], tokenizer, max_length=max_length, max_new_tokens=1)
    assert samples(built) == [(ids[:start], ids[:max_length], mask[:max_length])]


def test_no_room_for_a_scored_token(tokenizer):
    rows = [{"input_ids": list(range(10, 20)), "completion_mask": [0] * 9 + [1]}] * 2
    with pytest.raises(ValueError, match="every prompt fills max_length=9"):
        build(rows, tokenizer, max_length=9, max_new_tokens=1)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 entries and `input_ids` 2"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "the engine shifts them itself"),
        ({"input_ids": [1, 2], "completion_mask": [0, 2]}, "must hold 0 and 1 alone"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 0, 1]}, "a 0 between two tokens"),
        ({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [0, 0]}, "has no token"),
        ({"input_ids": [], "labels": []}, "has no token"),
        ({"input_ids": [1, -2], "completion_mask": [0, 1]}, "negative number: -2"),
        ({"input_ids": "1 2", "labels": [1]}, "must be a list of whole numbers"),
        ({"input_ids": [1, 10**6], "labels": [-100, 10**6]}, "1000000"),
        ({"input_ids": [1, 2]}, "does not say where a prompt ends"),
        ({"text": "hello"}, "does not say where a prompt ends"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(tokenizer, row, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_rows([row], tokenizer, GKDConfig(**SHORT), "train", num_embeddings=len(tokenizer))


def test_texts_are_scored_whole_where_nothing_is_sampled(tokenizer):
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    expected = [(ids[:1], ids, [False] + [True] * (len(ids) - 1))]
    assert samples(build([{"text": "one two"}], tokenizer, lmbda=0)) == expected
    assert samples(build([{"body": "one two"}], tokenizer, lmbda=0, dataset_text_field="body")) == expected
    assert samples(build(Dataset.from_list([{"body": "one two", "x": 1}]), tokenizer, lmbda=0,
                         dataset_text_field="body")) == expected  # fmt: skip
    assert samples(build([{"input_ids": ids}], tokenizer, lmbda=0)) == expected
    with pytest.raises(ValueError, match="does not say where a prompt ends"):
        build([{"text": "one two"}], tokenizer, lmbda=0, seq_kd=True)


def as_messages(example: dict) -> dict:
    return {"messages": talk(example["question"], example["reply"])}


def as_more_polite(example: dict) -> dict:
    return {"messages": talk(example["question"] + " please", example["reply"])}


QUESTIONS = [{"question": f"question {i}", "reply": f"answer {i}", "meta": {"a": i}} for i in range(6)]


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "dataset"])
def test_a_formatting_function_makes_the_rows(tokenizer, cache, kind):
    built = build(kind(QUESTIONS), tokenizer, as_messages, dataset_num_proc=2)
    assert samples(built) == samples(build(dialogues(6), tokenizer))
    files = sorted(cache.glob("*.arrow"))
    assert samples(build(kind(QUESTIONS), tokenizer, as_messages)) == samples(built)
    assert sorted(cache.glob("*.arrow")) == files  # found again
    other = build(kind(QUESTIONS), tokenizer, as_more_polite)
    assert samples(other) != samples(built)
    assert other.fingerprint != built.fingerprint  # a run that resumes is told of other rows


def test_a_function_over_a_stream(tokenizer):
    settings = GKDConfig(**SHORT, max_steps=2, seed=3)
    stream = build_rows(IterableDataset.from_generator(lambda: iter(QUESTIONS)), tokenizer, settings, "train",
                        formatting_func=as_messages)  # fmt: skip
    plain = build_rows(IterableDataset.from_generator(lambda: iter(dialogues(6))), tokenizer, settings, "train")
    assert StepData(stream, settings, 1, 0).step_batches(1) == StepData(plain, settings, 1, 0).step_batches(1)
    assert stream.fingerprint == plain.fingerprint


def test_a_function_that_changes_its_row_does_not_change_the_callers(tokenizer):
    def take_out(example: dict) -> dict:
        example["meta"].clear()
        return as_messages(example)

    rows = [{**row, "meta": {"a": 1}} for row in QUESTIONS]
    build(rows, tokenizer, take_out)
    assert all(row["meta"] == {"a": 1} for row in rows)


def test_a_function_that_cannot_be_pickled_keeps_nothing(tokenizer, caplog):
    running = (i for i in range(10))  # a generator

    def guarded(example: dict) -> dict:
        next(running)
        return as_messages(example)

    built = build(QUESTIONS, tokenizer, guarded, dataset_num_proc=2)
    assert samples(built) == samples(build(dialogues(6), tokenizer))
    assert "formatting_func cannot be pickled" in caplog.text


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda example: example["no"], r"formatting_func failed on it \(KeyError: 'no'\)"),
        (lambda example: ["a", "b"], "gave a list: it gets one row at a time"),
        (lambda example: "a text", "has `text` alone"),
        (lambda example: {"messages": []}, "must be a list of messages"),
    ],
    ids=["fails", "list", "text", "bad row"],
)
def test_a_function_that_makes_no_row(tokenizer, function, sentence):
    with pytest.raises(ValueError, match=f"row 1: .*{sentence}.*6 of 6 rows"):
        build(QUESTIONS, tokenizer, function)


def test_data_seed_orders_the_rows(tokenizer):
    def order(**settings) -> list:
        config = GKDConfig(**(SHORT | settings))
        step = StepData(build(dialogues(30), tokenizer), config, 1, 0).step_batches(0)
        return [sample.input_ids for batch in step for sample in batch]

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) == order(seed=5)
    assert order(seed=5, data_seed=1) != order(seed=5)


def test_no_prompt_is_scored():
    assert GKDConfig(**SHORT, completion_only_loss=True) is not None
    with pytest.raises(ValueError, match="completion_only_loss=false: tokens of a prompt never count"):
        GKDConfig(**SHORT, completion_only_loss=False)
