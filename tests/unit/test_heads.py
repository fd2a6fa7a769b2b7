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

from engine.backbone import HiddenStates, hidden_states
from engine.batch import Sample, pack
from engine.loss.head import HEAD_TRANSFORMS, HeadShard, describe_head
from engine.loss.vocab_parallel import _logits
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


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_hidden_states_and_head_give_the_models_own_logits(name):
    model = build(CONFIGS[name]).eval()
    assert model.config.model_type == name
    if name == "phi":  # a bias that is not zero
        torch.nn.init.normal_(model.lm_head.bias)
    head = describe_head(model)
    none = torch.empty(0, dtype=torch.long)
    bias = None if head.bias is None else head.bias.detach()
    shard = HeadShard(head.weight.detach(), bias, none, head.scale, head.softcap)
    samples = rows()
    with torch.no_grad():
        ours = _logits(hidden_states(HiddenStates(model), pack(samples, "cpu")), shard)
        theirs = torch.cat([model(torch.tensor([s.input_ids])).logits[0, 1:-1] for s in samples])
    # fp32 attention over a block-diagonal mask adds in another order than over one sequence
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert theirs.std() > 0.05


def test_unknown_head_names_the_class():
    sizes = {"vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match="BloomForCausalLM.*not known"):
        describe_head(build(BloomConfig(**sizes), attention="eager"))
