"""Tiny models of each family, from their configuration classes: random weights, real architectures."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from engine.models.backbone import find_auto_class


def tiny_llama(
    vocab_size: int = 100,
    tied: bool = False,
    hidden_size: int = 16,
    seed: int = 0,
    num_layers: int = 2,
    kv_heads: int = 1,
):
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=2, num_key_value_heads=kv_heads, max_position_embeddings=512, tie_word_embeddings=tied,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return build(config, seed)


def build(config, seed: int = 0, attention: str = "sdpa"):
    """A model in fp32, its weights drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return find_auto_class("tiny", config).from_config(
            config, dtype=torch.float32, attn_implementation="eager" if config.model_type == "gemma2" else attention
        )


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer():
    """A byte-level BPE tokenizer with a ChatML template; 259 ids: 256 bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|end|>"]})
    fast.chat_template = CHATML
    return fast
