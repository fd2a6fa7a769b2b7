"""Ranks that compare themselves: an error of one is an error of all; who goes first; clocks and disks."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from engine import check
from engine.assembly import assemble
from engine.cluster import hosts
from engine.cluster.agreement import together
from engine.config import GKDConfig
from engine.inputs import Inputs


def one_fails() -> str:
    def action() -> None:
        if dist.get_rank() == 1:
            raise ValueError("line 3: no such role")

    with pytest.raises(ValueError) as raised:
        together(action)
    return str(raised.value)


def test_an_error_of_one_rank_is_raised_on_all(ranks):
    (text,) = set(ranks(2).run(one_fails))
    assert text == f"rank 1 on {hosts.host_name()}: line 3: no such role"


def compare_rows() -> str:
    with pytest.raises(ValueError) as raised:
        check.same_data({"train": f"of rank {dist.get_rank()}"})
    check.same_data({"train": "alike"})
    return str(raised.value)


def test_rows_that_differ_are_an_error_on_all_ranks(ranks):
    (text,) = set(ranks(2).run(compare_rows))
    assert text.startswith("the ranks are not alike: dataset split train differs: ") and "but" in text


def take_turns(folder: Path) -> None:
    """As two hosts of two ranks."""
    own, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], str(dist.get_rank() % 2)
    try:
        with hosts.host_by_host(timeout_s=30):
            with (folder / "order").open("a") as file:
                file.write(f"{dist.get_rank()} in\n")
            time.sleep(0.3)
            with (folder / "order").open("a") as file:
                file.write(f"{dist.get_rank()} out\n")
    finally:
        os.environ["LOCAL_RANK"] = own


def test_rank_0_goes_first_then_one_rank_of_each_host(ranks, tmp_path):
    ranks(4).run(take_turns, tmp_path)
    lines = (tmp_path / "order").read_text().splitlines()
    assert lines[:2] == ["0 in", "0 out"]
    assert lines.index("2 in") > lines.index("0 out") and lines.index("3 in") > lines.index("2 out")
    assert lines.index("1 in") > lines.index("0 out")


def main_first(folder: Path) -> bool:
    """Whether the file was there when this rank's turn came; rank 0 writes it late."""
    with GKDConfig().main_process_first():
        was_there = (folder / "rows").exists()
        if dist.get_rank() == 0:
            time.sleep(0.5)
            (folder / "rows").touch()
    with pytest.raises(ZeroDivisionError), GKDConfig().main_process_first(local=False):
        raise ZeroDivisionError  # the others have their turn all the same
    return was_there


def test_the_main_process_of_a_script_goes_first(ranks, tmp_path):
    assert ranks(2).run(main_first, tmp_path) == [False, True]


def wait_in_vain() -> str | None:
    """Rank 0 takes longer than rank 1 is ready to wait."""
    with hosts.host_by_host(timeout_s=30):
        pass
    try:
        with hosts.host_by_host(timeout_s=1):
            time.sleep(3 if dist.get_rank() == 0 else 0)
    except ConnectionError as error:
        return str(error)
    finally:
        dist.barrier()
    return None


def test_a_turn_that_does_not_come_is_an_error(ranks):
    first, second = ranks(2).run(wait_in_vain)
    assert first is None and "waited 1 s (prepare_timeout_s) for rank 0" in second


def skewed_clock() -> list[str]:
    check.time = SimpleNamespace(time=lambda: time.time() + 90 * dist.get_rank())
    try:
        return check.report_clocks(["n1", "n2"])
    finally:
        check.time = time


def test_a_clock_that_is_off_is_named(ranks):
    problems = ranks(2).run(skewed_clock)[0]
    assert problems == ["the clock of n2 is 90.0 s ahead of that of n1"]


def disk(folder: Path) -> tuple[list[str], list[str]]:
    return check.report_disk(folder, 10**18, ["n1", "n2"]), check.report_disk(folder, 1, ["n1", "n2"])


def test_a_disk_without_room_for_a_checkpoint_is_named(ranks, tmp_path):
    full, roomy = ranks(2).run(disk, tmp_path / "not" / "there" / "yet")[0]
    assert roomy == [] and [line.split(" has ")[0] for line in full] == ["n1", "n2"]


def bounded_groups() -> set[float]:
    from engine.zero import partitions

    dist.new_group([0, 1])
    partitions.bound_waits(7)
    backends = [g._get_backend(torch.device("cpu")) for g in dist.distributed_c10d._world.pg_map]
    seconds = {backend.options._timeout.total_seconds() for backend in backends}
    partitions.bound_waits(120)
    return seconds


def test_every_group_has_the_runs_timeout(ranks):
    assert ranks(2).run(bounded_groups) == [{7.0}, {7.0}]


def unlike() -> str:
    check.same_setup(GKDConfig(local_rank=dist.get_rank(), hub_token=str(dist.get_rank())), writes=False)
    config = GKDConfig(learning_rate=1e-5 * (1 + dist.get_rank()))
    with pytest.raises(ValueError) as raised:
        check.same_setup(config, writes=False)
    return str(raised.value)


def test_configurations_that_differ_are_an_error_on_all_ranks(ranks):
    (text,) = set(ranks(2).run(unlike))
    assert text.startswith("the ranks are not alike: configuration differs: ")


def lines_at_the_start(folder: Path) -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("engine.assembly").addHandler(handler)
    config = GKDConfig(str(folder), packing=True, dataloader_num_workers=4, report_to="none")
    with pytest.raises(ValueError, match="model_name_or_path is not set"):
        assemble(config, Inputs())
    logging.getLogger("engine.assembly").removeHandler(handler)
    return [record.getMessage() for record in records]


def test_fields_that_change_nothing_are_told_once_by_rank_0(ranks, tmp_path):
    (line,), others = ranks(2).run(lines_at_the_start, tmp_path)
    assert line.startswith("these fields change nothing here: packing (") and "; dataloader_num_workers (" in line
    assert others == []
