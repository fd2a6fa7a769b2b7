"""Runs that publish: what the hub gets while they train and at their end, and that a hub which fails costs nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.library.hub import TOKEN, FakeHub, fake_hub, taken_for_the_hub
from tests.library.runs import assert_same_run, checkpoints_in, train, write_run_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return write_run_inputs(tmp_path_factory.mktemp("publish"))


def train_at(fields: dict, is_there: bool = True) -> FakeHub:
    """Train on this rank, with a hub in this process, or with none where it should be; what the hub has got then."""
    with fake_hub() as hub, taken_for_the_hub(hub.url if is_there else None):
        train(fields)
    return hub


@pytest.fixture(scope="module")
def plain(ranks, inputs, tmp_path_factory) -> dict:
    """The run that nobody publishes."""
    fields = inputs | {"output_dir": str(tmp_path_factory.mktemp("plain") / "run")}
    ranks(2).run(train, fields)
    return fields


def publishing(inputs: dict, tmp_path: Path, **fields) -> dict:
    return inputs | {"output_dir": str(tmp_path / "run"), "push_to_hub": True, "hub_token": TOKEN} | fields


def test_checkpoints_and_the_end_are_pushed_and_training_is_the_same(ranks, inputs, plain, tmp_path):
    fields = publishing(inputs, tmp_path, hub_model_id="me/tiny", save_steps=1, hub_always_push=True)
    hub, others = ranks(2).run(train_at, fields)
    assert others.commits == [] and others.private == {}  # rank 0 alone talks
    assert hub.commits == [f"Training in progress, step {step}" for step in (1, 2, 3)] + ["End of training"]
    final = Path(fields["output_dir"]) / "final"
    assert hub.files["me/tiny", "main"] == {path.name: path.read_bytes() for path in final.iterdir()}
    assert_same_run(fields, plain, tolerance=0.0)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert not list((tmp_path / "run").glob(".*"))  # what was exported for the hub alone


def test_only_the_end_is_pushed_where_that_is_asked_for(ranks, inputs, tmp_path):
    hub, _ = ranks(2).run(train_at, publishing(inputs, tmp_path, hub_strategy="end"))
    assert hub.commits == ["End of training"] and hub.private == {"me/run": False}


def test_a_hub_that_is_not_there_costs_nothing(ranks, inputs, plain, tmp_path):
    fields, started_s = publishing(inputs, tmp_path), time.monotonic()
    ranks(2).run(train_at, fields, False)
    assert time.monotonic() - started_s < 60
    assert checkpoints_in(Path(fields["output_dir"])) == [2, 4]
    assert_same_run(fields, plain, tolerance=0.0)


def refused(fields: dict) -> str:
    with pytest.raises(ValueError, match="the hub refuses") as raised:
        train_at(fields)
    return str(raised.value)


def test_a_wrong_token_ends_all_ranks_before_anything_is_written(ranks, inputs, tmp_path):
    said = ranks(2).run(refused, publishing(inputs, tmp_path, hub_token="hf_wrong"))
    assert said[0] == said[1] and "401" in said[0] and "hf_wrong" not in said[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
