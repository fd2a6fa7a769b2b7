"""What a Hugging Face causal LM is made of: its text model, its head, and what its class does from there to logits.

A multimodal model is used for text alone: its text model is found inside, the rest is left out. How hidden states
become logits is read off the configuration and then proven on the class itself: its own `forward` runs around
stand-ins for text model and head, so that every step between them shows, exactly, at no cost, with no weight read and
wherever the weights lie. A class whose logits are anything else is an error.

Knows nothing of loading, ranks or losses. No collectives, no random numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import masking_utils

from engine.loss.head import HeadSpec
from engine.zero import partitions

# Fields of a (text) configuration that act on the logits: factors, divisors, and tanh caps.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping",)
PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
WIDEST_LOGIT = 64.0  # far enough that a cap shows


@dataclass(frozen=True)
class LogitTransform:
    """What follows the head's matrix product: softcap(scale * logits)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def is_composite(config: Any) -> bool:
    """Whether a configuration is a multimodal model's, with the text model's inside."""
    return config.get_text_config() is not config


def text_backbone(model: nn.Module) -> nn.Module:
    """The module that turns token ids into the hidden states that the head takes.

    Raises:
        ValueError: where the class has none apart from itself.
    """
    inner = model.get_decoder()
    if inner is model:  # Llama4ForCausalLM names a prefix that it does not have
        inner = model._modules.get("model")
    if inner is None:
        raise unknown(model, "it has no text model inside")
    return text_backbone(inner) if inner.get_output_embeddings() is not None else inner


def position_rows(config: Any) -> int:
    """Rows of position ids that the text model wants: 1, or 4 with multimodal rotary embeddings (Qwen-VL), where the
    first makes the mask of a packed row and the other three turn the heads."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return 4 if "mrope_section" in rope else 1


def freeze_unused(model: nn.Module) -> int:
    """Switch gradients off for what no text passes through, such as a vision tower; returns its parameters' number."""
    used = {id(p) for module in (text_backbone(model), model.get_output_embeddings()) for p in module.parameters()}
    unused = [p for p in model.parameters() if id(p) not in used]
    for param in unused:
        param.requires_grad_(False)
    return len(unused)


def check_packable(model: nn.Module) -> None:
    """Check that sequences can share a row, told apart by position ids that restart, as far as the class tells.

    Raises:
        ValueError: for recurrent or convolutional layers, encoder-decoders and classes that take no position ids.
    """
    text, backbone = model.config.get_text_config(), text_backbone(model)
    kinds = set(getattr(text, "layer_types", None) or ()) - PACKABLE_LAYERS
    if model.config.is_encoder_decoder:
        raise unusable(model, "it is an encoder-decoder; student and teacher are causal language models")
    if kinds or getattr(model, "_is_stateful", False) or getattr(backbone, "_is_stateful", False):
        shown = f" ({', '.join(sorted(kinds))})" if kinds else ""
        raise unusable(model, f"it has layers that carry a state from one packed sequence into the next{shown}")
    if getattr(text, "use_bidirectional_attention", False) is True:
        raise unusable(model, "its attention is bidirectional")
    name = type(backbone).__name__
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise unusable(model, f"{name} takes no position_ids, by which packed sequences are told apart")
    kernel = text._attn_implementation
    is_known = model.device.type == "meta" and type(backbone).__module__.startswith("transformers.")
    if is_known and kernel != "flash_attention_2" and not masks_packed_rows(model):
        raise unusable(
            model, f"{name} does not tell packed sequences apart by position_ids with attn_implementation={kernel}"
        )


class _MaskBuilt(Exception):
    """transformers has come to look for packed sequences in the position ids."""


def masks_packed_rows(model: nn.Module) -> bool:
    """Whether a text model on `meta` lets transformers build the mask of a packed row from its position ids.

    Some classes do not hand them on (gpt-oss and Falcon in 5.23). The forward is left as soon as it is known.
    """

    def found(*_: Any, **__: Any) -> None:
        raise _MaskBuilt

    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    rows = position_rows(model.config)
    positions = ids if rows == 1 else ids.expand(rows, 1, -1)
    before, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, found
    try:
        with torch.no_grad():
            text_backbone(model)(input_ids=ids, position_ids=positions, use_cache=False)
    except _MaskBuilt:
        return True
    except Exception:  # on `meta` a forward ends where it looks at values, which comes after the mask
        return False
    finally:
        masking_utils.find_packed_sequence_indices = before
    return False


def unusable(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} (model_type {model.config.model_type!r}) cannot be used: {reason}")


def unknown(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} (model_type {model.config.model_type!r}): the transform from hidden states to logits "
        f"is not known for this class: {reason}. See engine/models/structure.py"
    )


def describe_head(model: nn.Module) -> HeadSpec:
    """The head of a Hugging Face causal LM, partitioned or not.

    Raises:
        ValueError: where the logits of the model's class are not of this form.
    """
    transform, head = find_transform(model), model.get_output_embeddings()
    num_rows, hidden_size = partitions.full_shape(head.weight)
    tied = head.weight is model.get_input_embeddings().weight
    return HeadSpec(head.weight, head.bias, tied, transform.scale, transform.softcap, num_rows, hidden_size)


def find_transform(model: nn.Module) -> LogitTransform:
    """How a class turns head(hidden) into logits, from its configuration and compared with its own `forward`.

    The model may be on any device, partitioned, or on `meta`.

    Raises:
        ValueError: names the class and the largest difference, where the configuration does not explain the logits.
    """
    head, backbone = model.get_output_embeddings(), text_backbone(model)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise unknown(model, f"its head is {type(head).__name__}, not nn.Linear")
    # Whole numbers, so that a cast to bf16 on the way changes nothing.
    hidden_TH = (torch.arange(2 * head.in_features) % 97).view(1, 2, -1).to(head.weight.dtype)
    ramp_V = torch.linspace(-WIDEST_LOGIT, WIDEST_LOGIT, head.out_features)
    logits_TV = torch.stack([ramp_V, ramp_V.flip(0)])[None]
    own_TV = _run_around_stand_ins(model, backbone, head, hidden_TH, logits_TV)
    if own_TV.shape != logits_TV.shape:
        raise unknown(model, f"its logits have shape {list(own_TV.shape)} for a head of {list(logits_TV.shape)}")
    rounding = 1e-5 if own_TV.dtype == torch.float32 else 1e-2
    expected = _from_config(model.config.get_text_config())
    difference = 0.0
    for transform in (expected, LogitTransform()):  # some multimodal classes leave the text model's cap out
        apart = (own_TV.float() - transform.apply(logits_TV)).abs().max().item()
        if apart <= rounding * WIDEST_LOGIT * max(1.0, abs(transform.scale)):
            return transform
        difference = difference or apart
    raise unknown(
        model,
        f"its logits differ by up to {difference:.3g} from scale={expected.scale:g}, softcap={expected.softcap} "
        "which its configuration gives",
    )


def _from_config(config: Any) -> LogitTransform:
    def values(names: tuple[str, ...]) -> list[float]:
        return [value for name in names if (value := getattr(config, name, None)) is not None]

    scale = 1.0
    for factor in values(FACTORS):
        scale *= factor
    for divisor in values(DIVISORS):
        scale /= divisor
    return LogitTransform(scale, next(iter(values(SOFTCAPS)), None))


class _Outputs:
    """Stands for whatever class of output a text model returns: hidden states, and None for the rest."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: int) -> torch.Tensor | None:
        return self.last_hidden_state if place == 0 else None


def _is_same(received: torch.Tensor, sent: torch.Tensor) -> bool:
    """Whether values came through untouched; on `meta`, where there are none, whether their shape did."""
    if received.shape != sent.shape or received.device.type == "meta":
        return received.shape == sent.shape
    return torch.equal(received.to(sent.dtype), sent)


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """A module's `forward` replaced inside the block; hooks on it still run."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _run_around_stand_ins(
    model: nn.Module, backbone: nn.Module, head: nn.Linear, hidden: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """The logits that a model's own `forward` makes of given hidden states and given head outputs."""
    ids, positions = torch.tensor([[1, 2]]), torch.tensor([[0, 1]])
    embedded, given, taken = hidden + 100, [], []

    def run_backbone(*args: Any, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> _Outputs:
        input_ids = args[0] if args else input_ids
        received, sent = (inputs_embeds, embedded) if input_ids is None else (input_ids, ids)
        given.append(_is_same(received, sent))
        return _Outputs(hidden)

    def run_head(values: torch.Tensor) -> torch.Tensor:
        taken.append(_is_same(values, hidden))
        return logits.clone()

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_replaced(backbone, run_backbone))
        stack.enter_context(_replaced(head, run_head))
        stack.enter_context(_replaced(model.get_input_embeddings(), lambda *_, **__: embedded))
        try:
            output = model(input_ids=ids, position_ids=positions, use_cache=False)
        except Exception as error:  # a class may do anything with what it is given
            raise unknown(model, f"its forward cannot be followed ({type(error).__name__}: {error})") from error
    if given != [True]:
        raise unknown(model, f"it does not hand its token ids to {type(backbone).__name__} as they are")
    if taken != [True]:
        raise unknown(model, f"its head does not take the hidden states of {type(backbone).__name__} as they are")
    return output.logits
