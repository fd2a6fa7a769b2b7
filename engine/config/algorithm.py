"""The sections on the algorithm (arXiv 2306.13649), its rollouts and its loss on the ZeRO-3 partitions."""

import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from engine.config.options import PathText, SizeOrAuto, Words, option

DIVERGENCE_KINDS = ("jsd", "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "total_variation")
GENERATION_PLACEMENTS = ("gathered", "partitioned")  # `auto` takes one of these
TeacherPlacement = Literal["zero3", "replicated", "tensor_parallel"]
TeacherOffload = Literal["none", "between_steps"]


@dataclass(kw_only=True)
class AlgorithmFields:
    """Algorithm (arXiv 2306.13649)."""

    lmbda: float = option(0.5, "Probability that a step trains on samples that the student generates itself.")
    beta: float = option(0.5, "Generalized JSD weight: 0 is KL(teacher||student), 1 is KL(student||teacher).")
    temperature: float = option(0.9, "Divides both logits in the loss and is the sampling temperature.")
    seq_kd: bool = option(False, "On steps that are not on-policy, the teacher writes the completion.")
    divergence: str = option("jsd", "Divergence between teacher and student.", choices=DIVERGENCE_KINDS)
    skew_alpha: float = option(0.1, "Mixing weight of the skew divergences, in [0, 1).")
    token_clip: float | None = option(
        None, "Cap on one token's divergence, in nats; its gradient is zero where the cap binds."
    )
    sft_weight: float = option(
        0.0, "Weight of the reference tokens' negative log-likelihood, added on steps with dataset completions."
    )
    label_smoothing_factor: float = option(0.0, "Label smoothing of the reference term that `sft_weight` adds.")
    loss_normalization: str = option(
        "token",
        "`token`: mean over all response tokens; `sequence`: mean per sequence first; `trl`: as TRL 1.16 has it, see "
        "engine/loss/README.md.",
        choices=("token", "sequence", "trl"),
    )
    router_aux_loss_coef: float | None = option(
        None, "Weight of the load-balancing loss of a student with experts; unset: none."
    )
    neftune_noise_alpha: float | None = option(None, "Scale of NEFTune's noise on the input embeddings; unset: none.")


@dataclass(kw_only=True)
class GenerationFields:
    """Generation."""

    max_new_tokens: int = option(128, "Longest completion that a rollout samples, in tokens.")
    top_p: float = option(1.0, "Nucleus sampling: smallest set of tokens with this much probability.")
    top_k: int = option(0, "Sample among the k most likely tokens; 0 means all.")
    min_p: float = option(0.0, "Sample among tokens with at least this share of the likeliest one's probability.")
    min_new_tokens: int = option(0, "Shortest completion; stop tokens are held back until then.")
    repetition_penalty: float = option(1.0, "Divides the logits of tokens that occurred before; 1 is off.")
    num_generations: int = option(1, "Completions per prompt on an on-policy step; a micro-batch grows by this factor.")
    generation_rows: int = option(64, "Sequences that one rank decodes together; bounds the KV cache.")
    generation_placement: str = option(
        "auto",
        "`gathered`: the whole student on each rank to decode; `partitioned`: layer by layer; `auto`: by free memory.",
        choices=("auto", *GENERATION_PLACEMENTS),
    )
    rollout_reuse: int = option(1, "Optimizer steps that train on one batch of rollouts.")
    log_completions_steps: int | None = option(
        None, "Steps between tables of prompts, samples and their divergence; unset: none."
    )


@dataclass(kw_only=True)
class PartitionFields:
    """Teacher, and the loss on the ZeRO-3 partitions."""

    vocab_parallel_size: SizeOrAuto = option(
        "auto", "Ranks that together cover the vocabulary; `auto` is the ranks of one node."
    )
    loss_chunk_bytes: int | None = option(
        None, "Memory for one chunk of logits, in bytes; unset: 256 MiB on an accelerator, 32 MiB on CPU."
    )
    compile_loss: Annotated[str, Words("on", "off")] = option(
        "auto",
        "torch.compile for the element-wise part; `auto` compiles on an accelerator.",
        choices=("auto", "on", "off"),
    )
    teacher_placement: TeacherPlacement = option(
        "zero3",
        "`zero3` partitions the teacher over all ranks, `tensor_parallel` over a few, `replicated` puts it on each.",
        choices=typing.get_args(TeacherPlacement),
    )
    teacher_tp_size: int = option(1, "Ranks that share a `tensor_parallel` teacher.")
    teacher_deepspeed: dict[str, Any] | PathText | None = option(
        None, "DeepSpeed JSON (path, dict, text) of a `zero3` teacher, for offload; unset: plain ZeRO-3."
    )
    teacher_offload: TeacherOffload = option(
        "none",
        "`between_steps`: a `replicated` teacher and the student's optimizer state take turns on the device.",
        choices=typing.get_args(TeacherOffload),
    )
