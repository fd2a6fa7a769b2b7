"""Ids: whether two tokenizers mean the same by them, and whether the models have an embedding row for each in use.

GKD compares distributions id by id, so student and teacher must agree on every id that both have. Embeddings may have
more rows than the tokenizer has ids (padding), and fewer: then the ids without a row must not occur.

Nothing here knows of models, ranks or datasets. No collectives.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ADVICE = "GKD compares distributions id by id: use a student and a teacher of one model family"
MOST_RENAMES = 64  # more differences than this are another vocabulary, not renamed reserved tokens


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, allow_renames: Sequence[str] = ()
) -> None:
    """Check that both tokenizers mean the same by every token and id that both have.

    One may have more tokens than the other, and the embeddings any number of padding rows.

    Args:
        allow_renames: ids whose names may differ, each given as the id or as its name in either tokenizer.

    Raises:
        ValueError: where they differ otherwise, or an entry of `allow_renames` is no token or id of either.
    """
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    student_tokens = {token_id: token for token, token_id in student_ids.items()}
    teacher_tokens = {token_id: token for token, token_id in teacher_ids.items()}
    allowed = _allowed_ids(allow_renames, student_ids, teacher_ids)
    shared = student_tokens.keys() & teacher_tokens.keys()
    different = sorted(i for i in shared - allowed if student_tokens[i] != teacher_tokens[i])
    if different or not shared:
        shown = ", ".join(f"id {i} is {student_tokens[i]!r} and {teacher_tokens[i]!r}" for i in different[:3])
        raise ValueError(
            f"student and teacher tokenizers differ at {len(different)} of {len(shared)} shared ids "
            f"(student, teacher: {shown or 'no id in common'}). {ADVICE}{_rename_hint(different, sorted(allowed))}"
        )
    moved = sorted(
        token
        for token in student_ids.keys() & teacher_ids.keys()
        if student_ids[token] != teacher_ids[token] and not {student_ids[token], teacher_ids[token]} & allowed
    )
    if moved:
        token = moved[0]
        raise ValueError(
            f"student and teacher tokenizers differ: token {token!r} is id {student_ids[token]} for the student and "
            f"{teacher_ids[token]} for the teacher. {ADVICE}"
        )
    if student.eos_token_id != teacher.eos_token_id:  # common and legitimate: a base student, an instruct teacher
        logger.warning(
            "the tokenizers end a text differently: eos is %r for the student and %r for the teacher; completions "
            "stop at the student's and at its chat template's end of turn",
            student.eos_token,
            teacher.eos_token,
        )


def _allowed_ids(entries: Sequence[str], *vocabularies: dict[str, int]) -> set[int]:
    """The ids that `allow_token_renames` names. A token's name wins over a number, as "7" may be a token."""
    known = set().union(*(ids.values() for ids in vocabularies))
    allowed: set[int] = set()
    for entry in map(str, entries):
        found = {ids[entry] for ids in vocabularies if entry in ids}
        if entry.isdecimal() and int(entry) in known:
            found.add(int(entry))
        if not found:
            raise ValueError(
                f"allow_token_renames: {entry!r} is neither a token nor an id of the student's or teacher's tokenizer"
            )
        allowed |= found
    return allowed


def _rename_hint(different: list[int], allowed: list[int]) -> str:
    """What to set where a few tokens have other names, as reserved tokens have from one release to the next."""
    if not 0 < len(different) <= MOST_RENAMES:
        return ""
    value = ",".join(map(str, sorted({*different, *allowed})))
    return f". If these are only renamed (Llama 3 and 3.1 do that to reserved tokens): --allow_token_renames {value}"


def check_ids(ids: Iterable[int], num_rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every id has an embedding row in both models.

    Args:
        ids: token ids of a row, or stop ids.
        num_rows: rows that student and teacher share.

    Raises:
        ValueError: names the first token without a row.
    """
    largest = max(ids, default=-1)
    if largest >= num_rows:
        raise ValueError(
            f"token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, and student and teacher share only "
            f"{num_rows} embedding rows: remove the token, resize the smaller model's embeddings, or use another pair"
        )
