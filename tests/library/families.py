"""A tiny configuration of each model family that is supported: text models, and those that also take images."""

import transformers

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MHA = SIZES | {"num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, "bos_token_id": None}
GPT |= {"eos_token_id": None, "resid_pdrop": 0.0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=8),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2_moe": transformers.Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **MOE, head_dim=16),
    "gemma": transformers.GemmaConfig(**SIZES, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=8, final_logit_softcapping=5.0),
    "gemma3_text": transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, final_logit_softcapping=4.0),
    "phi": transformers.PhiConfig(**MHA),
    "phi3": transformers.Phi3Config(**SIZES),
    "gpt2": transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": transformers.CohereConfig(**MHA, logit_scale=0.25),
    "cohere2": transformers.Cohere2Config(**MHA, logit_scale=0.25, sliding_window=8),
    "smollm3": transformers.SmolLM3Config(**SIZES),
    "granitemoe": transformers.GraniteMoeConfig(
        **SIZES, logits_scaling=3.0, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **MHA, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    ),
    "exaone4": transformers.Exaone4Config(**SIZES),
    "glm4": transformers.Glm4Config(**SIZES, head_dim=16),
    "gptj": transformers.GPTJConfig(**GPT, n_positions=64, rotary_dim=8, attn_pdrop=0.0, embd_pdrop=0.0),
    "llama4_text": transformers.Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64
    ),
    "nemotron": transformers.NemotronConfig(**SIZES),
    "olmo3": transformers.Olmo3Config(**SIZES, sliding_window=8),
    "stablelm": transformers.StableLmConfig(**SIZES),
    "starcoder2": transformers.Starcoder2Config(**SIZES),
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
VISION |= {"patch_size": 14}
QWEN = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "num_heads": 2}
QWEN_IDS = {"image_token_id": 96, "video_token_id": 95}
MULTIMODAL = {
    "gemma3": transformers.Gemma3Config(
        text_config=SIZES | {"head_dim": 16, "sliding_window": 8}, vision_config=VISION, image_token_index=96,
        boi_token_index=95, eoi_token_index=94, mm_tokens_per_image=4,
    ),
    "qwen2_vl": transformers.Qwen2VLConfig(
        text_config=QWEN, **QWEN_IDS,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
    ),
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig(
        text_config=QWEN, vision_config=QWEN_VISION | {"fullatt_block_indexes": [0]}, **QWEN_IDS
    ),
    "qwen3_vl": transformers.Qwen3VLConfig(
        text_config=QWEN | {"head_dim": 16}, **QWEN_IDS, vision_start_token_id=93, vision_end_token_id=94,
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "mistral3": transformers.Mistral3Config(
        text_config=SIZES | {"model_type": "mistral"}, image_token_index=96,
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
    ),
    "llava": transformers.LlavaConfig(
        text_config=SIZES | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=96,
    ),
    "llama4": transformers.Llama4Config(
        text_config=SIZES | {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2},
        vision_config=VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        image_token_index=96, architectures=["Llama4ForConditionalGeneration"],
    ),
    "idefics3": transformers.Idefics3Config(
        text_config=SIZES | {"model_type": "llama"}, vision_config=VISION, image_token_id=96
    ),
}  # fmt: skip
