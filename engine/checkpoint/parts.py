"""What an export holds beside its weights: configuration, generation settings, tokenizer; whether they can be saved.

Each part has `save_pretrained`. No weights, no ranks here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from engine.errors import CheckpointError


@dataclass(frozen=True)
class GenerationSettings:
    """Generation settings that stop where rollouts stopped, so that what is served ends its turns.

    The ids go into the file: transformers 5.23 lets settings pass that contradict each other as long as they are as
    published, and refuses to save them once a field is changed.
    """

    generation_config: GenerationConfig
    stop_ids: tuple[int, ...]

    def save_pretrained(self, folder: Path) -> None:
        self.generation_config.save_pretrained(folder)
        path = Path(folder) / "generation_config.json"
        settings = json.loads(path.read_text())
        settings["eos_token_id"] = self.stop_ids[0] if len(self.stop_ids) == 1 else list(self.stop_ids)
        path.write_text(json.dumps(settings, indent=2) + "\n")


def export_parts(
    model_config: Any, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> list[Any]:
    return [model_config, GenerationSettings(generation_config, tuple(stop_ids)), tokenizer]


def check_saveable(parts: list[Any]) -> None:
    """Save the parts once, to be thrown away.

    Raises:
        ValueError: where one cannot be saved, which would otherwise show at the first checkpoint.
    """
    with TemporaryDirectory() as folder:
        try:
            save_parts(parts, Path(folder))
        except CheckpointError as error:
            raise ValueError(f"no checkpoint or export could be written: {error}") from error


def save_parts(parts: list[Any], folder: Path) -> None:
    for part in parts:
        try:
            part.save_pretrained(folder)
        except Exception as error:  # each library raises its own, on a full disk too
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the student's {type(part).__name__} cannot be saved: {reason}") from error
