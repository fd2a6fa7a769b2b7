"""Whether a dataset has a split to evaluate on, told without reading its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from engine.config import GKDConfig
from engine.data.sources import has_split

ROWS = Dataset.from_list([{"prompt": "a", "completion": "b"}])


def write(folder: Path, kind: str, splits: list[str]) -> Path:
    if kind == "saved":
        DatasetDict({split: ROWS for split in splits}).save_to_disk(folder)
        return folder
    if kind == "saved, one":
        ROWS.save_to_disk(folder)
        return folder
    folder.mkdir()
    for split in splits:
        ROWS.to_parquet(folder / f"{split}.parquet") if kind == "parquet" else ROWS.to_json(folder / f"{split}.jsonl")
    return folder / "train.jsonl" if kind == "file" else folder


@pytest.mark.parametrize("kind", ["jsonl", "saved", "parquet"])
@pytest.mark.parametrize("splits", [["train"], ["train", "test"]], ids="_".join)
def test_folders(tmp_path, kind, splits):
    config = GKDConfig(dataset_name=str(write(tmp_path / "data", kind, splits)))
    assert [has_split(config, split) for split in ("train", "test")] == [True, "test" in splits]


@pytest.mark.parametrize("kind", ["file", "saved, one"])
def test_one_dataset_is_the_training_split(tmp_path, kind):
    config = GKDConfig(dataset_name=str(write(tmp_path / "data", kind, ["train", "test"])))
    assert has_split(config, "train") and not has_split(config, "test")


def test_a_hub_that_cannot_be_reached_is_no_error(monkeypatch, caplog):
    def fail(*_) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("engine.data.sources.get_dataset_split_names", fail)
    assert not has_split(GKDConfig(dataset_name="some/where"), "test") and "cannot tell" in caplog.text
