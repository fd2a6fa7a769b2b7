"""Generating from a ZeRO-3 student: it leaves no trace in training, and ranks may stop at any length."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from engine import GKDConfig
from engine.cluster.collectives import all_gather_lists, draw_seed
from engine.data.batch import Sample
from engine.loss.divergence import DivergenceSpec
from engine.rollout.completer import Completion, Request
from engine.rollout.decoder import Decoder
from engine.rollout.partitioned import PartitionedCompleter
from engine.rollout.placement import COMPLETERS
from engine.rollout.rollout import Rollout, deal, describe
from engine.rollout.sampling import Sampling
from engine.zero import partitions
from tests.library.steps import Case, build_case, train_step

SPEC = DivergenceSpec("jsd", beta=0.3)


def weights_after(disturb, num_steps: int = 3) -> torch.Tensor:
    """This rank's piece of every parameter after some steps, with `disturb(student)` before each."""
    case = Case(2, tied=True)
    parts = build_case(case, learning_rate=1e-2)
    student = parts[0]
    for _ in range(num_steps):
        disturb(student)
        train_step(case, parts, SPEC)
        student.engine.step()
    pieces = torch.cat([partitions.local_piece(p).flatten() for p in student.model.parameters()])
    student.engine.destroy()
    return pieces


def generate(student) -> None:
    """Rank 0 stops after one token, the others after 20."""
    longest = 1 if dist.get_rank() == 0 else 20
    with student.gathered() as model:
        decoder = Decoder(model, Sampling((), 1001, 64, longest), num_slots=4)
        completions = decoder.decode([Request([1, 2, 3 + i], [i]) for i in range(6)])
        assert {len(c[0].token_ids) for c in completions} == {longest}
        assert partitions.count_gathered(model) > 0
    assert partitions.count_gathered(student.model) == 0


def generate_and_fail(student) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), student.gathered():
        raise RuntimeError("on purpose")
    assert partitions.count_gathered(student.model) == 0


def check_no_trace() -> list[bool]:
    quiet = weights_after(lambda student: None)
    return [torch.equal(weights_after(disturb), quiet) for disturb in (generate, generate_and_fail)]


def test_training_is_bit_identical_to_never_having_generated(ranks):
    for same in ranks(2).run(check_no_trace):
        assert same == [True, True]


def check_partitioned_lengths() -> list[int]:
    """Rank r wants 1 + 8 r tokens, rank 0 none at all, with parameters fetched layer by layer."""
    student = build_case(Case(2))[0]
    longest = 1 + 8 * dist.get_rank()
    completer = PartitionedCompleter(student, Sampling((), 1001, 64, longest), 2, student.engine.device)
    requests = [Request([1, 2, 3 + i], [i]) for i in range(0 if dist.get_rank() == 0 else 3)]
    with completer.ready():
        lengths = [len(c[0].token_ids) for c in completer.complete(requests)]
    student.engine.destroy()
    return lengths


@pytest.mark.parametrize("world_size", [2, 4])
def test_partitioned_ranks_stop_at_any_length(ranks, world_size):
    results = ranks(world_size).run(check_partitioned_lengths)
    assert results == [[1 + 8 * rank] * (3 if rank else 0) for rank in range(world_size)]


class Echo:
    """A backend that decodes nothing: the prompt backwards, then a token of the seed."""

    def __init__(self, writer, sampling, num_slots, device) -> None:
        self.made_for = (writer.name, sampling.vocab_size, num_slots, device.type)

    def ready(self):
        return nullcontext()

    def complete(self, requests: list[Request]) -> list[list[Completion]]:
        assert self.made_for == ("student", 1001, 64, "cpu")
        return [[Completion([*r.prompt_ids[::-1], s % 1001], stopped=s % 2 == 0) for s in r.seeds] for r in requests]


def rollout_prompts(rank: int) -> list[Sample]:
    """Rank 0 has a long prompt and three short ones, rank 1 two of one token."""
    prompts = [[index] * length for index, length in enumerate((9, 1, 2, 3, 1, 1))]
    own = prompts[:4] if rank == 0 else prompts[4:]
    return [Sample(prompt, [*prompt, 7], [False] * len(prompt) + [True], index=prompt[0]) for prompt in own]


def check_backend() -> tuple[list[list[Sample]], dict[str, float]]:
    config = GKDConfig(num_generations=2)
    config.generation_placement = "echo"
    samples = rollout_prompts(dist.get_rank())
    rollout = Rollout(config, Sampling((), 1001, 16, 8), dist.get_rank(), 2, torch.device("cpu"))
    COMPLETERS["echo"] = Echo
    try:
        writer = SimpleNamespace(name="student", model=torch.nn.Linear(1, 1))
        return rollout.generate([samples[:1], samples[1:]], 3, writer)
    finally:
        del COMPLETERS["echo"]


def test_another_backend_is_a_class_and_a_line(ranks):
    """Each rank gets its own samples back, whoever wrote them, in its micro-batches, each from its own seed."""
    config = GKDConfig()
    for rank, (batches, metrics) in enumerate(ranks(2).run(check_backend)):
        samples = rollout_prompts(rank)
        seeds = [draw_seed(config.seed, "rollout", 3, 2 * s.index + copy) for s in samples for copy in range(2)]
        expected = [
            sample.with_response([*sample.prompt_ids[::-1], seed % 1001], 2 * sample.index + place % 2)
            for place, (sample, seed) in enumerate(zip([s for s in samples for _ in range(2)], seeds, strict=True))
        ]
        assert batches == [expected[:2], expected[2:]]
        assert metrics["rollout/tokens"] == 2 * (9 + 1 + 2 + 3 + 1 + 1 + 6)
        assert metrics["rollout/share_clipped"] == 1 / 6  # 9 + 8 tokens are more than 16


def check_lists() -> list:
    rank = dist.get_rank()
    return all_gather_lists([[rank] * n for n in range(rank)], torch.device("cpu"))


def test_ragged_lists_travel(ranks):
    for lists in ranks(4).run(check_lists):
        assert lists == [[], [[]], [[], [2]], [[], [3], [3, 3]]]


def test_prompts_are_dealt_evenly():
    prompts = [[index] + [0] * length for index, length in enumerate((90, 80, 70, 60, 9, 8, 7, 6))]
    hands = deal(prompts, 4)
    assert sorted(row[0] for hand in hands for row in hand) == list(range(8))
    assert {len(hand) for hand in hands} == {2}
    totals = [sum(len(row) - 1 for row in hand) for hand in hands]
    assert max(totals) - min(totals) < 30  # in file order, one rank would have had both 90 and 80


def test_metrics_of_completions():
    metrics = describe([[1, 2, 1, 2], [5], []], [True, False, False])
    assert metrics["rollout/tokens"] == 5 and metrics["rollout/mean_length"] == pytest.approx(5 / 3)
    assert metrics["rollout/share_stopped"] == pytest.approx(1 / 3)
    assert metrics["rollout/share_truncated"] == pytest.approx(1 / 3)  # an empty completion is neither
    assert metrics["rollout/distinct_2"] == pytest.approx(2 / 3)
