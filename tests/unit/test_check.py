"""Comparing ranks: what differs is named with its ranks and hosts; a fingerprint changes with any row."""

import json

from datasets import Dataset

from engine.check import differences, merge_problems
from engine.cluster.hosts import by_host
from engine.data.sources import JsonLines, fingerprint

WHERE = ["n1", "n1", "n2", "n2"]


def test_differences_name_ranks_and_hosts():
    records = [{"torch": "2.13", "nccl": "2.27"}] * 3 + [{"torch": "2.12"}]
    assert differences(records, WHERE) == [
        "nccl differs: 2.27 on ranks 0, 1 on n1; rank 2 on n2, but not there on rank 3 on n2",
        "torch differs: 2.13 on ranks 0, 1 on n1; rank 2 on n2, but 2.12 on rank 3 on n2",
    ]
    assert differences(records[:3], WHERE) == []


def test_a_problem_of_all_ranks_is_told_once():
    assert merge_problems(WHERE, [["no such file"]] * 4) == ["no such file"]
    assert merge_problems(WHERE, [[], [], ["no such file"], ["no such file"]]) == ["ranks 2, 3 on n2: no such file"]
    assert by_host({0: "n1", 1: "n2", 2: "n1"}) == "ranks 0, 2 on n1; rank 1 on n2"


def test_a_fingerprint_changes_with_one_row(tmp_path):
    rows = [{"prompt": f"question {i}"} for i in range(50)]
    changed = [*rows[:-1], {"prompt": "question 49!"}]
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, content in ((file, rows), (other, changed)):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    for kind in (lambda content: content, Dataset.from_list):
        assert fingerprint(kind(rows)) == fingerprint(kind(list(rows))) != fingerprint(kind(changed))
    assert fingerprint(JsonLines(file)) != fingerprint(JsonLines(other))
    assert fingerprint(Dataset.from_list(rows).to_iterable_dataset()) == fingerprint(
        Dataset.from_list(rows).to_iterable_dataset()
    )
