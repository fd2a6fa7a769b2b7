"""The model card: what a model was distilled from, how, and with which figures.

Names of hub repositories go into its metadata, where the hub shows them as links; a name that is a path of this machine
goes nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import GKDConfig

PAPER = "https://huggingface.co/papers/2306.13649"
CITATION = """@inproceedings{agarwal2024onpolicy,
    title     = {On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},
    author    = {Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and
                 Geist, Matthieu and Bachem, Olivier},
    booktitle = {International Conference on Learning Representations},
    year      = {2024},
}"""

OURS = "<!-- Written by gkd-engine at each export. Take this line out to keep a text of your own. -->"

# What decides about the result; nothing that names a place.
SETTINGS = (
    "lmbda", "beta", "divergence", "skew_alpha", "temperature", "seq_kd", "sft_weight", "loss_normalization",
    "max_length", "max_new_tokens", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "bf16",
    "seed",
)  # fmt: skip

FIGURES = {
    "train/loss": "loss of the last step",
    "eval/divergence": "held-out divergence, references",
    "eval/divergence_on_policy": "held-out divergence, own samples",
    "eval/perplexity": "held-out perplexity",
}


@dataclass(frozen=True)
class Origin:
    """What a model comes from: names as they were given, which may be paths, and how far it was trained."""

    student: str | None
    teacher: str | None
    dataset: str | None
    num_steps: int
    global_batch: int


@dataclass(frozen=True)
class ReadMe:
    """A card as one of the parts of an export."""

    card: Any

    def save_pretrained(self, folder: Path) -> None:
        self.card.save(Path(folder) / "README.md")


def build_card(
    config: GKDConfig,
    origin: Origin,
    figures: Mapping[str, Any],
    versions: Mapping[str, str],
    model_name: str | None = None,
    tags: str | list[str] | None = None,
) -> Any:
    """The card, a `huggingface_hub.ModelCard`. `figures` has metrics by the names of `metrics.jsonl`."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = model_name or (config.hub_model_id or Path(config.output_dir).absolute().name).split("/")[-1]
    student, teacher, dataset = (hub_name(given) for given in (origin.student, origin.teacher, origin.dataset))
    results = [
        EvalResult("text-generation", dataset, dataset, metric.split("/")[1], figures[metric], metric_name=label)
        for metric, label in FIGURES.items()
        if dataset and metric.startswith("eval/") and metric in figures
    ]
    data = ModelCardData(
        base_model=student,
        datasets=dataset,
        eval_results=results or None,
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["gkd", "distillation", *([tags] if isinstance(tags, str) else tags or [])])),
    )
    settings = {setting: getattr(config, setting) for setting in SETTINGS}
    settings |= {"optimizer steps": origin.num_steps, "sequences per step": origin.global_batch}
    shown = {label: f"{figures[metric]:.4f}" for metric, label in FIGURES.items() if metric in figures}
    sections = [
        OURS,
        f"# {name}",
        (link(student) if student else "A local model")
        + f", distilled from {link(teacher) if teacher else 'a local model'}"
        + (f" on [{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else "")
        + f" with [generalized knowledge distillation]({PAPER}): the student learns the teacher's distribution over the"
        " next token, on answers from the data and on answers of its own.",
        usage(config.hub_model_id or name),
        "## Training",
        table(("setting", "value"), settings),
        *(["## Figures", table(("figure", "value"), shown)] if shown else []),
        "## Versions",
        table(("package", "version"), versions),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def is_of_a_user(read_me: Path) -> bool:
    """Whether somebody wrote the file, or changed it."""
    return read_me.is_file() and OURS not in read_me.read_text(encoding="utf-8")


def hub_name(name: str | None) -> str | None:
    """The name, where it is one of the hub's and not a path."""
    if not name or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).exists():
        return None
    return name


def link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def usage(repo_id: str) -> str:
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{repo_id}")\n'
        'print(generator([{"role": "user", "content": "What is distillation?"}], max_new_tokens=128))\n```'
    )


def table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *((key, str(value)) for key, value in rows.items())]
    return "\n".join(f"| {key} | {value} |" for key, value in lines)
