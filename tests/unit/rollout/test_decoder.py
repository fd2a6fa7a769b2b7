"""The continuous decoder: greedy equals transformers' generate, samples follow the distribution, each from its seed."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import RepetitionPenaltyLogitsProcessor

from engine.rollout.completer import Request
from engine.rollout.decoder import Decoder
from engine.rollout.sampling import Sampling, inverse_cdf
from tests.library.families import CONFIGS
from tests.library.models import build, tiny_llama

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2")
STOPS = tuple(range(3, 97, 9))


def prompts(count: int = 11, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


def sampling(**changes) -> Sampling:
    return Sampling(**{"stop_ids": STOPS, "vocab_size": 97, "context_size": 64, "max_new_tokens": 24} | changes)


def decode(model, requests, num_slots=4, **changes):
    return Decoder(model.eval(), sampling(**changes), num_slots).decode(requests)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_generate(name):
    """Unpadded one by one through `generate`, and all together left-padded; sliding windows of 8 are exceeded."""
    model = build(CONFIGS[name]).eval()
    texts = prompts()
    free = [c[0].token_ids for c in decode(model, [Request(t, [0]) for t in texts], greedy=True, stop_ids=())]
    stops = tuple({tokens[2 * place] for place, tokens in enumerate(free[:8])})  # so that they end at other lengths
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": list(stops), "pad_token_id": 0}
    alone = [
        model.generate(torch.tensor([t]), attention_mask=torch.ones(1, len(t)), **options)[0, len(t) :] for t in texts
    ]
    expected = [one.tolist() for one in alone]
    width = max(map(len, texts))
    padded = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    together = model.generate(padded, attention_mask=mask, **options)[:, width:].tolist()
    assert [tokens[: len(e)] for tokens, e in zip(together, expected, strict=True)] == expected
    assert len({len(e) for e in expected}) >= 2
    for num_slots in (1, 4, 64):
        completions = decode(model, [Request(t, [0]) for t in texts], num_slots, greedy=True, stop_ids=stops)
        assert [c[0].token_ids for c in completions] == expected


def test_a_sample_depends_on_its_seed_alone():
    """Same tokens for any number of slots, any order and any company; other seeds give other tokens."""
    model = tiny_llama(97)
    requests = [Request(text, [100 + index]) for index, text in enumerate(prompts())]
    alone = [decode(model, [request], temperature=0.8)[0][0].token_ids for request in requests]
    for num_slots in (2, 5, 64):
        assert [c[0].token_ids for c in decode(model, requests, num_slots, temperature=0.8)] == alone
    backwards = decode(model, requests[::-1], 3, temperature=0.8)[::-1]
    assert [c[0].token_ids for c in backwards] == alone
    other = decode(model, [Request(r.prompt_ids, [7]) for r in requests], temperature=0.8)
    assert [c[0].token_ids for c in other] != alone


def test_completions_of_one_prompt_share_its_prefill():
    model = tiny_llama(97)
    texts = prompts(3)
    decoder = Decoder(model.eval(), sampling(), num_slots=8)
    together = decoder.decode([Request(text, [10, 11, 12]) for text in texts])
    assert decoder.stats.prefill_tokens <= 3 * max(map(len, texts))
    apart = decode(model, [Request(text, [seed]) for text in texts for seed in (10, 11, 12)])
    assert [c.token_ids for one in together for c in one] == [c.token_ids for one in apart for c in one]
    more_than_slots = decode(model, [Request(texts[0], list(range(10, 20)))], num_slots=4)
    assert [c.token_ids for c in more_than_slots[0]][:3] == [c.token_ids for c in together[0]]


def test_samples_follow_the_distribution():
    """Chi-square over a vocabulary of 12, after temperature and top-k, and over first tokens of the decoder."""
    torch.manual_seed(0)
    logits = torch.randn(12)
    draws = inverse_cdf(logits.expand(20_000, 12), torch.rand(20_000, dtype=torch.float64))
    expected = torch.softmax(logits.double(), -1) * 20_000
    assert chisquare(torch.bincount(draws, minlength=12), expected * 20_000 / expected.sum()).pvalue > 1e-3

    model = tiny_llama(12, seed=3)
    text = [1, 2, 3]
    completions = decode(
        model,
        [Request(text, list(range(4000)))],
        512,
        vocab_size=12,
        stop_ids=(0,),
        max_new_tokens=1,
        temperature=1.5,
        top_k=6,
    )
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions[0]]), minlength=12)
    with torch.no_grad():
        scores = model(torch.tensor([text])).logits[0, -1] / 1.5
    kept = scores.topk(6).indices
    expected = torch.softmax(scores[kept].double(), -1)
    assert counts.sum() == counts[kept].sum() == 4000
    assert chisquare(counts[kept], expected * 4000 / expected.sum()).pvalue > 1e-3


def test_limits():
    model = tiny_llama(97)
    full, nearly, short = list(range(64)), list(range(61)), [1, 2]
    completions = decode(model, [Request(t, [0]) for t in (full, nearly, short)], stop_ids=(), max_new_tokens=24)
    assert [len(c[0].token_ids) for c in completions] == [0, 3, 24]  # a full context gives an empty completion
    assert not any(c[0].stopped for c in completions)
    assert decode(model, []) == []


def test_min_new_tokens_and_unknown_ids():
    model = tiny_llama(97)
    everything = tuple(range(90))
    completions = decode(
        model, [Request(t, [0]) for t in prompts()], stop_ids=everything, min_new_tokens=4, vocab_size=95
    )
    for (completion,) in completions:
        *first, last = completion.token_ids
        assert len(first) >= 4 and all(token in range(90, 95) for token in first[:4])
        assert (last in everything) == completion.stopped
        assert max(completion.token_ids) < 95


def test_repetition_penalty_equals_transformers():
    model = tiny_llama(97)
    text = prompts()[0]
    ours = decode(model, [Request(text, [0]), Request([3] * 15, [0])], greedy=True, repetition_penalty=1.3, stop_ids=())
    tokens, penalty = list(text), RepetitionPenaltyLogitsProcessor(1.3)
    with torch.no_grad():
        for _ in range(24):
            ids = torch.tensor([tokens])
            tokens.append(penalty(ids, model(ids).logits[:, -1]).argmax().item())
    assert ours[0][0].token_ids == tokens[len(text) :]


def test_cost_follows_the_tokens():
    """Steps pass the generated tokens but those that prefills draw, however unequal the lengths."""
    model = tiny_llama(97)
    decoder = Decoder(model.eval(), sampling(), num_slots=4)
    completions = decoder.decode([Request(text, [index]) for index, text in enumerate(prompts(16))])
    lengths = [len(c[0].token_ids) for c in completions]
    assert decoder.stats.step_tokens == sum(lengths) - len(lengths)
    assert max(lengths) >= 2 * sum(lengths) / len(lengths)
