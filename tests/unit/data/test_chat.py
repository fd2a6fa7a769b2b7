"""Response masks and tokenizer loading, on real and freshly trained tokenizers."""

import importlib.metadata
import json
import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.data.chat import (
    encode_conversation,
    encode_prompt_completion,
    stop_token_ids,
)
from engine.data.tokenizer import PROBE, load_tokenizer, prepare_tokenizer
from tests.library.rows import talk

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}TAIL{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Only the answer after the last user turn keeps its <think> block, and gets an empty one where it has none.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}{% set thought = '' %}"
    "{% if '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% endif %}{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def build_chatml(template: str = CHATML, trim_offsets: bool = False, **kwargs) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, how are you?\n\n", "user assistant answer question\n\n"] * 3, trainer)
    kwargs = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **kwargs)


def sentencepiece_file(ending: str) -> Path:
    files = importlib.metadata.distribution("mistral-common").files
    return Path(next(file for file in files if str(file).endswith(ending)).locate())


@pytest.fixture(scope="module", params=["tokenizer.model.v1", "241114.model.v7"])
def spm(request) -> Path:
    return sentencepiece_file(request.param)


def marked_texts(tokenizer, input_ids, mask) -> list[str]:
    """The text of each run of marked tokens."""
    runs, run = [], []
    for token_id, is_response in zip(input_ids, mask, strict=True):
        if is_response:
            run.append(token_id)
        elif run:
            runs, run = runs + [run], []
    runs += [run] if run else []
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_chatml_marks_answers_and_their_end_only(trim_offsets):
    tokenizer = build_chatml(trim_offsets=trim_offsets)
    messages = talk("hi", "hello  world ", "how?", "  42\n", system="be kind")
    prompt_ids, input_ids, mask = encode_conversation(tokenizer, messages)
    assert marked_texts(tokenizer, input_ids, mask) == ["hello  world <|im_end|>", "  42\n<|im_end|>"]
    assert input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert prompt_ids == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert input_ids[: len(prompt_ids)] == prompt_ids and mask[len(prompt_ids)] and not mask[len(prompt_ids) - 1]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_generation_tag_is_taken_at_its_word(trim_offsets):
    messages = talk("hi", "hello", "how?", "fine")
    tokenizer = build_chatml(GENERATION.replace("TAIL", ""), trim_offsets)
    _, input_ids, mask = encode_conversation(tokenizer, messages)
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", "fine<|im_end|>"]


def test_generation_tag_without_the_end_of_turn_still_teaches_to_stop():
    without_end = GENERATION.replace(
        "+ '<|im_end|>' }}TAIL{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    tokenizer = build_chatml(without_end)
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", "fine<|im_end|>"]


def test_generation_tag_that_leaves_a_turn_out_is_taken_at_its_word():
    last_only = GENERATION.replace("TAIL", "").replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    tokenizer = build_chatml(last_only)
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == ["fine<|im_end|>"]


def test_generation_tag_that_ends_in_trimmed_space_does_not_run_on():
    tokenizer = build_chatml(GENERATION.replace("TAIL", "{{ '  ' }}"), trim_offsets=True)
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", "fine<|im_end|>"]


def test_thinking_template_strips_earlier_thoughts():
    tokenizer = build_chatml(THINKING)
    thought = "<think>\nhm\n</think>\n\n"
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", thought + "hello", "how?", thought + "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", thought + "fine<|im_end|>"]
    prompt_ids, input_ids, mask = encode_conversation(tokenizer, talk("hi", thought + "hello", "how?", "fine"))
    # an empty block is the template's: in every turn alike, the assistant's own words are marked
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", "fine<|im_end|>"]
    assert tokenizer.decode(prompt_ids).endswith("<|im_start|>assistant\n")


def test_generation_prompt_that_opens_a_thought():
    opening = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
    tokenizer = build_chatml(opening)
    prompt_ids, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", "fine<|im_end|>"]
    assert tokenizer.decode(prompt_ids).endswith("<think>\n")


def test_system_text_in_the_last_user_turn():
    moving = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>"
        "{% if loop.index0 >= messages | length - 2 %}{{ messages[0].content }} {% endif %}{{ m.content }}<|im_start|>"
        "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = build_chatml(moving)
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine", system="be kind"))
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", "fine<|im_end|>"]


def test_text_after_the_last_turn_is_not_the_assistants():
    tokenizer = build_chatml(CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}")
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>", "fine<|im_end|>"]
    assert input_ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_next_header_does_not_end_a_turn():
    tokenizer = build_chatml(CHATML.replace("+ '<|im_end|>' + '\\n'", ""))
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == ["hello", "fine"]


def test_answer_that_quotes_the_template_stays_whole():
    tokenizer = build_chatml()
    answer = "say <|im_end|>\n<|im_start|>user\nhi"
    _, input_ids, mask = encode_conversation(tokenizer, talk(answer, answer, "hi", "hi"))
    assert marked_texts(tokenizer, input_ids, mask) == [answer + "<|im_end|>", "hi<|im_end|>"]


def test_tool_calls_are_the_assistants_words():
    template = CHATML.replace("m.content +", "m.content + (m.tool_calls | tojson if m.tool_calls else '') +")
    tokenizer = build_chatml(template)
    rest = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]
    written = '[{"type": "function", "function": {"arguments": {}, "name": "f"}}]<|im_end|>'
    for call in ({"name": "f"}, {"function": {"name": "f"}}):
        messages = [*talk("hi"), {"role": "assistant", "content": "", "tool_calls": [call]}, *rest]
        _, input_ids, mask = encode_conversation(tokenizer, messages)
        assert marked_texts(tokenizer, input_ids, mask) == [written, "three<|im_end|>"]
    with pytest.raises(ValueError, match="message 2: a tool call must name its function"):
        encode_conversation(tokenizer, [*talk("hi"), {"role": "assistant", "content": "", "tool_calls": ["f"]}, *rest])


def test_prompt_alone_and_context_turns():
    tokenizer = build_chatml()
    prompt_ids, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?"))
    assert prompt_ids == input_ids and not any(mask)
    assert tokenizer.decode(prompt_ids).endswith("how?<|im_end|>\n<|im_start|>assistant\n")
    for template in (CHATML, GENERATION.replace("TAIL", "")):
        tokenizer = build_chatml(template)
        _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"), [3])
        assert marked_texts(tokenizer, input_ids, mask) == ["fine<|im_end|>"]


@pytest.mark.parametrize(
    "template, message",
    [
        (CHATML[: CHATML.index("{% if add_generation_prompt")], "ignores add_generation_prompt"),
        (CHATML.replace("m.content +", "m.content + m.content +"), "writes more than once the text of message 2"),
        ("{{ raise_exception('only pirates') }}", "refuses this conversation: only pirates"),
        (
            CHATML.replace("m.content +", "m.content | upper | replace('HELLO', '') +") + "{{ messages[-1].content }}",
            "leaves out the text of message 2|not how the conversation begins",
        ),
    ],
)
def test_template_that_hides_the_answer_is_an_error(template, message):
    with pytest.raises(ValueError, match=message):
        encode_conversation(build_chatml(template), talk("hi", "hello"))


def test_template_without_end_of_turn_warns(caplog):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = build_chatml(template)
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", "how?", "fine"))
    assert marked_texts(tokenizer, input_ids, mask) == [" hello", " fine"]
    assert "cannot learn to stop" in caplog.text


def test_pad_equal_to_eos_hides_nothing(spm):
    tokenizer = load_tokenizer(str(spm))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    _, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello"))
    ends = [is_response for token_id, is_response in zip(input_ids, mask, strict=True) if token_id == 2]
    assert ends == [True]


def test_sentencepiece_ids_equal_sentencepiece(spm):
    tokenizer = load_tokenizer(str(spm))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    for text in (PROBE, "Hello  world", "a" + " " * 37 + "b", Path(json.__file__).read_text()):
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
        assert tokenizer.encode(text) == [1, *reference.encode(text)]
        assert tokenizer.decode(reference.encode(text)) == text
    assert len(tokenizer) == reference.vocab_size()


@pytest.mark.lengthy
def test_sentencepiece_folders(spm, tmp_path, caplog):
    expected = load_tokenizer(str(spm)).encode("Hello  world")
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(spm, folder / "tokenizer.model")
    bare = load_tokenizer(str(folder))
    assert bare.encode("Hello  world") == expected
    assert "has no chat template" in caplog.text
    bare.save_pretrained(tmp_path / "saved")  # as the export does
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.encode("Hello  world") == expected and saved.chat_template == bare.chat_template
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": INST, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    configured = load_tokenizer(str(folder))
    assert configured.encode("Hello  world")[-3:] == expected[-3:]
    assert configured.chat_template == INST


def test_sentencepiece_inst_template(spm):
    tokenizer = load_tokenizer(str(spm))
    tokenizer.chat_template = INST
    prompt_ids, input_ids, mask = encode_conversation(tokenizer, talk("hi", "Hello there", "and?", "Fine  thanks"))
    assert marked_texts(tokenizer, input_ids, mask) == ["Hello there </s>", "Fine  thanks </s>"]
    assert input_ids[0] == 1 and input_ids.count(1) == 1
    assert input_ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(prompt_ids).endswith("[INST] and? [/INST]")


def test_default_template_teaches_to_stop(spm, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(str(spm))
    assert "plain default" in caplog.text
    prompt_ids, input_ids, mask = encode_conversation(tokenizer, talk("hi", "hello", system="be kind"))
    assert tokenizer.decode(input_ids) == "<s>System: be kind\nUser: hi\nAssistant: hello</s>\n"
    assert marked_texts(tokenizer, input_ids, mask) == ["hello</s>"]
    assert tokenizer.decode(prompt_ids) == "<s>System: be kind\nUser: hi\nAssistant:"


def test_load_errors(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "some.model").write_text("plain text")
    with pytest.raises(ValueError, match="some.model' is not a SentencePiece model"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "other.model").write_text("plain text")
    with pytest.raises(ValueError, match="several SentencePiece files"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="no eos token"):
        prepare_tokenizer(build_chatml(eos_token=None))


def test_plain_prompt_and_completion(spm):
    tokenizer = load_tokenizer(str(spm))
    prompt_ids, input_ids, mask = encode_prompt_completion(tokenizer, "Q: 2+2=", "4, I think")
    assert prompt_ids == tokenizer.encode("Q: 2+2=") and prompt_ids[0] == 1
    assert input_ids == tokenizer.encode("Q: 2+2=4, I think") + [2]
    assert mask == [False] * len(prompt_ids) + [True] * (len(input_ids) - len(prompt_ids))
    assert encode_prompt_completion(tokenizer, "Q:", None) == (tokenizer.encode("Q:"),) * 2 + ([False] * 3,)
    _, input_ids, mask = encode_prompt_completion(
        tokenizer, "The capital is ", "Paris"
    )  # one token joins " " and "Paris"
    assert marked_texts(tokenizer, input_ids, mask) == ["Paris</s>"]


def test_plain_completion_has_one_eos_and_no_template():
    tokenizer = build_chatml()
    for completion in ("hello", "hello<|im_end|>"):
        prompt_ids, input_ids, mask = encode_prompt_completion(tokenizer, "hi:", completion)
        assert tokenizer.decode(input_ids) == "hi:hello<|im_end|>" and tokenizer.decode(prompt_ids) == "hi:"
        assert marked_texts(tokenizer, input_ids, mask) == ["hello<|im_end|>"]


def test_stop_token_ids():
    tokenizer = build_chatml(eos_token="<|endoftext|>")
    end, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_token_ids(tokenizer) == [end, turn_end]  # a base model's eos is not its template's end of turn
    assert stop_token_ids(tokenizer, 77) == [end, turn_end, 77]
    assert stop_token_ids(tokenizer, [turn_end, 77]) == [end, turn_end, 77]
    ends_in_text = build_chatml(CHATML.replace("'<|im_end|>' +", ""))
    assert stop_token_ids(ends_in_text) == [ends_in_text.eos_token_id]
