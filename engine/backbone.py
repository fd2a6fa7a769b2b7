"""A causal LM without its head: loading under ZeRO-3, and a module whose forward returns hidden states.

Forwards are packed: position ids restart at each sequence and there is no attention mask, from which transformers
builds the block-diagonal causal mask itself. Nothing here computes logits.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.batch import PackedBatch
from engine.config import GKDConfig
from engine.shards import load_partitioned

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


class HiddenStates(nn.Module):
    """Wraps a causal LM; forward returns the last hidden states at chosen packed positions, [N, H].

    The whole model stays a submodule, head included, so that one ZeRO engine owns all of its parameters. It must be
    called through that engine: around it, DeepSpeed's forward prologue is skipped and all but the last micro-batch's
    gradient is dropped.
    """

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self, input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, positions_N: torch.Tensor
    ) -> torch.Tensor:
        output = self.causal_lm.base_model(
            input_ids=input_ids_T[None], position_ids=position_ids_T[None], use_cache=False
        )
        return output.last_hidden_state[0].index_select(0, positions_N)


def hidden_states(module: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Hidden states that predict the batch's response tokens, [N, H]; `module` is a `HiddenStates` or its engine."""
    return module(batch.input_ids_T, batch.position_ids_T, batch.predictor_N)


def compute_dtype(config: GKDConfig) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float32


def load_causal_lm(name: str, config: GKDConfig, zero_settings: dict[str, Any] | None) -> nn.Module:
    """Load a causal LM in the run's compute dtype; with ZeRO-3 settings, partitioned while it loads.

    All ranks must call. Each reads its own pieces from safetensors files; other files, and checkpoints that
    transformers converts, are read by rank 0, which scatters one tensor at a time.

    Raises:
        ValueError: where there is no such model.
    """
    options = {"dtype": compute_dtype(config), "attn_implementation": config.attn_implementation}
    options["trust_remote_code"] = config.trust_remote_code
    if zero_settings is not None:
        model_config = read_model_config(name, config)
        # Looking the class up imports its file. Imported inside DeepSpeed's zero.Init (0.19.8), classes would lose what
        # decorators add to their __init__ when that context ends, as the experts of MoE models do.
        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
        model = load_partitioned(name, model_config, zero_settings, **options)
        if model is not None:
            model.generation_config = read_generation_config(name, model.config)
            return model
    # transformers partitions inside from_pretrained while this object lives; afterwards it would switch generate's
    # synced_gpus on by itself.
    partitioning = nullcontext() if zero_settings is None else HfDeepSpeedConfig(zero_settings)
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(
            f"model {name!r}: neither a local Hugging Face folder nor a reachable hub model ({error})"
        ) from error
    finally:
        del partitioning
        unset_hf_deepspeed_config()


def read_generation_config(name: str, model_config: Any) -> GenerationConfig:
    """The model's generation settings (its stop tokens matter here), from the file where there is one."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(model_config)


def read_model_config(name: str, config: GKDConfig) -> Any:
    """The model's configuration alone, to check vocabulary, head and attention before any weight is read.

    Raises:
        ValueError: where there is no such model, or the attention kernel leaves out a soft cap that the model has.
    """
    try:
        model_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: neither a local Hugging Face folder nor a reachable hub model ({error})"
        ) from error
    if model_config.model_type == "gemma2" and config.attn_implementation == "sdpa":
        raise ValueError(
            f"model {name!r}: Gemma 2 caps its attention logits, which attn_implementation=sdpa cannot do (NaN logits "
            "and wrong gradients follow): use flash_attention_2 on a GPU, or eager"
        )
    return model_config


def download_model(name: str) -> None:
    """Fetch a hub model's files into this host's cache; a local folder needs nothing. The weights are `*.safetensors`,
    or `*.bin` where there are no such files.

    Raises:
        ValueError: where the hub has no such model, or cannot be reached and the cache does not have it.
    """
    if Path(name).exists():
        return
    try:
        folder = snapshot_download(name, allow_patterns=MODEL_FILES)
        if not any(Path(folder).glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[*MODEL_FILES, "*.bin"])
    except (OSError, ValueError) as error:  # the hub's errors derive from one of them
        raise ValueError(
            f"model {name!r}: neither a local Hugging Face folder nor a reachable hub model ({error})"
        ) from error


def count_parameters(name: str | None, config: GKDConfig) -> int:
    """Parameters of a model, from its configuration alone; ValueError where there is none of that name."""
    if name is None:
        raise ValueError("model_name_or_path is not set")
    model_config = read_model_config(name, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    return model.num_parameters()


def switch_dropout_off(model: nn.Module) -> None:
    """Zero every dropout: modules, and the probabilities that attention layers keep as plain attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
