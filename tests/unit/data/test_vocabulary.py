"""Two tokenizers against each other, and ids against embedding rows."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engine.data.vocabulary import check_ids, check_same_vocabulary
from tests.library.models import tiny_tokenizer


def backend(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), eos_token="e")


def test_same_vocabulary(caplog):
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    check_same_vocabulary(student, teacher)
    teacher.add_tokens(["<extra>"])
    check_same_vocabulary(student, teacher)
    student.add_tokens(["<other>"])
    with pytest.raises(ValueError, match=rf"id {len(student) - 1} is '<other>' and '<extra>'"):
        check_same_vocabulary(student, teacher)
    student.add_tokens(["<extra>"])
    teacher = tiny_tokenizer()
    teacher.add_tokens(["<other>"])
    check_same_vocabulary(student, teacher)
    teacher.eos_token = "<|end|>"
    check_same_vocabulary(student, teacher)
    assert "eos is '<|im_end|>' for the student and '<|end|>'" in caplog.text


def test_same_token_at_another_id():
    with pytest.raises(ValueError, match="'b' is id 1 for the student and 7 for the teacher"):
        check_same_vocabulary(backend({"e": 0, "b": 1}), backend({"e": 0, "b": 7}))
    with pytest.raises(ValueError, match="differ at 2 of 3"):
        check_same_vocabulary(backend({"e": 0, "a": 1, "b": 2}), backend({"e": 0, "b": 1, "a": 2}))


def test_renamed_tokens_are_accepted_by_name_or_id():
    """Llama 3's reserved tokens, some of which 3.1 names: the error says what to set."""
    student = backend({"e": 0, "a": 1, "<reserved_2>": 2, "<reserved_3>": 3, "<reserved_4>": 4})
    teacher = backend({"e": 0, "a": 1, "<|pad|>": 2, "<|eom|>": 3, "<reserved_2>": 4})
    with pytest.raises(ValueError, match=r"differ at 3 of 5 .* --allow_token_renames 2,3,4$"):
        check_same_vocabulary(student, teacher)
    check_same_vocabulary(student, teacher, ["2", "3", "4"])
    check_same_vocabulary(student, teacher, ["<|pad|>", "<reserved_3>", "<reserved_4>"])
    with pytest.raises(ValueError, match=r"differ at 1 of 5 .*id 3 is '<reserved_3>' .* --allow_token_renames 2,3,4$"):
        check_same_vocabulary(student, teacher, [2, 4])
    with pytest.raises(ValueError, match="allow_token_renames: '<nothing>' is neither a token nor an id"):
        check_same_vocabulary(student, teacher, ["<nothing>"])
    with pytest.raises(ValueError, match="allow_token_renames: '99' is neither"):
        check_same_vocabulary(student, teacher, ["99"])


def test_another_vocabulary_has_no_rename_hint():
    words = [f"w{i}" for i in range(100)]
    student, teacher = ({"e": 0} | {w: i + 1 for i, w in enumerate(ws)} for ws in (words, words[1:] + words[:1]))
    with pytest.raises(ValueError) as caught:
        check_same_vocabulary(backend(student), backend(teacher))
    assert "allow_token_renames" not in str(caught.value)


def test_ids_without_a_row_are_named():
    tokenizer = tiny_tokenizer()
    last = len(tokenizer) - 1
    check_ids([0, last], last + 1, tokenizer)
    check_ids([], 1, tokenizer)
    with pytest.raises(ValueError, match=rf"'<\|end\|>' has id {last}, .* share only {last} embedding rows"):
        check_ids([0, last, 3], last, tokenizer)
