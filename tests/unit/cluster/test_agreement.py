"""Agreement: what differs is named with its ranks and hosts; alone, a process agrees with itself; one home for it."""

from pathlib import Path

import pytest

import engine
from engine.cluster import agreement
from engine.cluster.agreement import all_or_none, differences, from_main, gather, merge_problems, together, union
from engine.cluster.hosts import by_host
from engine.errors import CheckpointError

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


def test_a_process_without_a_group_is_the_only_rank(tmp_path):
    def fail():
        raise ValueError("line 3")

    def fill():
        raise OSError("no space left")

    assert (gather(1), from_main(2), union({"b": 1, "a": 2})) == ([1], 2, {"a": 2, "b": 1})
    assert together(lambda: 3) == all_or_none("x", tmp_path, lambda: 3) == 3
    with pytest.raises(ValueError, match="^line 3$"):
        together(fail)
    with pytest.raises(CheckpointError, match=r"^x: rank 0: no space left \(disk: [0-9.]+ MiB free\)$"):
        all_or_none("x", tmp_path, fill)


def test_objects_cross_ranks_nowhere_else():
    """So that each way to agree, and to fail together, is there once."""
    files = Path(engine.__file__).parent.rglob("*.py")
    users = [path for path in files if "all_gather_object" in (text := path.read_text()) or "_object_list" in text]
    assert users == [Path(agreement.__file__)]
