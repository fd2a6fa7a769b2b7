"""Bytes on the wire and memory of the loss: measured, against the formulas that the READMEs state.

All of it with other traffic on the machine's loopback, which must not be counted.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
import torch.distributed as dist

from engine import GKDConfig
from engine.bench.loopback import why_not_private
from engine.bench.loss import Size, bench
from engine.bench.measure import loopback_bytes
from engine.data.batch import Sample, pack
from engine.plan import volume
from engine.teacher.placements import build_teacher
from tests.library.models import tiny_llama
from tests.library.steps import Case, build_case

ALONE = why_not_private()
counts_bytes = pytest.mark.skipif(ALONE is not None, reason=f"other traffic would be counted: {ALONE}")


@pytest.fixture(scope="module", autouse=True)
def other_traffic() -> Iterator[None]:
    """Some 10 MB/s over 127.0.0.1 of the machine, for as long as these tests run."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    is_over = threading.Event()

    def send() -> None:
        while not is_over.wait(0.02):
            sender.sendall(bytes(200_000))

    def receive() -> None:
        while receiver.recv(2**20):
            pass

    threads = [threading.Thread(target=work) for work in (send, receive)]
    for thread in threads:
        thread.start()
    yield
    is_over.set()
    threads[0].join()
    sender.close()
    threads[1].join()
    receiver.close()


@counts_bytes
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_bytes_of_hidden_states_match_the_formula(num_ranks):
    rows = bench(Size(4096, 256, 320, tokens=192, ranks=num_ranks, rounds=1, chunk_bytes=4 * 2**20, naive=False))
    by_name = {row.name: row for row in rows}
    assert f"G={num_ranks}" in by_name
    for name, row in by_name.items():
        if row.formula_bytes:
            assert row.sent_bytes == pytest.approx(row.formula_bytes, rel=0.05), name
        else:
            assert row.sent_bytes < 50_000, name  # barriers alone


def sent_per_rank(action: Callable[[], object]) -> float:
    """Bytes per rank of an action that all ranks take, its second time: the first opens connections."""
    for _ in range(2):
        dist.barrier()
        time.sleep(0.2)
        before = loopback_bytes()
        dist.barrier()
        action()
        dist.barrier()
        time.sleep(0.2)
        sent = (loopback_bytes() - before) / dist.get_world_size()
        dist.barrier()
    return sent


def check_head_bytes(group_size: int) -> float:
    """Bytes per rank of one `open_step` and `close_step`, over those of the formula."""
    case = Case(group_size, vocab_size=8001, teacher_vocab_size=8001)
    student = build_case(case, hidden_size=64)[0]
    world_size = dist.get_world_size()

    def exchange() -> None:
        student.open_step(train=True)
        student.head.close_step()

    sent = sent_per_rank(exchange)
    student.engine.destroy()
    return sent / max(1.0, volume.head_bytes(8001, 64, world_size, group_size, weight_bytes=4))


@counts_bytes
@pytest.mark.parametrize("world_size,group_size", [(2, 1), (4, 1), (4, 2)])
def test_bytes_of_the_head_match_the_formula(ranks, world_size, group_size):
    assert ranks(world_size).run(check_head_bytes, group_size)[0] == pytest.approx(1.0, rel=0.05)


@counts_bytes
def test_with_one_token_group_the_head_stays_where_it_is(ranks):
    """G = N: nothing but the rows that straddle two ranks and the barriers."""
    assert ranks(4).run(check_head_bytes, 4)[0] < 20_000


def test_memory_is_the_gradient_shard_and_the_chunk_and_does_not_grow_with_tokens():
    """Over the inputs: fp32 head gradient + chunk budget, within 1.3; and the hidden gradient that is returned."""
    peaks = {}
    for tokens in (256, 2048):
        size = Size(16384, 256, 256, tokens=tokens, ranks=1, rounds=1, chunk_bytes=16 * 2**20, naive=False)
        line = next(line for line in bench(size) if line.name == "stream")
        returned = tokens * size.student_hidden * 4
        peaks[tokens] = line.peak_bytes - returned
        budget = size.vocab * size.student_hidden * 4 + size.chunk_bytes
        assert peaks[tokens] < 1.3 * budget, tokens
    # The resident set of two like runs differs by up to 4 MiB; one model's logits of 1792 tokens would be 112 MiB.
    assert peaks[2048] < peaks[256] + 8 * 2**20


def check_teacher_bytes(folder: str, changes: dict) -> tuple[float, float]:
    """Bytes per rank of one scoring forward, and what the formulas say."""
    config = GKDConfig(bf16=False, teacher_model_name_or_path=folder, **changes)
    teacher = build_teacher(config, None, torch.device("cpu"))
    ids = torch.arange(400) % 101
    batch = pack([Sample([1], ids.tolist(), [False] * 390 + [True] * 10, 0)], "cpu")
    world_size = dist.get_world_size()
    sent = sent_per_rank(lambda: teacher.hidden(batch))
    if config.teacher_placement == "tensor_parallel":
        return sent, volume.tensor_parallel_forward_bytes(400, 4, 128, config.teacher_tp_size, 4)
    fetched = [p for n, p in teacher.model.named_parameters() if "lm_head" not in n and not p.ds_persist]
    return sent, volume.zero3_gather_bytes(sum(p.ds_numel for p in fetched), world_size, 4)


@counts_bytes
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("changes", [{}, {"teacher_placement": "tensor_parallel", "teacher_tp_size": 2}], ids=str)
def test_bytes_of_the_teacher_match_the_formula(ranks, tmp_path, world_size, changes):
    tiny_llama(101, seed=5, hidden_size=128, kv_heads=2, num_layers=4).save_pretrained(tmp_path)
    for sent, formula in ranks(world_size).run(check_teacher_bytes, str(tmp_path), changes):
        assert sent == pytest.approx(formula, rel=0.05)
