"""Teachers: the same hidden states in every placement, and no rank that ever holds a whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from engine import GKDConfig
from engine.bench.measure import _reset_peak, _status_bytes
from engine.config.source import ModelSource
from engine.data.batch import pack
from engine.models.backbone import compute_dtype, load_causal_lm
from engine.teacher.placements import build_teacher
from engine.zero import partitions
from engine.zero.settings import teacher_settings
from tests.library.models import build, tiny_llama
from tests.library.ranks import Ranks
from tests.library.steps import ragged_samples

PLACEMENTS = [
    {"teacher_placement": "replicated"},
    {"teacher_placement": "zero3"},
    {"teacher_placement": "zero3", "teacher_deepspeed": "ds_configs/teacher_zero3_cpu.json"},
    {"teacher_placement": "tensor_parallel", "teacher_tp_size": 2},
]


def check_hidden(folder: str, changes: dict) -> float:
    """Largest relative difference of a placement's hidden states to those of the plain model."""
    config = GKDConfig(bf16=False, teacher_model_name_or_path=folder, **changes)
    teacher = build_teacher(config, None, torch.device("cpu"))
    plain = tiny_llama(101, seed=5, hidden_size=32, kv_heads=2).eval()
    worst = 0.0
    for micro in range(2):
        samples = ragged_samples(dist.get_rank(), micro, 101)
        ours = teacher.hidden(pack(samples, "cpu"))
        with torch.no_grad():
            parts = [
                plain.base_model(torch.tensor([s.input_ids])).last_hidden_state[0, :-1][
                    torch.tensor(s.response_mask[1:])
                ]
                for s in samples
            ]
        theirs = torch.cat(parts)
        assert ours.shape == theirs.shape
        if theirs.numel():
            worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
    return worst


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("changes", PLACEMENTS, ids=str)
def test_every_placement_gives_the_same_hidden_states(ranks, tmp_path, world_size, changes):
    tiny_llama(101, seed=5, hidden_size=32, kv_heads=2).save_pretrained(tmp_path)
    assert max(ranks(world_size).run(check_hidden, str(tmp_path), changes)) < 1e-5


def check_pieces(folder: str, dtype_bf16: bool) -> list[str]:
    """Names of parameters whose pieces differ from the file's values."""
    config = GKDConfig(bf16=dtype_bf16, teacher_model_name_or_path=folder)
    model = load_causal_lm(ModelSource(folder), compute_dtype(config), teacher_settings(config))
    plain = dict(
        tiny_llama(101, tied=True, seed=5, hidden_size=32)
        .to(torch.bfloat16 if dtype_bf16 else torch.float32)
        .named_parameters()
    )
    wrong = []
    for name, param in model.named_parameters():
        if not torch.equal(partitions.full_value(param), plain[name]):
            wrong.append(name)
    return wrong if len(plain) == len(list(model.parameters())) else ["count"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_pieces_are_read_from_one_file_or_many(ranks, tmp_path, bf16, shard_size):
    tiny_llama(101, tied=True, seed=5, hidden_size=32).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "30KB")
    assert ranks(4).run(check_pieces, str(tmp_path), bf16) == [[]] * 4


def peak_while_loading(warm_up: str, folder: str) -> tuple[int, int]:
    """Peak memory over that before loading, and the whole model's fp32 size, in bytes."""
    config = GKDConfig(bf16=False)
    load_causal_lm(
        ModelSource(warm_up), compute_dtype(config), teacher_settings(config)
    )  # imports what any load imports
    before = _reset_peak(on_cpu=True)
    model = load_causal_lm(ModelSource(folder), compute_dtype(config), teacher_settings(config))
    peak = _status_bytes("VmHWM") - before
    return peak, 4 * sum(p.ds_numel for p in model.parameters())


def test_no_rank_holds_a_whole_model_while_loading(tmp_path, monkeypatch):
    """A teacher of 184M parameters, 4 ranks: the peak of each stays under 0.6 of the whole fp32 size.

    glibc is told to give freed blocks back, as it keeps those under 32 MB otherwise.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    sizes = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10}
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=False)
    build(config).save_pretrained(tmp_path / "large")
    tiny_llama(101).save_pretrained(tmp_path / "small")
    world = Ranks(4)
    try:
        results = world.run(peak_while_loading, str(tmp_path / "small"), str(tmp_path / "large"))
    finally:
        world.stop()
    for peak, whole in results:
        assert whole > 4 * 180e6
        assert peak < 0.6 * whole, f"{peak / whole:.2f}"
    assert max(peak for peak, _ in results) > 0.25 * whole  # a piece of every tensor did arrive


def test_a_group_that_does_not_divide_the_ranks(ranks, tmp_path):
    tiny_llama(101, seed=5, hidden_size=32, kv_heads=2).save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="teacher_tp_size=3 must divide the number of ranks, 4"):
        ranks(4).run(check_hidden, str(tmp_path), {"teacher_placement": "tensor_parallel", "teacher_tp_size": 3})


def test_a_tensor_of_another_shape_is_named(ranks, tmp_path):
    tiny_llama(101, seed=5, hidden_size=32).save_pretrained(tmp_path)
    settings = (Path(tmp_path) / "config.json").read_text()
    (Path(tmp_path) / "config.json").write_text(settings.replace('"vocab_size": 101', '"vocab_size": 120'))
    with pytest.raises(AssertionError, match=r"lm_head.weight \(file \[101, 32\], model \[120, 32\]\)"):
        ranks(2).run(check_hidden, str(tmp_path), {})
