"""What the configuration changes of a tokenizer: template, eos and pad token."""

from __future__ import annotations

import re

import pytest

from engine.data.chat import stop_token_ids
from engine.data.tokenizer import TokenizerChanges, load_tokenizer, prepare_tokenizer
from tests.library.models import tiny_tokenizer


def test_changes_are_made_to_a_copy(tmp_path):
    tokenizer = tiny_tokenizer()
    before = (tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    changes = TokenizerChanges(str(tmp_path / "own.jinja"), "<|end|>", "<|im_start|>")
    changed = prepare_tokenizer(tokenizer, changes)
    assert (tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token) == before
    assert changed.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|end|>"
    assert (changed.eos_token, changed.pad_token) == ("<|end|>", "<|im_start|>")
    assert tokenizer.convert_tokens_to_ids("<|end|>") in stop_token_ids(changed)
    changed.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "plain")
    from_folder = load_tokenizer(str(tmp_path / "plain"), changes=TokenizerChanges(str(tmp_path / "saved")))
    assert (from_folder.chat_template, from_folder.eos_token) == (changed.chat_template, before[1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (TokenizerChanges(eos_token="<|none|>"), "eos_token='<|none|>' is not a token of the student's tokenizer"),
        (TokenizerChanges(pad_token="<|none|>"), "pad_token='<|none|>' is not a token"),
        (TokenizerChanges("no/such/file.jinja"), "chat_template_path='no/such/file.jinja': neither a file nor"),
    ],
    ids=str,
)
def test_changes_that_cannot_be_made_are_named(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        prepare_tokenizer(tiny_tokenizer(), changes)


def test_a_tokenizer_without_eos_gets_the_configurations():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos token"):
        prepare_tokenizer(tokenizer)
    assert prepare_tokenizer(tokenizer, TokenizerChanges(eos_token="<|im_end|>")).eos_token == "<|im_end|>"
