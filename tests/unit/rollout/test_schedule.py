"""Which prompts enter the decoder when, and what the configuration may call a backend."""

from __future__ import annotations

import importlib.util

import pytest

from engine import config
from engine.rollout import placement
from engine.rollout.completer import Request
from engine.rollout.sampling import Sampling
from engine.rollout.schedule import Schedule, admit
from engine.rollout.sequence import Status

SAMPLING = Sampling(stop_ids=(0,), vocab_size=97, context_size=32, max_new_tokens=8)


def lengths(groups) -> list[list[int]]:
    return [[len(sequence.prompt_ids) for sequence in group] for group in groups]


def test_the_longest_go_first_within_slots_and_tokens():
    requests = [Request([1] * length, list(range(seeds))) for length, seeds in ((3, 1), (9, 2), (5, 1), (4, 3))]
    schedule = Schedule(requests, SAMPLING, num_slots=4, prefill_tokens=18)
    assert [len(completions) for completions in schedule.completions] == [1, 2, 1, 3]
    assert lengths(schedule.next_prefill(0)) == [[9, 9], [5]]  # a third prompt, padded, would be 27 tokens
    assert lengths(schedule.next_prefill(3)) == []  # three copies want three slots
    assert lengths(schedule.next_prefill(0)) == [[4, 4, 4], [3]]
    assert schedule.is_empty and schedule.next_prefill(0) == []


def test_a_prompt_over_the_budget_goes_alone_and_copies_over_the_slots_in_parts():
    schedule = Schedule([Request([1] * 9, list(range(5))), Request([2], [0])], SAMPLING, num_slots=2, prefill_tokens=4)
    assert [lengths(schedule.next_prefill(0)) for _ in range(4)] == [[[9, 9]], [[9, 9]], [[9]], [[1]]]


def test_a_prefill_waits_until_an_eighth_of_the_slots_is_free():
    schedule = Schedule([Request([1], [seed]) for seed in range(40)], SAMPLING, num_slots=32, prefill_tokens=1000)
    assert schedule.next_prefill(29) == []
    assert len(schedule.next_prefill(28)) == 4
    assert len(schedule.next_prefill(0)) == 32  # four are left, and need no more than their slots
    assert schedule.next_prefill(29) == [] and len(schedule.next_prefill(28)) == 4


def test_a_sequence_ends_at_a_stop_id_or_where_there_is_no_room():
    (full,) = admit(Request([1] * 32, [0]), SAMPLING)
    assert full.status is Status.FINISHED and full.uniforms == []
    first, second = admit(Request([1] * 30, [4, 5]), SAMPLING)
    assert first.status is Status.WAITING and len(first.uniforms) == first.max_new_tokens == 2
    first.append(9, is_stop=False)
    assert first.status is Status.LIVE and first.num_cached == 30 and first.next_uniform == first.uniforms[1]
    first.append(9, is_stop=False)
    second.append(0, is_stop=True)
    assert first.status is second.status is Status.FINISHED
    assert not first.completion.stopped and second.completion.stopped
    assert [s.max_new_tokens for s in admit(Request([1], [0], max_new_tokens=3), SAMPLING)] == [3]


def test_a_backend_without_its_name_or_a_name_without_its_backend_is_refused(monkeypatch):
    assert placement.COMPLETERS.keys() == set(config.GENERATION_PLACEMENTS)
    monkeypatch.setattr(config, "GENERATION_PLACEMENTS", (*config.GENERATION_PLACEMENTS, "made_up"))
    spec = importlib.util.spec_from_file_location("fresh_placement", placement.__file__)
    with pytest.raises(ImportError, match="made_up"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
