"""A fingerprint of the rows changes with any row."""

import json

from datasets import Dataset

from engine.data.sources import JsonLines, fingerprint


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
