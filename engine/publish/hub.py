"""The hub's repository of one run: created at the start, pushed to in the background, every wait bounded.

Rank 0 talks to the hub, through huggingface_hub, in a thread of its own: training goes on meanwhile, and a hub that
never answers holds up neither the run nor the process's end. A hub that refuses at the start (token, name) is the
user's mistake; everything else that goes wrong there is a warning.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.cluster.agreement import from_main, raise_together
from engine.config import GKDConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_S = 60.0  # for requests that carry no weights, retries included
SLOWEST_BYTES_PER_S = 2**20  # a push that gets no further than this is given up
AGREE_S = 5.0  # between two looks of all ranks at a push they wait for; far below a collective's timeout

REFUSALS = (400, 401, 402, 403, 404)  # status codes that trying again does not change

# What a run folder holds about the run, beside a model that was saved there: paths of this machine, state, records.
RECORD = [
    "checkpoints/*", "final/*", "best/*", "logs/*", "tables/*", "bad_steps/*", "wandb/*", "tensorboard/*", ".*",
    "metrics.jsonl", "config.yaml", "trainer_state.json",
]  # fmt: skip


@dataclass
class Push:
    """A push under way: its commit, and how long it may take."""

    commit: Future[Any]
    limit_s: float


class Hub:
    """The repository `hub_model_id`; by default, the run folder's name under the token's owner.

    Attributes:
        repo_id: with its owner, once the hub has answered; known on rank 0 alone.
    """

    def __init__(self, config: GKDConfig, is_main: bool) -> None:
        self.config, self.is_main = config, is_main
        self.repo_id: str | None = None
        self._pushes: list[Push] = []

    def open(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository where it is not known to be there. All ranks must call.

        Raises:
            ValueError: where the hub refuses. One that cannot be reached is asked again at the next push.
        """
        raise_together(self._refusal(token, private) if self.is_main else None)

    def _refusal(self, token: str | None, private: bool | None) -> str | None:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            in_background(lambda: self._create(token, private)).result(ANSWER_S)
        except HFValidationError as error:
            return f"hub_model_id={self.config.hub_model_id!r} cannot be a repository's name: {error}"
        except HfHubHTTPError as error:
            if error.response.status_code in REFUSALS:
                return (
                    f"push_to_hub: the hub refuses {self._wanted_id}: {one_line(error)}. Give a hub_token that may "
                    "write there (or `hf auth login`), and a hub_model_id of yours"
                )
            self._warn(error)
        except Exception as error:  # the network's, in whatever library's words
            self._warn(error)
        return None

    def _warn(self, error: Exception) -> None:
        reason = f"no answer in {ANSWER_S:.0f} s" if isinstance(error, TimeoutError) else one_line(error)
        logger.warning(
            "the hub cannot be reached, so %s is not there yet; the run goes on: %s", self._wanted_id, reason
        )

    @property
    def _wanted_id(self) -> str:
        return self.config.hub_model_id or Path(self.config.output_dir).absolute().name

    def _create(self, token: str | None, private: bool | None) -> None:
        private = self.config.hub_private_repo if private is None else private
        created = self._api(token).create_repo(self._wanted_id, private=private, exist_ok=True)
        self.repo_id = created.repo_id

    def _api(self, token: str | None) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=token or self.config.hub_token, library_name="gkd-engine")

    def takes_checkpoint(self) -> bool:
        """Whether a checkpoint that is saved now is to be pushed; no, while the last one is under way.

        All ranks must call.
        """
        config = self.config
        if not config.push_to_hub or config.hub_strategy != "every_save":
            return False
        return from_main(config.hub_always_push or all(push.commit.done() for push in self._pushes))

    def push(
        self,
        folder: Path,
        message: str,
        token: str | None = None,
        revision: str | None = None,
        is_temporary: bool = False,
    ) -> Future[Any] | None:
        """Begin to upload a folder, after those that are under way; returns the commit, None on other ranks than 0.

        Of a run folder, what is about the run stays here (`RECORD`). A temporary folder is removed afterwards.
        """
        if not self.is_main:
            return None
        earlier = [push.commit for push in self._pushes]
        revision = revision or self.config.hub_revision

        def upload() -> Any:
            wait(earlier)
            try:
                return self._upload(folder, message, token, revision)
            finally:
                if is_temporary:
                    shutil.rmtree(folder, ignore_errors=True)

        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self._pushes.append(Push(in_background(upload), ANSWER_S + num_bytes / SLOWEST_BYTES_PER_S))
        return self._pushes[-1].commit

    def _upload(self, folder: Path, message: str, token: str | None, revision: str | None) -> Any:
        api = self._api(token)
        try:
            if self.repo_id is None:
                self._create(token, None)
            if revision is not None and revision != "main":
                api.create_branch(self.repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                ignore_patterns=list(RECORD),
            )
        except Exception as error:
            logger.warning(
                "%r was not pushed to %s; it lies in %s: %s", message, self._wanted_id, folder, one_line(error)
            )
            raise
        logger.info("%r is on the hub: %s", message, commit.commit_url)
        return commit

    def finish(self) -> Any:
        """Wait for what is under way, no longer than its size allows; the last commit, None where it failed.

        All ranks must call; none of them stays in a collective for long.
        """
        end_s = time.monotonic() + sum(push.limit_s for push in self._pushes if not push.commit.done())
        while not from_main(self._is_over(end_s)):
            pass
        last = self._pushes[-1].commit if self._pushes else None
        self._pushes.clear()
        return last.result() if last is not None and last.done() and last.exception() is None else None

    def _is_over(self, end_s: float) -> bool:
        waiting = wait([push.commit for push in self._pushes], timeout=AGREE_S).not_done
        if waiting and time.monotonic() >= end_s:
            logger.warning("the hub takes too long: %d pushes to %s are given up", len(waiting), self._wanted_id)
            return True
        return not waiting


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread that the process's end does not wait for, as it does for an executor's."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # comes out at `result`
            future.set_exception(error)

    threading.Thread(target=run, name="hub", daemon=True).start()
    return future


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
