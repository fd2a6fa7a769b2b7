"""The run folder: what an earlier run has left in it, when a start may go there, and what starting anew removes.

An earlier run is known by what cannot be had again for nothing: checkpoints, metrics of a step, the export. Logs,
`config.yaml` and figures from before the first step are left by starts that failed, and stand in nobody's way.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from engine.cluster.agreement import from_main
from engine.config import GKDConfig

logger = logging.getLogger(__name__)

CHECKPOINTS, METRICS, EXPORT, BEST = "checkpoints", "metrics.jsonl", "final", "best"
ADVICE = "--overwrite_output_dir starts anew and removes them, another output_dir keeps them"


def results_of_a_run(folder: Path) -> list[str]:
    """What an earlier run left: its checkpoints, its metrics, its export; empty for a folder without one."""
    steps = sorted(int(path.name[5:]) for path in (folder / CHECKPOINTS).glob("step_*") if path.name[5:].isdigit())
    found = [f"{CHECKPOINTS}/step_{steps[-1]}" + (f" and {len(steps) - 1} more" if steps[1:] else "")] if steps else []
    if has_trained(folder / METRICS):
        found.append(METRICS)
    return found + [name for name in (EXPORT, BEST) if (folder / name).is_dir() and any((folder / name).iterdir())]


def has_trained(metrics: Path) -> bool:
    """Whether a line of the file is of a step; the first one may be an evaluation before it."""
    if not metrics.is_file():
        return False
    with metrics.open(encoding="utf-8") as file:
        return any(is_of_a_step(line) for line, _ in zip(file, range(2), strict=False))


def is_of_a_step(line: str) -> bool:
    try:
        return json.loads(line)["step"] > 0
    except (ValueError, KeyError, TypeError):  # cut short by a crash
        return False


def check_start(config: GKDConfig, resume_from: Path | None) -> None:
    """Whether the run may write into its folder; rank 0 looks. All ranks must call.

    Raises:
        ValueError: where a start would destroy what an earlier run left there.
    """
    problem = find_problem(config, resume_from)
    if problem:
        raise ValueError(problem)


def find_problem(config: GKDConfig, resume_from: Path | None) -> str | None:
    """What a start would destroy in its folder, as rank 0 sees it. All ranks must call."""
    return from_main(problem_with_start(config, resume_from) if dist.get_rank() == 0 else None)


def problem_with_start(config: GKDConfig, resume_from: Path | None) -> str | None:
    folder = Path(config.output_dir)
    found = results_of_a_run(folder)
    own = (folder / CHECKPOINTS).absolute()
    if config.overwrite_output_dir or not found or (resume_from is not None and own in resume_from.absolute().parents):
        return None
    holds = f"output_dir={config.output_dir!r} holds an earlier run ({', '.join(found)})"
    if config.resume_from_checkpoint is None:
        return f"{holds}: --resume_from_checkpoint auto goes on with it, {ADVICE}"
    if resume_from is not None:
        return f"{holds}, and {resume_from} is a checkpoint of another: name another output_dir, or remove that run"
    if found == [METRICS]:  # steps that no checkpoint holds are trained again
        return None
    return (
        f"{holds}, and none of its checkpoints is whole, so there is nothing to go on from: with "
        f"--resume_from_checkpoint none, {ADVICE}"
    )


def clear(folder: Path) -> None:
    """Remove what an earlier run left, and say so; files that no run wrote stay."""
    owned: list[Iterable[Path]] = [
        (folder / CHECKPOINTS).glob("step_*"), (folder / CHECKPOINTS).glob(".*"),
        [folder / CHECKPOINTS / "latest", folder / METRICS, folder / EXPORT, folder / BEST],
        (folder / "tables").glob("*.jsonl"), (folder / "bad_steps").glob("step_*.jsonl"),
    ]  # fmt: skip
    removed = results_of_a_run(folder)
    for path in [path for paths in owned for path in paths]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if removed:
        logger.warning("--overwrite_output_dir: removed %s of %s", ", ".join(removed), folder)
