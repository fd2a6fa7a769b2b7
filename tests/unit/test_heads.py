"""For each family: hidden states and head give the model's own logits, and packed forwards equal separate ones."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from engine import GKDConfig
from engine.backbone import HiddenStates, hidden_states, read_model_config
from engine.batch import Sample, pack
from engine.loss.divergence import DivergenceSpec, dense_divergence
from engine.loss.head import HEAD_TRANSFORMS, HeadShard, describe_head
from engine.loss.projection import project
from engine.loss.vocab_parallel import Stream, vocab_parallel_divergence
from tests.models import build

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MHA = SIZES | {"num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **MOE, head_dim=16),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=8, final_logit_softcapping=5.0),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, final_logit_softcapping=4.0),
    "phi": PhiConfig(**MHA),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "olmo2": Olmo2Config(**SIZES),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": CohereConfig(**MHA, logit_scale=0.25),
    "cohere2": Cohere2Config(**MHA, logit_scale=0.25, sliding_window=8),
    "smollm3": SmolLM3Config(**SIZES),
    "starcoder2": Starcoder2Config(**SIZES),
}  # fmt: skip


def rows() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 13, 9)
    ids = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(row[:2], row, [False, False] + [True] * (len(row) - 2), index) for index, row in enumerate(ids)]


def test_every_known_head_has_a_case():
    assert CONFIGS.keys() == HEAD_TRANSFORMS.keys()


def head_shard(model) -> HeadShard:
    head = describe_head(model)
    bias = None if head.bias is None else head.bias.detach()
    return HeadShard(head.weight.detach(), bias, torch.empty(0, dtype=torch.long), head.scale, head.softcap)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_hidden_states_and_head_give_the_models_own_logits_and_loss(name, alone):
    student, teacher = (build(CONFIGS[name], seed).eval() for seed in (0, 1))
    assert student.config.model_type == name
    if name == "phi":  # a bias that is not zero
        torch.nn.init.normal_(student.lm_head.bias)
    samples = rows()
    batch, spec = pack(samples, "cpu"), DivergenceSpec("jsd", beta=0.3, temperature=0.8)
    with torch.no_grad():
        hidden = [hidden_states(HiddenStates(model), batch) for model in (student, teacher)]
        shards = [head_shard(model) for model in (student, teacher)]
        ours = project(hidden[0], shards[0])
        own = [torch.cat([m(torch.tensor([s.input_ids])).logits[0, 1:-1] for s in samples]) for m in (student, teacher)]
        stream, count = Stream(alone, torch.arange(97), 2**20), len(batch.target_ids_N)
        loss, _ = vocab_parallel_divergence(
            *hidden, *shards, batch.target_ids_N, torch.full((count,), 1 / count), count, spec, stream
        )
    # fp32 attention over a block-diagonal mask adds in another order than over one sequence
    torch.testing.assert_close(ours, own[0], rtol=2e-5, atol=2e-5)
    assert own[0].std() > 0.05
    dense = dense_divergence(own[0].double(), own[1].double(), spec).mean().item()
    assert loss.item() == pytest.approx(dense, rel=1e-5)


def test_unknown_head_names_the_class():
    sizes = {"vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match="BloomForCausalLM.*not known"):
        describe_head(build(BloomConfig(**sizes), attention="eager"))


def test_gemma2_refuses_attention_without_its_soft_cap(tmp_path):
    CONFIGS["gemma2"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sdpa cannot do.*flash_attention_2 on a GPU, or eager"):
        read_model_config(str(tmp_path), GKDConfig())
    assert read_model_config(str(tmp_path), GKDConfig(attn_implementation="eager")).model_type == "gemma2"
