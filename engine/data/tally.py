"""What is counted over the rows of a source, and what is said about them: an error, or a line for the user."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from engine.data.encoding import Outcome

logger = logging.getLogger(__name__)

NAMED_ROWS = 10  # of those that cannot be used


@dataclass(frozen=True)
class RowRules:
    """Which rows are used.

    Attributes:
        limit: only the first so many.
        answers: `optional`: rows without an answer are like the others; `some`: steps on the dataset pass over them;
            `all`: there are no other steps, so they are left out.
        on_bad_row: `error` or `skip`.
        num_proc: processes that tokenise; None chooses.
    """

    limit: int | None = None
    answers: str = "optional"
    on_bad_row: str = "error"
    num_proc: int | None = None


@dataclass
class Tally:
    """Counts over the rows of a source, and what is said about them."""

    name: str
    rules: RowRules
    max_length: int
    num_rows: int = 0
    num_prompts: int = 0
    num_answered: int = 0
    num_without_room: int = 0
    num_bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, place: str, outcome: Outcome) -> None:
        self.num_rows += 1
        self.notes.update(outcome.notes)
        if outcome.problem is not None:
            self.add_bad(place, outcome.problem)
        elif outcome.encoded is None:
            self.num_without_room += 1
        elif outcome.num_responses:
            self.num_answered += 1
        else:
            self.num_prompts += 1

    def add_bad(self, place: str, problem: str) -> None:
        self.num_bad += 1
        if len(self.first_bad) < NAMED_ROWS:
            self.first_bad.append(f"{place}: {problem}")

    def check(self) -> None:
        """Raise ValueError where rows may not be passed over, or none is left."""
        if self.num_rows == 0:
            raise ValueError(f"{self.name} is empty: it has no rows")
        if self.num_bad and (self.rules.on_bad_row == "error" or self.num_bad == self.num_rows):
            raise ValueError(self._describe_bad())
        if self.num_prompts + self.num_answered == 0:
            raise ValueError(f"{self.name}: every prompt fills max_length={self.max_length} tokens; raise max_length")
        if self.rules.answers != "optional" and self.num_answered == 0:
            raise ValueError(
                f"{self.name}, rows 1 to {self.num_rows}: none has an assistant turn or completion to train on, which "
                "steps on the dataset need. Prompts alone can be used with lmbda=1, or with seq_kd=true"
            )

    def _describe_bad(self) -> str:
        if self.rules.on_bad_row == "skip":
            return f"{self.first_bad[0]} ({self.name}: none of its {self.num_rows} rows can be used)"
        others = f"; then {'; '.join(f'{bad:.160}' for bad in self.first_bad[1:3])}" if self.num_bad > 1 else ""
        return (
            f"{self.first_bad[0]} ({self.num_bad} of {self.num_rows} rows cannot be used{others}; on_bad_row=skip "
            "leaves them out)"
        )

    def report(self) -> None:
        """Say what is left out and what else there is to know."""
        if self.num_bad:
            named = "".join(f"\n  {bad}" for bad in self.first_bad)
            logger.warning(
                "%s: skipped %d of %d rows that cannot be used (on_bad_row=skip); the first:%s",
                self.name, self.num_bad, self.num_rows, named,
            )  # fmt: skip
        if self.num_without_room:
            logger.warning(
                "%s: dropped %d of %d rows, whose prompt fills max_length=%d tokens",
                self.name, self.num_without_room, self.num_rows, self.max_length,
            )  # fmt: skip
        if self.num_prompts and self.rules.answers != "optional":
            where = "are used on on-policy steps only" if self.rules.answers == "some" else "are left out, as lmbda=0"
            logger.warning(
                "%s: %d of %d rows have no answer and %s", self.name, self.num_prompts, self.num_rows, where
            )  # fmt: skip
        for note, number in self.notes.most_common():
            logger.warning("%s: %s (%d of %d rows)", self.name, note, number, self.num_rows)
