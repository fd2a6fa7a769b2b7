"""A causal LM without its head: loading under ZeRO-3, and a module whose forward returns hidden states.

Forwards are packed: position ids restart at each sequence and there is no attention mask, from which transformers
builds the block-diagonal causal mask itself. Nothing here computes logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from engine.cluster.agreement import raise_together
from engine.config import GKDConfig
from engine.config.source import ModelSource
from engine.data.batch import PackedBatch, Sample, pack
from engine.models.regularizers import RouterBalance
from engine.models.shards import load_partitioned
from engine.models.structure import check_packable, find_transform, is_composite, position_rows, text_backbone, unusable
from engine.models.weights import check_complete, check_files

logger = logging.getLogger(__name__)

POSITION_TABLES = ("opt", "gpt_neo", "biogpt", "xglm")  # beside those whose configuration says n_positions
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
        self.position_rows = position_rows(causal_lm.config)
        self.balance: RouterBalance | None = None

    def forward(
        self, input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, positions_N: torch.Tensor
    ) -> torch.Tensor:
        inputs = packed_inputs(input_ids_T, position_ids_T, self.position_rows)
        if self.balance is not None and self.training:
            outputs = text_backbone(self.causal_lm)(**inputs, output_router_logits=True)
            self.balance.logits = outputs.router_logits
        else:
            outputs = text_backbone(self.causal_lm)(**inputs)
        return outputs.last_hidden_state[0].index_select(0, positions_N)


def packed_inputs(input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, position_rows: int) -> dict[str, Any]:
    """What a text model is called with for one packed row; `position_rows` as `structure.position_rows`."""
    positions = position_ids_T[None] if position_rows == 1 else position_ids_T.expand(position_rows, 1, -1)
    return {"input_ids": input_ids_T[None], "position_ids": positions, "use_cache": False}


def hidden_states(module: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Hidden states that predict the batch's response tokens, [N, H]; `module` is a `HiddenStates` or its engine."""
    return module(batch.input_ids_T, batch.position_ids_T, batch.predictor_N)


def compute_dtype(config: GKDConfig) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float32


def load_causal_lm(source: ModelSource, dtype: torch.dtype, zero_settings: dict[str, Any] | None) -> nn.Module:
    """Load a causal LM in the run's compute `dtype`; with ZeRO-3 settings, partitioned while it loads.

    All ranks must call. Each reads its own pieces from safetensors files; other files, and checkpoints that
    transformers converts, are read by rank 0, which scatters one tensor at a time.

    Raises:
        ValueError: where there is no such model, or its files lack a tensor or have it in another shape.
    """
    options = {"dtype": dtype, "attn_implementation": source.attn_implementation}
    options["trust_remote_code"] = source.trust_remote_code
    name, model_config = source.name, read_model_config(source)
    auto_class = find_auto_class(name, model_config)
    if zero_settings is not None:
        if is_composite(model_config):
            build_on_meta(source, model_config)  # imports its parts
        # Imported inside DeepSpeed's zero.Init (0.19.8), classes would lose what decorators add to their __init__ when
        # that context ends, as the experts of MoE models do: by now they are imported.
        model = load_partitioned(source, auto_class, model_config, zero_settings, **options)
        if model is not None:
            model.generation_config = read_generation_config(source, model.config)
            return model
    # transformers partitions inside from_pretrained while this object lives; afterwards it would switch generate's
    # synced_gpus on by itself.
    partitioning = nullcontext() if zero_settings is None else HfDeepSpeedConfig(zero_settings)
    model, problem = None, None
    try:
        model, info = auto_class.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=zero_settings is None,
            **options,
            **source.of_hub,
        )
        check_complete(name, info["missing_keys"], info["mismatched_keys"], info["unexpected_keys"])
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:  # under ZeRO-3 some are rank 0's alone
        problem = " ".join(str(error).split())
    finally:
        del partitioning
        unset_hf_deepspeed_config()
    if problem is not None and not problem.startswith("model "):
        problem = f"model {name!r} could not be loaded: {problem}"
    raise_together(problem)
    return model


def read_generation_config(source: ModelSource, model_config: Any) -> GenerationConfig:
    """The model's generation settings (its stop tokens matter here), from the file where there is one."""
    try:
        return GenerationConfig.from_pretrained(source.name, **source.of_hub)
    except OSError:
        return GenerationConfig.from_model_config(model_config)


def read_model_config(source: ModelSource) -> Any:
    """The model's configuration alone, to check vocabulary, head and attention before any weight is read.

    Raises:
        ValueError: where there is no such model, its weights are quantized, or the attention kernel leaves out a soft
            cap that the model has.
    """
    name = source.name
    try:
        model_config = AutoConfig.from_pretrained(name, trust_remote_code=source.trust_remote_code, **source.of_hub)
    except (OSError, ValueError) as error:
        raise not_found(source, error) from error
    except StrictDataclassError as error:
        raise ValueError(f"model {name!r}: its config.json is wrong: {' '.join(str(error).split())}") from error
    quantized = getattr(model_config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise ValueError(f"model {name!r}: its weights are quantized ({method}): use or make an unquantized copy")
    if model_config.model_type == "gemma2" and source.attn_implementation == "sdpa":
        raise ValueError(
            f"model {name!r}: Gemma 2 caps its attention logits, which attn_implementation=sdpa cannot do (NaN logits "
            "and wrong gradients follow): use flash_attention_2 on a GPU, or eager"
        )
    return model_config


def not_found(source: ModelSource, error: Exception) -> ValueError:
    """What a model's name is told that leads nowhere."""
    where = f"hub model of revision {source.revision!r}" if source.revision else "hub model"
    return ValueError(f"model {source.name!r}: neither a local Hugging Face folder nor a reachable {where} ({error})")


def check_positions(model_config: Any, max_length: int, who: str, may_warn: bool) -> None:
    """Compare `max_length` with the positions that a model was made for.

    A table of positions ends there; rotary ones go on, into what the model has never seen, so that is a warning.

    Raises:
        ValueError: where the model has no position for a row's last token.
    """
    text = model_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or {}
    if isinstance(limit, int) and scaling.get("original_max_position_embeddings") and scaling.get("factor"):
        limit = max(limit, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
    if not isinstance(limit, int) or not 0 < limit < max_length:
        return
    if not scaling and ("max_position_embeddings" in text.attribute_map or text.model_type in POSITION_TABLES):
        raise ValueError(
            f"max_length={max_length}: the {who} ({text.model_type}) has {limit} positions and can have no more: set "
            f"max_length to {limit} or less"
        )
    if may_warn:
        logger.warning(
            "max_length=%d is beyond the max_position_embeddings=%d of the %s (%s): set max_length to that or less, or "
            "give its configuration rope scaling (rope_parameters) and the longer limit",
            max_length, limit, who, text.model_type,
        )  # fmt: skip


def download_model(source: ModelSource) -> None:
    """Fetch a hub model's files into this host's cache, and check that the weights are whole; a local folder is only
    checked. The weights are `*.safetensors`, or `*.bin` where there are no such files.

    Raises:
        ValueError: where the hub has no such model, or cannot be reached and the cache does not have it; for weight
            files that are missing or cut short.
    """
    name = source.name
    if Path(name).exists():
        return check_files(name, Path(name))
    try:
        folder = Path(snapshot_download(name, allow_patterns=MODEL_FILES, **source.of_hub))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[*MODEL_FILES, "*.bin"], **source.of_hub)
    except (OSError, ValueError) as error:  # the hub's errors derive from one of them
        raise not_found(source, error) from error
    return check_files(name, folder)


def find_auto_class(name: str, model_config: Any) -> Any:
    """The transformers class that loads a model, vision tower and all where its configuration has one.

    Raises:
        ValueError: where it is no language model.
    """
    kind = type(model_config)
    image_text = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    text_alone = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    # Llama 4's configuration loads as a text model too, which would drop the vision tower of a checkpoint that has one.
    if image_text is not None and is_composite(model_config):
        if text_alone is None or image_text.__name__ in (model_config.architectures or ()):
            return AutoModelForImageTextToText
    remote = getattr(model_config, "auto_map", None) or {}
    if text_alone is None and "AutoModelForCausalLM" not in remote:
        raise ValueError(f"model {name!r}: {kind.__name__} is not the configuration of a causal language model")
    return AutoModelForCausalLM


def build_on_meta(source: ModelSource, model_config: Any) -> nn.Module:
    """The model without weights. Raises ValueError where transformers cannot build it."""
    name = source.name
    auto_class = find_auto_class(name, model_config)
    options = {"attn_implementation": source.attn_implementation, "trust_remote_code": source.trust_remote_code}
    try:
        with torch.device("meta"), no_init_weights():
            model = auto_class.from_config(model_config, **options)
    except Exception as error:  # no such attention kernel, a package that is missing, a field that config.json lacks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"model {name!r}: {auto_class.__name__} cannot build it ({reason})") from error
    model.tie_weights()  # which transformers leaves to the initialisation of weights
    return model


def check_usable(model: nn.Module, longest_row: int) -> None:
    """Check what a class shows of itself, before any weight is read: head, packing, attention.

    Args:
        longest_row: most tokens that one packed row may have.

    Raises:
        ValueError: names the class and what stands in the way.
    """
    find_transform(model)
    check_packable(model)
    if "hf_device_map" in vars(model) and any(param.is_meta for param in model.parameters()):
        raise unusable(
            model, "device_map= has offloaded some of its weights: load it without device_map, or give its name"
        )
    text = model.config.get_text_config()
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk is not None and longest_row > chunk:  # transformers counts chunks from the start of the packed row
        raise unusable(
            model,
            f"its attention works in chunks of attention_chunk_size={chunk} tokens, and sequences that share a row of "
            f"up to {longest_row} would straddle them: lower per_device_train_batch_size (or _eval_) or max_length",
        )


def check_packing(model: nn.Module, score: Callable[[PackedBatch], torch.Tensor], device: torch.device) -> None:
    """Check that sequences in one row do not see each other: one short sequence twice, with another in between.

    All ranks must call where the model is partitioned. `score` gives the hidden states of a batch.

    Raises:
        ValueError: where the second time gives other hidden states than the first.
    """
    repeated, between = [11, 42, 73, 34, 95], [56, 17, 88, 29, 61, 92]
    num_rows = model.get_output_embeddings().out_features
    rows = [[token % num_rows for token in row] for row in (repeated, between, repeated)]
    with torch.no_grad():
        hidden = score(pack([Sample(row[:1], row, [False] + [True] * (len(row) - 1), 0) for row in rows], device))
    first, again = hidden[:4].float(), hidden[-4:].float()
    apart = ((first - again).norm(dim=-1) / first.norm(dim=-1)).max().item()
    # Rounding alone, as both lie at other places of the row: under 0.01 in fp32 with TF32, and about 0.02 in bf16.
    if not apart <= (0.02 if hidden.dtype == torch.float32 else 0.25):
        raise unusable(
            model, f"sequences that share a row see each other (hidden states differ by {apart:.2g} of their size)"
        )


def count_parameters(source: ModelSource) -> int:
    """Parameters of a model, from its configuration alone; ValueError where there is none of that name."""
    return build_on_meta(source, read_model_config(source)).num_parameters()


def detach_device_map(model: nn.Module) -> None:
    """Take off what `device_map=` left on a model object; `check_usable` has found its weights to be there."""
    if "hf_device_map" in vars(model):
        remove_hook_from_module(model, recurse=True)
        del model.hf_device_map


def switch_dropout_off(model: nn.Module) -> None:
    """Zero every dropout: modules, and the probabilities that attention layers keep as plain attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
