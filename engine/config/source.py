"""Where a model that comes by name is loaded from, and how: the name, and what `model_init_kwargs` says of it.

A `config` here is a `GKDConfig`, whose checks import this file. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.config.models import ATTENTION_KERNELS

# Those of which the run decides: its compute dtype is `bf16`'s, and no forward of training has a KV cache.
PASSED_OVER: Mapping[str, tuple[Any, ...] | None] = MappingProxyType(
    {
        "dtype": ("auto", "float32", "bfloat16", "float16", None),
        "use_cache": (True, False, None),
        "low_cpu_mem_usage": (True, False, None),
    }
)
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "device_map": "ZeRO-3 puts the weights where they belong: leave it out",
        "quantization_config": "quantized weights cannot be partitioned: leave it out, and give the teacher "
        "`teacher_deepspeed` with offload where memory is short",
        "load_in_4bit": "quantized weights cannot be partitioned: leave it out",
        "load_in_8bit": "quantized weights cannot be partitioned: leave it out",
    }
)
USED = ("attn_implementation", "revision", "trust_remote_code")


@dataclass(frozen=True)
class ModelSource:
    """A model by name. `revision` is a branch, tag or commit of a hub repository; a local folder has none."""

    name: str
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def of_hub(self) -> dict[str, Any]:
        """What tells the hub, or its cache, which files are meant."""
        return {} if self.revision is None else {"revision": self.revision}


def model_source(config: Any, name: str, values: Any) -> ModelSource:
    """`values` are the model's init kwargs; what they leave open is as the configuration's own fields say."""
    given = {key: values[key] for key in USED if values and values.get(key) is not None}
    given.setdefault("attn_implementation", config.attn_implementation)
    given.setdefault("trust_remote_code", config.trust_remote_code)
    return ModelSource(name, **given)


def student_source(config: Any) -> ModelSource:
    """ValueError where `model_name_or_path` is not set."""
    if config.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set, and no model object was given")
    return model_source(config, config.model_name_or_path, config.model_init_kwargs)


def teacher_source(config: Any) -> ModelSource:
    """ValueError where `teacher_model_name_or_path` is not set."""
    if config.teacher_model_name_or_path is None:
        raise ValueError("teacher_model_name_or_path is not set, and no model object was given")
    return model_source(config, config.teacher_model_name_or_path, config.teacher_model_init_kwargs)


def init_kwargs_problem(field: str, values: dict[str, Any] | None) -> str | None:
    """What is wrong with a model's init kwargs, as a sentence; None where nothing is."""
    for key, value in (values or {}).items():
        if key in REFUSED:
            if value not in (None, False):
                return f"{field} `{key}`={value!r} is not supported: {REFUSED[key]}"
        elif key in PASSED_OVER:
            if value not in (allowed := PASSED_OVER[key] or ()):
                return f"{field} `{key}`={value!r}: must be one of {', '.join(map(str, allowed))}"
        elif key not in USED:
            known = ", ".join((*USED, *PASSED_OVER))
            return f"{field} has `{key}`, which is not passed on; allowed are {known}"
    return _value_problem(field, values or {})


def _value_problem(field: str, values: Mapping[str, Any]) -> str | None:
    kernel, revision, trust = (values.get(key) for key in USED)
    if kernel is not None and kernel not in ATTENTION_KERNELS:
        return f"{field} `attn_implementation`={kernel!r}: must be one of {', '.join(ATTENTION_KERNELS)}"
    if trust not in (None, True, False):
        return f"{field} `trust_remote_code`={trust!r}: must be true or false"
    if revision is not None and not isinstance(revision, str):
        return f"{field} `revision`={revision!r}: must be the name of a branch or tag, or a commit"
    return None
