"""Which differences from a checkpoint's configuration and rows are named, and which are refused."""

from __future__ import annotations

import json

from engine.checkpoint.changes import OF_THE_CHECKPOINT, ORDER_OF_ROWS, WITHOUT_A_WORD, compare_fields, compare_rows
from engine.config import GKDConfig


def saved(**fields) -> dict:
    return json.loads(json.dumps(GKDConfig(**fields).to_dict(), default=str))


def test_every_name_is_a_field_of_one_kind():
    named = [*WITHOUT_A_WORD, *ORDER_OF_ROWS, *OF_THE_CHECKPOINT]
    assert len(named) == len(set(named)) and set(named) <= set(GKDConfig.options())


def test_equal_configurations_and_costs_are_not_mentioned():
    both = {"deepspeed": {"zero_optimization": {"stage": 3}}, "wandb_tags": ["a"]}
    changes = compare_fields(saved(**both), GKDConfig(**both, save_steps=7, output_dir="elsewhere", logging_steps=1))
    assert changes.said == [] == changes.order
    of_trl = {"packing": True, "dataloader_num_workers": 1, "eval_strategy": "no", "hub_model_id": "a/b"}
    now = GKDConfig(dataloader_num_workers=2, eval_steps=3, push_to_hub=True, log_level="info", use_cpu=True)
    changes = compare_fields(saved(**of_trl), now)
    assert changes.said == [] == changes.order


def test_each_kind_says_what_counts():
    old = saved(model_name_or_path="a", beta=0.5, seed=1) | {"went": 3}
    changes = compare_fields(old, GKDConfig(model_name_or_path="b", beta=0.1, seed=2))
    assert changes.said == [
        "beta=0.5 in the checkpoint, 0.1 now: the new value counts",
        "model_name_or_path='a' in the checkpoint, 'b' now: the weights are the checkpoint's",
    ]
    (text,) = compare_fields(saved(), GKDConfig(data_seed=7)).order
    assert text.startswith("data_seed=None in the checkpoint, 7 now: the order of rows")
    assert len(changes.order) == 1 and changes.order[0].startswith("seed=1 in the checkpoint, 2 now: the order of rows")


def test_rows_of_a_stream_have_a_digest_and_no_number():
    before = {"train": {"split": "train", "digest": "a", "rows": None}}
    assert compare_rows(before, before).order == [] == compare_rows({}, before).order
    (text,) = compare_rows(before, {"train": before["train"] | {"digest": "b"}}).order
    assert "the rows of split 'train' are not those of the checkpoint (a stream then, a stream now)" in text
