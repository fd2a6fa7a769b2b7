"""For each family: hidden states and head give the model's own logits, and packed forwards equal separate ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from engine.config.source import ModelSource
from engine.data.batch import Sample, pack
from engine.loss.divergence import DivergenceSpec, dense_divergence
from engine.loss.head import HeadShard
from engine.loss.projection import project
from engine.loss.signal import HiddenSignal
from engine.loss.vocab_parallel import Stream, vocab_parallel_divergence
from engine.models.backbone import (
    HiddenStates,
    build_on_meta,
    check_packing,
    check_usable,
    hidden_states,
    packed_inputs,
    read_model_config,
)
from engine.models.structure import describe_head, find_transform, freeze_unused, text_backbone
from engine.rollout.completer import Request
from engine.rollout.decoder import Decoder
from engine.rollout.sampling import Sampling
from tests.library.families import CONFIGS, GPT, MHA, MULTIMODAL, SIZES, VISION
from tests.library.models import build, tiny_llama

EAGER = {"gptj"}
# What cannot be right, with the reason given; all of them are refused on the configuration alone.
REFUSED = {
    "bloom": (transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2), "takes no position_ids"),
    "falcon": (transformers.FalconConfig(**MHA | {"num_kv_heads": 2}), "does not tell packed sequences apart"),
    "opt": (
        transformers.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2),
        "does not tell packed sequences apart",
    ),
    "gpt_oss": (
        transformers.GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=2),
        "does not tell packed sequences apart",
    ),
    "lfm2": (transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), r"carry a state .*\(conv\)"),
    "mamba": (transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1), "carry a state"),
    "paligemma": (
        transformers.PaliGemmaConfig(
            text_config=SIZES | {"model_type": "gemma2", "head_dim": 16}, projection_dim=32, image_token_index=96,
            vision_config=VISION | {"model_type": "siglip_vision_model"},
        ),
        "its attention is bidirectional",
    ),
    "t5": (transformers.T5Config(vocab_size=97, d_model=32), "T5Config is not the configuration of a causal language"),
    "chunked": (
        transformers.Llama4TextConfig(
            **SIZES, head_dim=16, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=32
        ),
        "attention_chunk_size=32 tokens, and sequences that share a row of up to 64",
    ),
    "no attention kernel": (transformers.CodeGenConfig(**GPT, n_positions=64, rotary_dim=8), "support an attention"),
}  # fmt: skip


def rows() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 13, 9)
    ids = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(row[:2], row, [False, False] + [True] * (len(row) - 2), index) for index, row in enumerate(ids)]


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A model of a family in evaluation mode, its weights large enough that attention and head matter."""
    model = build((CONFIGS | MULTIMODAL)[name], seed, "eager" if name in EAGER else "sdpa").eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for param in text_backbone(model).parameters():
            if param.ndim > 1 and param.std() < 0.1:  # families without `initializer_range`
                nn.init.normal_(param, std=0.3)
    return model


def head_shard(model) -> HeadShard:
    head = describe_head(model)
    bias = None if head.bias is None else head.bias.detach()
    return HeadShard(head.weight.detach(), bias, torch.empty(0, dtype=torch.long), head.scale, head.softcap)


@pytest.mark.parametrize("name", [*CONFIGS, *MULTIMODAL])
def test_packed_hidden_states_and_head_give_the_models_own_logits_and_loss(name, alone):
    student, teacher = (tiny(name, seed) for seed in (0, 1))
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
            hidden[0],
            HiddenSignal(hidden[1], shards[1]),
            shards[0],
            batch.target_ids_N,
            torch.full((count,), 1 / count),
            count,
            spec,
            stream,
        )
    # fp32 attention over a block-diagonal mask adds in another order than over one sequence
    torch.testing.assert_close(ours, own[0], rtol=2e-5, atol=2e-5)
    assert own[0].std() > 0.05
    dense = dense_divergence(own[0].double(), own[1].double(), spec).mean().item()
    assert loss.item() == pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize("name", [*CONFIGS, *MULTIMODAL])
def test_families_are_usable_and_decode_what_they_score(name):
    """On `meta` as on the model itself; rows of different lengths, left-padded, continue as each does alone."""
    config, attention = (CONFIGS | MULTIMODAL)[name], "eager" if name in EAGER | {"gemma2"} else "sdpa"
    check_usable(build_on_meta(ModelSource(name, attention), config), longest_row=64)
    model = tiny(name)
    check_usable(model, longest_row=64)
    check_packing(model, lambda batch: hidden_states(HiddenStates(model), batch), torch.device("cpu"))
    prompts = [[3, 14, 15, 92, 65, 35], [8, 9]]
    sampling = Sampling((), vocab_size=90, context_size=64, max_new_tokens=6, greedy=True)
    completions = Decoder(model, sampling, 4).decode([Request(p, [0]) for p in prompts])
    for prompt, (done,) in zip(prompts, completions, strict=True):
        ids = prompt + done.token_ids
        batch = pack([Sample(prompt, ids, [False] * len(prompt) + [True] * 6, 0)], "cpu")
        with torch.no_grad():
            logits = project(hidden_states(HiddenStates(model), batch), head_shard(model))[:, :90]
        chosen = logits.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-4, atol=1e-4)  # equal but for near ties


@pytest.mark.parametrize("name", MULTIMODAL)
def test_what_no_text_passes_through_is_frozen(name):
    model = tiny(name)
    assert freeze_unused(model) > 0
    trained = {param_name for param_name, param in model.named_parameters() if param.requires_grad}
    assert trained and not any("vision" in n or "visual" in n or "projector" in n or "connector" in n for n in trained)
    inputs = packed_inputs(torch.arange(9), torch.arange(9), HiddenStates(model).position_rows)
    model.get_output_embeddings()(text_backbone(model)(**inputs).last_hidden_state).square().sum().backward()
    assert {n for n, param in model.named_parameters() if param.grad is not None} <= trained


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name):
    config, reason = REFUSED[name]
    eager = name in ("bloom", "gpt_oss", "mamba", "paligemma")
    with pytest.raises(ValueError, match=reason) as caught:
        check_usable(build_on_meta(ModelSource("x", "eager" if eager else "sdpa"), config), longest_row=64)
    assert "\n" not in str(caught.value)


def test_what_shares_a_row_unseen_is_found_on_the_weights():
    """An object is not built again: its class's faults show when it runs."""
    model = build(REFUSED["falcon"][0])
    with pytest.raises(ValueError, match="FalconForCausalLM .* sequences that share a row see each other"):
        check_packing(model, lambda batch: hidden_states(HiddenStates(model), batch), torch.device("cpu"))


class Halved(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


class Capped(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 50.0 * torch.tanh(output.logits / 50.0)
        return output


class Masked(transformers.LlamaForCausalLM):
    """One id is never drawn, as Chameleon's image tokens."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 7] = -1e9
        return output


class Normed(transformers.LlamaForCausalLM):
    """A further layer between text model and head."""

    def forward(self, input_ids, **kwargs):
        hidden = nn.functional.layer_norm(self.model(input_ids, **kwargs)[0], (self.config.hidden_size,))
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


class Scaled(transformers.LlamaForCausalLM):
    """Embeddings are changed before the text model sees them."""

    def forward(self, input_ids, **kwargs):
        return super().forward(inputs_embeds=self.model.embed_tokens(input_ids) * 2.0, **kwargs)


class Bypassed(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        logits = self.model(input_ids, **kwargs)[0] @ self.lm_head.weight.T
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind,reason",
    [
        (Halved, "its logits differ by up to 32 from scale=1, softcap=None"),
        (Capped, "its logits differ by up to 21.2 from scale=1"),
        (Masked, r"its logits differ by up to 1e\+09"),
        (Normed, "its head does not take the hidden states of LlamaModel"),
        (Scaled, "it does not hand its token ids to LlamaModel"),
        (Bypassed, "its head does not take the hidden states"),
    ],
)
def test_an_unknown_transform_is_refused(kind, reason, dtype):
    with pytest.raises(ValueError, match=rf"^{kind.__name__} .*not known.*{reason}"):
        describe_head(kind(tiny_llama().config).to(dtype))


def test_the_check_leaves_no_trace():
    model, state = tiny("cohere").train(), torch.get_rng_state()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert find_transform(model).scale == 0.25
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert before == {name: dict(vars(module)) for name, module in model.named_modules()}


def test_a_head_that_is_no_linear_layer():
    model = tiny_llama()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="LlamaForCausalLM .*not known.*its head is Sequential"):
        describe_head(model)


def test_quantized_weights_are_refused(tmp_path):
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its weights are quantized \(fp8\)"):
        read_model_config(ModelSource(str(tmp_path)))


def test_gemma2_refuses_attention_without_its_soft_cap(tmp_path):
    CONFIGS["gemma2"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sdpa cannot do.*flash_attention_2 on a GPU, or eager"):
        read_model_config(ModelSource(str(tmp_path)))
    assert read_model_config(ModelSource(str(tmp_path), "eager")).model_type == "gemma2"
