"""What a rollout costs: memory while the student is gathered, and time against transformers' generate."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from engine import GKDConfig
from engine.bench.measure import _reset_peak, _status_bytes
from engine.bench.rollout import Size, bench, build_model
from engine.cluster.collectives import build_vocab_groups
from engine.models.student import build_student
from engine.rollout.completer import Request
from engine.rollout.decoder import Decoder
from engine.rollout.placement import parameter_bytes
from engine.rollout.sampling import Sampling
from tests.library.ranks import Ranks

SLOTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64


def peak_while_generating() -> tuple[int, int, int]:
    """Peak memory over that before, whole student, and KV cache of the live sequences, in bytes."""
    config = GKDConfig(bf16=False, gradient_checkpointing=False)
    model = build_model(Size(prompt_tokens=PROMPT_TOKENS, max_new_tokens=NEW_TOKENS))
    groups = build_vocab_groups(dist.get_world_size(), dist.get_world_size())
    student = build_student(config, model, groups, model.config.vocab_size, num_steps=1)
    sampling = Sampling((), model.config.vocab_size, 4096, NEW_TOKENS)
    requests = [Request([1 + i] * PROMPT_TOKENS, [i]) for i in range(SLOTS)]
    peaks = []
    for requests_of_this_run in (requests[:1], requests):  # the first one imports and connects
        before = _reset_peak(on_cpu=True)
        with student.gathered() as whole:
            Decoder(whole, sampling, SLOTS).decode(requests_of_this_run)
        peaks.append(_status_bytes("VmHWM") - before)
    text = model.config
    per_token = (
        2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    )
    return peaks[-1], parameter_bytes(student.model), SLOTS * (PROMPT_TOKENS + NEW_TOKENS) * per_token


def test_memory_is_the_student_and_the_cache(monkeypatch):
    """A student of 29M parameters on two ranks: whole student + KV cache of the live sequences + 10 %."""
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "100000"
    )  # freed blocks go back at once, as a device's allocator reuses them
    world = Ranks(2)
    try:
        results = world.run(peak_while_generating)
    finally:
        world.stop()
    for peak, student, cache in results:
        assert peak < 1.1 * (student + cache), f"{peak / 2**20:.0f} MiB, {student / 2**20:.0f} + {cache / 2**20:.0f}"
        assert peak > 0.5 * student


@pytest.mark.slow
@pytest.mark.parametrize("share,prompts,longest,least", [(0.25, 64, 256, 2.5), (1.0, 16, 96, 0.95)])
def test_speed_against_generate_per_micro_batch(share, prompts, longest, least):
    torch.set_num_threads(1)
    lengths, rows = bench(Size(prompts=prompts, max_new_tokens=longest, mean_share=share, rounds=3))
    assert sum(lengths) / len(lengths) <= 0.3 * max(lengths) or share == 1.0
    assert {row.name: row.speed_up for row in rows}["ours"] >= least
