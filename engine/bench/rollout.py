"""`python -m engine bench rollout`: the continuous decoder against transformers' generate, at known lengths.

One process, whole parameters, sampling at temperature 1. Every completion's length is drawn beforehand, from a
long-tailed (log-normal) or a constant distribution, and forced in all contenders, so that they generate the same
numbers of tokens. They run in turn, round after round.

    generate, micro-batch   `model.generate` for each batch of `--rows` prompts, as a trainer does per micro-batch
    generate, step          `model.generate` for all prompts at once
    ours                    the continuous decoder with `--rows` rows
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LogitsProcessor

from engine.bench.measure import measure
from engine.rollout.completer import Request
from engine.rollout.decoder import Decoder
from engine.rollout.sampling import Sampling

STOP_ID = 0


@dataclass(frozen=True)
class Size:
    """What is decoded, and by which model (a Llama of this shape with random weights; 29.5M parameters)."""

    prompts: int = 64
    rows: int = 16
    prompt_tokens: int = 64
    max_new_tokens: int = 256
    mean_share: float = 0.25
    rounds: int = 3
    hidden: int = 512
    layers: int = 8
    vocab: int = 8192


@dataclass
class Line:
    """A contender's figures: medians over the rounds."""

    name: str
    seconds: float
    tokens_per_s: float
    speed_up: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Size()
    for name, value in asdict(defaults).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")


def run(options: argparse.Namespace) -> int:
    size = Size(**{name: getattr(options, name) for name in Size.__dataclass_fields__})
    lengths, contenders = bench(size)
    print(format_table(size, lengths, contenders))
    if options.json:
        record = {"size": asdict(size), "lengths": lengths, "rows": [asdict(line) for line in contenders]}
        options.json.write_text(json.dumps(record, indent=1))
    return 0


def bench(size: Size) -> tuple[list[int], list[Line]]:
    """The lengths, and each contender's figures."""
    torch.manual_seed(0)
    device = get_accelerator().current_device_name()
    model = build_model(size).to(device).eval()
    lengths = draw_lengths(size)
    prompts = torch.randint(1, size.vocab, (size.prompts, size.prompt_tokens))
    contenders: dict[str, Callable[[], int]] = {
        "generate, micro-batch": lambda: generate(model, prompts, lengths, size.rows),
        "generate, step": lambda: generate(model, prompts, lengths, size.prompts),
        "ours": lambda: decode(model, prompts, lengths, size.rows),
    }
    for name, function in contenders.items():
        assert function() == sum(lengths), name  # the warm-up also checks that all generate the same
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(size.rounds):
        for name, function in contenders.items():
            times[name].append(measure(function).seconds)
    base = times["generate, micro-batch"]
    lines = []
    for name, seconds in times.items():
        speed_up = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        lines.append(Line(name, statistics.median(seconds), sum(lengths) / statistics.median(seconds), speed_up))
    return lengths, lines


def build_model(size: Size) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.hidden * 43 // 16,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 64,
        max_position_embeddings=size.prompt_tokens + size.max_new_tokens, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def draw_lengths(size: Size) -> list[int]:
    """Log-normal, cut at `max_new_tokens`, its mean about `mean_share` of that; constant for a share of 1."""
    if size.mean_share >= 1:
        return [size.max_new_tokens] * size.prompts
    draws = torch.distributions.LogNormal(0.0, 1.0).sample((size.prompts,))
    scale = 0.5 * size.mean_share
    for _ in range(100):  # the cut lowers the mean: raise the scale until it fits
        lengths = (draws * scale * size.max_new_tokens).ceil().clamp(1, size.max_new_tokens)
        if lengths.mean() >= size.mean_share * size.max_new_tokens:
            break
        scale *= 1.02
    lengths[lengths.argmax()] = size.max_new_tokens
    return [int(length) for length in lengths]


class StopAt(LogitsProcessor):
    """Forces the stop id as a row's last token, and keeps it away before."""

    def __init__(self, lengths: list[int], prompt_tokens: int) -> None:
        self.ends = torch.tensor(lengths) + prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, STOP_ID] = -torch.inf
        due = (input_ids.shape[1] + 1 >= self.ends).to(scores.device)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, STOP_ID] = 0.0
        return torch.where(due[:, None], forced, scores)


def generate(model: torch.nn.Module, prompts: torch.Tensor, lengths: list[int], batch: int) -> int:
    """Tokens generated, stop ids included."""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max(lengths), eos_token_id=STOP_ID, pad_token_id=STOP_ID
    )
    total = 0
    for start in range(0, len(lengths), batch):
        ids = prompts[start : start + batch].to(model.device)
        stop = StopAt(lengths[start : start + batch], ids.shape[1])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=[stop]
        )
        total += int((output[:, ids.shape[1] :] != STOP_ID).sum()) + len(ids)
    return total


def decode(model: torch.nn.Module, prompts: torch.Tensor, lengths: list[int], rows: int) -> int:
    """Tokens generated."""
    sampling = Sampling((), model.config.vocab_size, 2**20, max(lengths))
    requests = [
        Request(ids, [seed], length) for seed, (ids, length) in enumerate(zip(prompts.tolist(), lengths, strict=True))
    ]
    return sum(len(c.token_ids) for row in Decoder(model, sampling, rows).decode(requests) for c in row)


def format_table(size: Size, lengths: list[int], contenders: list[Line]) -> str:
    mean = sum(lengths) / len(lengths)
    lines = [
        f"rollout, {size.prompts} prompts of {size.prompt_tokens} tokens, lengths: mean {mean:.0f}, max {max(lengths)} "
        f"({mean / max(lengths):.2f}), {size.rows} rows, medians of {size.rounds} rounds",
        f"{'':24}{'seconds':>10}{'tokens/s':>10}{'speed-up':>10}",
    ]
    lines += [f"{c.name:24}{c.seconds:10.2f}{c.tokens_per_s:10.0f}{c.speed_up:10.2f}" for c in contenders]
    return "\n".join(lines)
