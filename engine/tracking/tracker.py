"""Tracking: what a run writes down about itself.

`metrics.jsonl` in the run folder is always written and is the record that tests and users compare; other
trackers (wandb, tensorboard) and the console get the same figures. Only the main rank writes. No function here
contains a collective, and nothing here knows of models or losses.

A tracker's server that fails must not stop training: every call to one goes through `Tracker._on_backends`, which
catches every exception. `metrics.jsonl` is not a tracker in this sense: where it
cannot be written, the run stops.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import netrc
import os
import platform
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import yaml

from engine.config import GKDConfig
from engine.tracking.command import command_line, hide_secrets_from_libraries
from engine.tracking.progress import Progress
from engine.tracking.timing import Phases
from engine.values import as_bool

logger = logging.getLogger(__name__)

Metric = float | int | bool | str | None

# wandb's own limits are 90 s and none at all; an unreachable server would hold the cluster for as long.
WANDB_INIT_TIMEOUT_S = 30.0
WANDB_FINISH_TIMEOUT_S = 60.0

WANDB_PROJECT = "gkd-engine"  # where neither the configuration nor WANDB_PROJECT says another

VERSIONED_PACKAGES = ("gkd-engine", "torch", "deepspeed", "transformers", "accelerate", "datasets", "wandb")


class Backend(Protocol):
    """One tracker beside `metrics.jsonl`. Any method may raise."""

    location: str | None

    def open(self, resumed_step: int) -> None: ...
    def log(self, step: int, metrics: Mapping[str, Metric]) -> None: ...
    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...
    def finish(self) -> None: ...


class Tracker:
    """Metrics of one run. Every rank holds one; on ranks other than the main one all but `time` does nothing.

    Attributes:
        run_id: wandb's id; WANDB_RUN_ID or a new one where `run_id` is None. A resume keeps the checkpoint's, whatever
            WANDB_RUN_ID says, and goes on with that record. On other ranks than the main one it is the `run_id` given.
    """

    def __init__(
        self, config: GKDConfig, run_dir: Path, is_main: bool, run_id: str | None, extra_config: dict[str, Any]
    ) -> None:
        """Write `config.yaml`, unless this is not the main rank.

        `extra_config` is recorded beside the config's fields; its keys must differ from them (the resolved
        DeepSpeed settings, the world size).
        """
        self.config = config
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        self.run_id = run_id
        self._phases = Phases()
        self._first_step = 0
        self._last_step: int | None = None
        self._progress: Progress | None = None
        self._backends: dict[str, Backend] = {}
        self._is_open = False
        if not is_main:
            return
        self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        hide_secrets_from_libraries()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
        record = {**config.to_dict(), **extra_config, "versions": package_versions(), "command": command_line()}
        if "wandb" in config.report_to and wandb_mode(config.wandb_mode) != "disabled":
            if self.run_id != os.environ.get("WANDB_RUN_ID", self.run_id):
                logger.warning("WANDB_RUN_ID is not used: the resumed run goes on under its own id %s", self.run_id)
            self._backends["wandb"] = WandbBackend(config, self.run_dir, self.run_id, record)
        if "tensorboard" in config.report_to:
            self._backends["tensorboard"] = TensorboardBackend(self.run_dir / "tensorboard", record)

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def locations(self) -> dict[str, str]:
        """Where each tracker's run is, by its name: a folder or an address."""
        return {name: backend.location for name, backend in self._backends.items() if backend.location is not None}

    def begin(self, step: int, total_steps: int) -> None:
        """Start the clock of a run with `step` of its `total_steps` behind it, and `rewind` to `step`."""
        self._first_step = self._last_step = step
        self.rewind(step)
        if self.is_main:
            has_ends = self.config.logging_strategy == "steps"
            self._progress = Progress(step, total_steps, has_ends, not self.config.disable_tqdm)

    def rewind(self, step: int) -> None:
        """Drop what a run that got further than `step` has written, so that no step is there twice.

        At 0 everything goes: a fresh start into a used folder begins a new record.
        """
        if not self.is_main:
            return
        for path in (self.metrics_path, *sorted((self.run_dir / "tables").glob("*.jsonl"))):
            drop_later_lines(path, step)
        if self._is_open:
            self._on_backends(lambda backend: backend.finish())
        self._is_open = True
        self._on_backends(lambda backend: backend.open(step))

    def log(self, step: int, metrics: Mapping[str, Metric], is_wanted: bool = False) -> None:
        """Append a line to `metrics.jsonl`: `step`, `metrics`, and the seconds under `time` since the last call.

        A second call for the same step joins its line. `is_wanted`: the console shows the step.
        """
        phases = {f"perf/{name}_s": seconds for name, seconds in self._phases.take().items()}
        if not self.is_main:
            return
        metrics = {**metrics, **phases}
        if step == self._last_step:
            join_last_line(self.metrics_path, {"step": step, **metrics})
        else:
            append_line(self.metrics_path, {"step": step, **metrics})
        self._last_step = step
        self._open_once()
        self._on_backends(lambda backend: backend.log(step, metrics))
        if self._progress is not None:
            self._progress.show(step, metrics, is_wanted)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record rows of text or figures, such as samples, in `tables/<name>.jsonl` and the trackers."""
        if not self.is_main:
            return
        path = self.run_dir / "tables" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        for row in rows:
            append_line(path, {"step": step, **dict(zip(columns, row, strict=True))})
        self._open_once()
        self._on_backends(lambda backend: backend.table(name, step, columns, rows))

    def time(self, name: str) -> AbstractContextManager[None]:
        """Add a block's seconds to `perf/<name>_s` of the next `log`."""
        return self._phases.time(name)

    def finish(self) -> None:
        """Close the trackers, waiting a bounded time for an upload."""
        if self._progress is not None:
            self._progress.close()
        self._on_backends(lambda backend: backend.finish())

    def _open_once(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._on_backends(lambda backend: backend.open(self._first_step))

    def _on_backends(self, action: Callable[[Backend], None]) -> None:
        """Run `action` on each tracker; at one's first failure, warn and go on without it."""
        for name, backend in list(self._backends.items()):
            try:
                action(backend)
            except Exception as error:
                logger.warning(
                    "%s failed and is switched off; training goes on, and %s has every metric. %s: %s",
                    name, self.metrics_path, type(error).__name__, error,
                )  # fmt: skip
                del self._backends[name]


class WandbBackend:
    """A wandb run: online where that is asked for and reachable, else offline in the run folder.

    Every metric's x-axis is `step`, the optimizer step; `train/tokens_total`, response tokens trained on, is defined as
    the other that charts may use. The step is wandb's own as well, so that the steps which a resumed run repeats are
    dropped by wandb instead of standing in the history twice.
    """

    def __init__(self, config: GKDConfig, run_dir: Path, run_id: str, record: dict[str, Any]) -> None:
        self.config, self.run_dir, self.run_id, self.record = config, run_dir, run_id, record
        self.location: str | None = None

    def open(self, resumed_step: int) -> None:
        import wandb

        mode = wandb_mode(self.config.wandb_mode)
        try:
            self.run = self._init(mode)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            logger.warning("wandb cannot be reached: recording offline (upload later with `wandb sync`). %s", error)
            # wandb's service holds on to the failed run's id. A run of the user's own would live there too, and stays.
            if wandb.run is None:
                wandb.teardown()
            self.run = self._init("offline")
        self.location = self.run.url or str(Path(self.run.dir).parent)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("train/tokens_total", step_metric="step")
        self.run.define_metric("*", step_metric="step")

    def _init(self, mode: Any) -> Any:
        """`mode` may be whatever WANDB_MODE says; wandb checks it. The variables are read here, as wandb keeps those
        that it finds at the first run of a process for all later ones."""
        import wandb

        config = self.config
        return wandb.init(
            project=config.named_project or os.environ.get("WANDB_PROJECT") or WANDB_PROJECT,
            entity=config.wandb_entity or os.environ.get("WANDB_ENTITY"),
            group=config.wandb_group or os.environ.get("WANDB_RUN_GROUP"),
            tags=config.wandb_tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag] or None,
            name=config.run_name or os.environ.get("WANDB_NAME") or self.run_dir.name,
            id=self.run_id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or self.run_dir,
            mode=mode,
            config=self.record,
            settings=wandb.Settings(
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", WANDB_INIT_TIMEOUT_S)),
                finish_timeout=WANDB_FINISH_TIMEOUT_S,
            ),
        )

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        self.run.log({"step": step, **metrics}, step=step)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self.run.log({"step": step, name: table}, step=step)

    def finish(self) -> None:
        self.run.finish()


class TensorboardBackend:
    """Event files; after a resume, tensorboard hides what lies past the step resumed from."""

    def __init__(self, log_dir: Path, record: dict[str, Any]) -> None:
        self.location: str | None = str(log_dir)
        self.record = record

    def open(self, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.location, purge_step=resumed_step + 1)
        text = yaml.safe_dump(json.loads(json.dumps(self.record, default=str)), sort_keys=False)
        self.writer.add_text("config", f"```yaml\n{text}\n```", global_step=resumed_step)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (bool, int, float)):
                self.writer.add_scalar(name, value, global_step=step)
        self.writer.flush()

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), global_step=step)

    def finish(self) -> None:
        self.writer.close()


def wandb_mode(wanted: str) -> str:
    """`wanted`, with `auto` decided by WANDB_DISABLED, WANDB_MODE, or else by whether there is a key.

    Never online without a key: wandb would ask for one at the terminal, and the run would hang there.
    """
    if wanted == "auto" and as_bool(os.environ.get("WANDB_DISABLED")):
        return "disabled"
    if wanted == "auto":
        wanted = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        wanted = {"run": "online", "dryrun": "offline"}.get(wanted, wanted)  # the words of older versions
    if wanted == "online" and not has_wandb_key():
        logger.warning("wandb is to be online, but has no key (WANDB_API_KEY or `wandb login`): recording offline")
        return "offline"
    return wanted


def has_wandb_key() -> bool:
    """Whether wandb finds a key without asking: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host is not None and netrc.netrc(path).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object; floats are written so that they read back exactly (not a number as `NaN`)."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def join_last_line(path: Path, values: dict[str, Any]) -> None:
    """Add values to the last line of a JSONL file where it is of the same step, else append them."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    if last.get("step") != values["step"]:
        append_line(path, values)
        return
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines[:-1]), encoding="utf-8")
    append_line(partial, last | values)
    partial.replace(path)


def drop_later_lines(path: Path, step: int) -> None:
    """Rewrite a JSONL file without the lines past `step`, and without a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and 0 < step >= json.loads(line)["step"]:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def package_versions() -> dict[str, str]:
    """Installed versions of what a result depends on; a package that is not installed is left out."""
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {
        name: installed[name] for name in VERSIONED_PACKAGES if name in installed
    }
