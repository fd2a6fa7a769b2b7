"""The command line: `python -m engine --help` lists the commands. Every configuration field is a flag of its name."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import yaml

from engine.config import GKDConfig, config_from_dict
from engine.config.pages import own_sections, shown_default
from engine.config.trl import trl_table
from engine.paths import expand_path
from engine.values import as_bool

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"


def main(arguments: list[str]) -> int:
    """Run a command; the user's mistakes end in one line and exit status 2, what befalls a run in one and status 1."""
    if arguments[:1] == ["bench"]:
        from engine.bench import main as bench

        return bench(arguments[1:])
    options, rest = build_parser().parse_known_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format=LOG_FORMAT)
    # torch 2.13 deprecates the names of collectives that deepspeed 0.19.8 calls, at every call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for noisy in ("DeepSpeed", "httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return COMMANDS[options.command](options, parse_overrides(rest))
    except Exception as error:  # the process ends here: the report decides on which rank's console it shows
        from engine.cluster.logs import report_failure

        return report_failure(error)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine",
        description="Generalized knowledge distillation on DeepSpeed ZeRO-3.",
        epilog="On several ranks: deepspeed [launcher flags] --module engine train --config RECIPE [--field value]",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "distil the teacher into the student"),
        ("evaluate", "evaluate a student on the test split"),
        ("check", "compare the ranks of a cluster, and measure links, disk and clocks, before a job"),
    ):
        command = commands.add_parser(
            name, help=text, epilog=describe_fields(), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--config", type=Path, help="YAML file of fields; flags override it")
        command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="a folder checkpoints/step_<N>")
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="dtype of the weights")
    fields = commands.add_parser("fields", help="print the table of configuration fields in Markdown")
    fields.add_argument("--trl", action="store_true", help="what each field of a script for TRL does here")
    commands.add_parser("bench", help="measure a part of the engine on this machine; bench --help", add_help=False)
    return parser


def describe_fields() -> str:
    lines = ["fields (each one a flag, --field value; a bare --field is true, --no_field false):"]
    for section, options in own_sections().items():
        lines.append(f"\n{section}:")
        for option in options:
            lines.append(f"  --{option.name} (default: {shown_default(option)})\n      {option.text}")
    lines.append("\nThe other fields of TRL's and transformers' scripts: engine/TRL.md says what each does here.")
    return "\n".join(lines)


def field_table() -> str:
    """The table of fields in engine/CONFIGURATION.md, in Markdown; `python -m engine fields` prints it."""
    lines = ["| field | default | |", "| --- | --- | --- |"]
    for section, options in own_sections().items():
        lines.append(f"| **{section}** | | |")
        lines += [f"| `{option.name}` | `{shown_default(option)}` | {option.text} |" for option in options]
    return "\n".join(lines)


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`--field value`, `--field=value`, and `--field a b` for a list; of a flag given twice the last one counts.

    A bare `--field` means true, and `--no_field` false, where the field has these.

    Raises:
        ValueError: for a word that belongs to no flag, or a flag without the value that it needs.
    """
    values: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: overrides are written --field value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and field_kind(name[3:]) == "bool":
            if equals:
                raise ValueError(f"{word}: write --{name[3:]} {value}, or --{name} alone")
            values[name[3:]] = "false"
            continue
        own = [value] if equals else take_values(name, rest)
        if not own and field_kind(name) in ("value", "list"):
            raise ValueError(f"--{name} needs a value")
        values[name] = (own[0] if len(own) == 1 else own) if own else "true"
    return values


def field_kind(name: str) -> str | None:
    """What a flag takes: "bool", "list", "switch" (a value, or bare for true), "value"; None for an unknown one."""
    if name not in GKDConfig.options():
        return None
    option = GKDConfig.options()[name]
    kinds = typing.get_args(option.hint) or (option.hint,)
    if bool in kinds:
        return "bool"
    if option.words is not None:
        return "switch"
    return "list" if any(kind is list or typing.get_origin(kind) is list for kind in (option.hint, *kinds)) else "value"


def take_values(name: str, rest: list[str]) -> list[str]:
    """Move the words that belong to a flag out of `rest`: what a bool cannot use is not its own."""
    kind, own = field_kind(name), []
    while rest and not rest[0].startswith("--"):
        if kind == "bool" and as_bool(rest[0]) is None:
            break
        own.append(rest.pop(0))
        if kind != "list":
            break
    return own


def read_config(path: Path | None, overrides: dict[str, Any]) -> GKDConfig:
    """The configuration from a YAML file and flags.

    Raises:
        ValueError: for a missing or malformed file, and as `config_from_dict`.
    """
    values: Any = {}
    if path is not None:
        path = Path(expand_path(str(path), "--config"))
        if not path.is_file():
            raise ValueError(f"--config {path}: no such file")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"--config {path}: not valid YAML ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"--config {path}: must hold `field: value` lines")
        config_from_dict(values, str(path))  # so that an error names the file it comes from
    return config_from_dict(values | overrides, "command line")


def train(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    config = read_config(options.config, overrides)
    from engine.cluster.logs import lines_out, open_rank_log

    open_rank_log(Path(config.output_dir), LOG_FORMAT)
    from engine.trainer import GKDTrainer  # other libraries talk while they are imported

    trainer = GKDTrainer(args=config, resumes_later=False)
    trainer.train()
    if trainer.run.rank == 0:
        with contextlib.redirect_stdout(lines_out()):
            print_summary(trainer)
    leave()
    return 0


def print_summary(trainer: Any) -> None:
    """Held-out figures and one answer, before and after, and where everything lies; of a stopped run, how to go on."""
    if trainer.loop.stopped_by is not None:
        step, saved = trainer.loop.state.step, trainer.run.checkpoints.saved_step
        print(f"\nstopped after step {step} of {trainer.run.num_steps} by {trainer.loop.stopped_by}; ", end="")
        goes_on = ". Continue with --resume_from_checkpoint auto"
        print(f"checkpoint of step {saved}{', of the model alone' if trainer.config.save_only_model else goes_on}")
        return
    evaluations, decode = trainer.loop.evaluations, trainer.run.tokenizer.decode
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        print(f"\n{'held-out':<26}{'before':>12}{'after':>12}")
        for name, label in (
            ("eval/divergence", "divergence, references"),
            ("eval/divergence_on_policy", "divergence, own samples"),
            ("eval/perplexity", "perplexity, references"),
        ):
            print(f"{label:<26}{before.metrics[name]:>12.4f}{after.metrics[name]:>12.4f}")
        print(f"\nprompt:  {decode(after.prompt_ids)!r}")
        for label, evaluation in (("before:", before), ("after:", after)):
            print(f"{label:<9}{decode(evaluation.answer_ids, skip_special_tokens=True)!r}")
    folder = Path(trainer.config.output_dir)
    print(f"\nrun folder:    {folder}\nmetrics:       {folder / 'metrics.jsonl'}")
    for name, where in trainer.loop.tracker.locations.items():
        print(f"{name + ' run:':<14} {where}")
    print(f"student (HF):  {folder / 'final'}")


def evaluate(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    config = read_config(options.config, overrides)
    from engine.assembly import assemble
    from engine.inputs import Inputs

    run = assemble(config, Inputs(), train=False)
    assert run.evaluator is not None
    metrics = run.evaluator.run().metrics
    if run.rank == 0:
        print(json.dumps(metrics))
    leave()
    return 0


def check(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    config = read_config(options.config, overrides)
    import torch.distributed as dist

    from engine.check import check_cluster
    from engine.cluster.startup import init_distributed

    problems = check_cluster(config, init_distributed(config.timeout_s))
    if dist.get_rank() == 0:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        print("not fit to run" if problems else "all alike: fit to run")
    leave()
    return 2 if problems else 0


def export(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    if overrides:
        raise ValueError(f"export takes no configuration fields, got {', '.join(overrides)}")
    import torch

    from engine.models.export import export_checkpoint

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    checkpoint, out = (Path(expand_path(str(path), "export")) for path in (options.checkpoint, options.out))
    export_checkpoint(checkpoint, out, dtype)
    print(f"wrote {out}")
    return 0


def leave() -> None:
    """Close the process group, so that no rank ends while another still talks to it."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def print_fields(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    print(trl_table() if options.trl else field_table())
    return 0


COMMANDS = {"train": train, "evaluate": evaluate, "check": check, "export": export, "fields": print_fields}
