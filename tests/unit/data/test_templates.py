"""The laws of the response mask, on every chat template that TRL ships and three that it does not.

TRL's wheel holds 41 templates of real models and 31 twins in which somebody marked by hand what the assistant writes.
They are read as files; nothing of TRL is imported. Tokenizers do not come along: a byte-level one gets each template's
control tokens, so that text and tokens say the same.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from engine.data.chat import encode_conversation, stop_token_ids
from engine.data.template import GENERATION_TAG, ChatTemplate, TemplateInput
from tests.library.paths import ROOT

OURS = {path.stem: path for path in (ROOT / "tests/templates").glob("*.jinja")}
CONTROL = re.compile(
    r"<\|[A-Za-z_0-9/]+\|>|<｜[^｜]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|"
    r"SYSTEM_PROMPT)\]|</?think>|</?tool_call>|</?tool_response>|<(?:start|end)_of_(?:turn|utterance|image)>|</?s>"
)
NOT_SPECIAL = re.compile(r"</?(think|tool_call|tool_response)>")


def trl_templates() -> dict[str, Path]:
    if sys.version_info < (3, 11):  # TRL 1.16 is not made for it, and launch/test.sh does not install it there
        pytest.skip("TRL's templates are not installed on Python 3.10", allow_module_level=True)
    files = importlib.metadata.distribution("trl").files or []
    return {Path(str(file)).stem: Path(str(file.locate())) for file in files if str(file).endswith(".jinja")}


ALL = trl_templates() | OURS
TWINS = sorted(name for name in ALL if name.endswith("_training"))


@functools.cache
def tokenizer_for(name: str, with_tags: bool = True) -> PreTrainedTokenizerFast:
    source = ALL[name].read_text()
    if not with_tags:
        source = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{%\1 set _ = 0 \2%}", source)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # A base model's eos, which no template writes, where the template has its own; else the eos that it asks for.
    eos = "<|endoftext|>" if name.startswith(("phi3", "qwen", "smol", "gemma", "glm")) else "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos)
    tokens = sorted({match.group() for match in CONTROL.finditer(source)})
    special = [token for token in tokens if not NOT_SPECIAL.fullmatch(token)]
    tokenizer.add_tokens([token for token in tokens if NOT_SPECIAL.fullmatch(token)])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = source
    return tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str, *calls: dict, **more: str) -> dict:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}


def call(city: str) -> dict:
    return {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": city}}}


def result(text: str) -> dict:
    return {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": text}


SYSTEM = {"role": "system", "content": "Be kind and brief."}
CONVERSATIONS = {
    "plain": [user("What is 2+2?"), answer("It is four.")],
    "system": [SYSTEM, user("What is 2+2?"), answer("It is four.")],
    "turns": [user("1?"), answer("First."), user("2?"), answer("Second."), user("3?"), answer("Third\none.")],
    "system turns": [SYSTEM, user("One?"), answer("First answer."), user("Two?"), answer("Second answer.")],
    "reasoning": [user("One?"), answer("Answer one.", reasoning_content="Thought one.")],
    "tagged reasoning": [user("One?"), answer("<think>\nThought one.\n</think>\n\nAnswer one.")],
    "reasoning turns": [
        user("One?"),
        answer("Answer one.", reasoning_content="Thought one."),
        user("Two?"),
        answer("Answer two.", reasoning_content="Thought two."),
    ],
    "call": [user("Rain?"), answer("", call("Rome")), result("sunny"), answer("No rain.")],
    "text and call": [user("Rain?"), answer("Let me look.", call("Rome")), result("sunny"), answer("No rain.")],
    "two calls": [
        user("Rain?"), answer("", call("Rome"), call("Oslo")), result("sunny"), result("wet"), answer("Only in Oslo.")
    ],
    "text that names the call": [
        user("Rain?"), answer("I call weather for the city Rome.", call("Rome")), result("sunny"), answer("No rain.")
    ],
    "two rounds of calls": [
        user("Rain?"), answer("", call("Rome")), result("sunny"), answer("", call("Oslo")), result("wet"),
        answer("Only in Oslo."),
    ],
    "ends in a call": [user("Hi."), answer("Hello."), user("Rain?"), answer("", call("Rome"))],
    "empty result": [user("Rain?"), answer("", call("Rome")), result(""), answer("No rain.")],
}  # fmt: skip

# What each template does with the conversations above, in their order: a row (.), a row whose earlier reasoning goes
# (-), or a refusal (x): the template's own, or of a row whose words it would drop.
OUTCOMES = {
    "......-.......": "glm4moe lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl nemotron_3_5_lightning nemotron_3_nano "
    "nemotron_3_super nemotron_3_ultra qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
    "......-..x....": "gptoss",
    "......-.x.x...": "diffusion_gemma gemma4_v5",
    "..............": "qwen3_8",
    "........x.x...": "muse_glimmer",
    "....x.x.......": "gemma4_v2 lfm2_v2 qwen2_5 qwen3_instruct_2507 qwen3_vl",
    "....x.x.x.x...": "gemma4 gemma4_v3 gemma4_v4 mistral_v3",
    "....x.x.xxx...": "llama3_1 llama3_2",
    "....x.xxxxxxxx": "cohere cohere2 gemma3 idefics3 lfm2 llama2 llama3 llava_next mistral_v7 phi3 phi3_5 "
    "qwen2_5_vl smolvlm",
    "....xxx....x..": "deepseekv3",
    "....xxxxxxxxxx": "deepseek_r1_distill",
    ".x.xx.xxxxxxxx": "gemma",
}
# Twins that keep what their originals drop.
TWIN_OUTCOMES = {
    "deepseek_r1_distill_training": "....x.xxxxxxxx",
    "qwen3_5_nothink_training": "..............",
    "qwen3_5_think_training": "..............",
    "qwen3_6_training": "..............",
    "qwen3_training": "..............",
}
# The token that ends an answer, in earlier turns and in the last.
ENDS = {
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "cohere": "<|END_OF_TURN_TOKEN|>", "diffusion": "<turn|>",
    "deepseek": "<｜end▁of▁sentence｜>", "gemma4": "<turn|>", "gemma": "<end_of_turn>", "idefics": "<end_of_utterance>",
    "lfm2": "<|im_end|>", "llama3": "<|eot_id|>", "llava": "</s>", "muse": "<|eot|>", "nemotron": "<|im_end|>",
    "phi3": "<|end|>", "qwen": "<|im_end|>", "smolvlm": "<end_of_utterance>", "llama2": "</s>", "mistral": "</s>",
    "glm4moe_training": "<|user|>", "glm4moe": "", "gptoss": "<|end|>",
}  # fmt: skip
LAST_ENDS = {"gptoss": "<|return|>"}
CALL_ENDS = {"gemma4_v2": "<turn|>", "diffusion": "<|tool_response>", "gemma4": "<|tool_response>",
             "gptoss": "<|call|>", "glm4moe_training": "<|observation|>", "glm4moe": "</tool_call>"}  # fmt: skip


def of_family(table: dict[str, str], name: str) -> str | None:
    return next((value for prefix, value in table.items() if name.startswith(prefix)), None)


def expected_outcome(name: str) -> str:
    if name in TWIN_OUTCOMES:
        return TWIN_OUTCOMES[name]
    base = name.removesuffix("_training")
    (found,) = [outcome for outcome, names in OUTCOMES.items() if base in names.split()]
    return found


class Counted:
    """Counts renderings while it is in place."""

    def __init__(self, monkeypatch) -> None:
        self.count, render = 0, chat_template_utils.render_jinja_template

        def counting(*args, **kwargs):
            self.count += 1
            return render(*args, **kwargs)

        monkeypatch.setattr(chat_template_utils, "render_jinja_template", counting)


def marked_runs(tokenizer, encoded) -> list[str]:
    runs: list[list[int]] = []
    previous = False
    for token, is_response in zip(encoded.input_ids, encoded.response_mask, strict=True):
        if is_response:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = is_response
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def check_row(name: str, messages: list[dict], tokenizer, encoded) -> None:
    """Laws 1 to 4 on a conversation that was encoded."""
    runs = marked_runs(tokenizer, encoded)
    text = tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
    prompt = tokenizer.decode(encoded.prompt_ids, skip_special_tokens=False)
    # 1 and 2: every turn's own words in order, each turn through its end, and nothing of anybody else
    joined = "".join(runs)
    place = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            assert message["content"].strip() == "" or message["content"] not in joined
            continue
        is_last = number == len(messages) - 1
        words = re.sub(r"</?think>", "", message["content"]).split("\n\n") if message["content"] else []
        words += [c["function"]["arguments"]["city"] for c in message.get("tool_calls", [])]
        places = [joined.index(word.strip(), place) + len(word.strip()) for word in words if word.strip()]
        place = max(places)
        end = (of_family(LAST_ENDS, name) if is_last else None) or of_family(ENDS, name)
        end = (of_family(CALL_ENDS, name) or end) if message.get("tool_calls") else end
        found = joined.index(end, place)
        between = joined[place:found]
        assert not between.strip() or message.get("tool_calls"), between
        place = found + len(end)
    assert place == len(joined), joined[place:]
    header = ChatTemplate(tokenizer).shape.header
    if header:
        assert header not in joined and re.sub(r"<think>\s*(</think>\s*)?$", "", header).strip() not in joined
    # 3: the rollout's prompt is the beginning of the row, up to a think block
    bare = re.sub(r"(<think>\s*(</think>\s*)?|<\|channel>thought\s*(<channel\|>)?)$", "", prompt)
    assert text.startswith(prompt) or text.startswith(bare)
    # 4: what ends the last turn is marked and stops a rollout
    if of_family(ENDS, name):
        last = [token for token, own in zip(encoded.input_ids, encoded.response_mask, strict=True) if own][-1]
        assert last in stop_token_ids(tokenizer)


@pytest.mark.parametrize("name", sorted(ALL))
def test_laws(name, monkeypatch):
    tokenizer, outcome = tokenizer_for(name), ""
    stop_token_ids(tokenizer)  # learns the template's shape
    renderings = Counted(monkeypatch)
    for title, messages in CONVERSATIONS.items():
        notes: Counter[str] = Counter()
        renderings.count = 0
        try:
            encoded = encode_conversation(tokenizer, messages, notes=notes)
        except ValueError as error:
            assert re.search("the chat template (refuses|leaves out|does not show)", str(error)), (title, error)
            outcome += "x"
            continue
        finally:
            assert renderings.count <= 6, (title, renderings.count)
        outcome += "-" if any("earlier assistant turns" in note for note in notes) else "."
        if outcome[-1] == "-":
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages[:-1]] + messages[-1:]
        check_row(name, messages, tokenizer, encoded)
    assert outcome == expected_outcome(name)


@pytest.mark.parametrize("name", TWINS)
def test_places_are_those_that_were_marked_by_hand(name):
    """Without its tags a twin is one more template; what we find in it is what its author marked, but for headers and
    think blocks that hold no thought, and what ends a turn."""
    with_tags, without = tokenizer_for(name), tokenizer_for(name, with_tags=False)
    assert GENERATION_TAG.search(with_tags.chat_template) and not GENERATION_TAG.search(without.chat_template)
    compared = 0
    for messages in CONVERSATIONS.values():
        try:
            ours = encode_conversation(without, messages)
        except ValueError:
            continue
        rendering = ChatTemplate(with_tags).render(messages)
        text, theirs = with_tags.decode(ours.input_ids, skip_special_tokens=False), [False] * len(rendering.text)
        if rendering.text != text:  # built on the rollout's prompt
            continue
        for start, end in rendering.tagged or ():
            theirs[start:end] = [True] * (end - start)
        place, only_theirs, only_ours = 0, "", ""
        for token, own in zip(ours.input_ids, ours.response_mask, strict=True):
            piece = with_tags.decode([token], skip_special_tokens=False)
            if own and not theirs[place]:
                only_ours += piece
            elif theirs[place] and not own:
                only_theirs += piece
            place += len(piece)
        compared += 1
        header = ChatTemplate(without).shape.header.strip()
        rest = (
            only_theirs.replace(header, "")
            .replace("<｜tool▁outputs▁end｜>", "")
            .replace(header.removesuffix("<think>").strip(), "")
        )
        rest = re.sub(
            r"</?think>|<\|channel\|>\w+|<\|message\|>|<\|start\|>assistant| to=\w+|<\|endoftext\|>|\s", "", rest
        )
        assert not rest.strip(), (only_theirs, rest)
        assert not only_ours.replace("<|tool_response>", "").strip(), only_ours  # Gemma 4 stops there to get a result
    assert compared >= 3


def test_table_is_complete():
    listed = {name for names in OUTCOMES.values() for name in names.split()}
    assert listed == {name.removesuffix("_training") for name in ALL}
    assert len(ALL) == 41 + 31 + 3


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss", "qwen3_training"])
def test_cost_is_linear_and_renderings_do_not_grow(name, monkeypatch):
    """Counted, not timed: six renderings at most, also of a conversation that is cut, however long it is."""
    tokenizer = tokenizer_for(name)
    stop_token_ids(tokenizer)
    renderings = Counted(monkeypatch)
    talk = [message for i in range(100) for message in (user(f"Question {i}?"), answer(f"Answer {i}."))]
    whole = encode_conversation(tokenizer, talk)
    assert renderings.count <= 6
    for max_length in (len(whole.input_ids), len(whole.input_ids) // 2, 400):
        renderings.count = 0
        cut = encode_conversation(tokenizer, talk, max_length=max_length)
        assert renderings.count <= 6
        assert len(cut.input_ids) <= max_length and len(cut.prompt_ids) < max_length
        assert max_length - len(cut.input_ids) < 100  # a turn more would not fit
        assert cut.input_ids[:300] == whole.input_ids[:300] and cut.response_mask[:300] == whole.response_mask[:300]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "mistral_v3"])
def test_an_agents_conversation_is_cut_in_as_few_renderings(name, monkeypatch):
    """Turns without a text: where one begins is known all the same."""
    tokenizer = tokenizer_for(name)
    stop_token_ids(tokenizer)
    rounds = [message for i in range(40) for message in (answer("", call(f"City {i}")), result(f"sunny {i}"))]
    talk, renderings = [user("Rain?"), *rounds, answer("No rain.")], Counted(monkeypatch)
    for max_length in (300, 700, 2000):
        renderings.count = 0
        cut = encode_conversation(tokenizer, talk, max_length=max_length)
        assert renderings.count <= 6
        assert len(cut.input_ids) <= max_length and any(cut.response_mask)


def test_variables_that_a_row_writes_do_not_make_another_template(monkeypatch):
    tokenizer = tokenizer_for("qwen3")
    renderings = Counted(monkeypatch)
    for number in range(20):
        given = TemplateInput(kwargs={"custom_instructions": f"Be {number} times as kind.", "unread": number})
        encode_conversation(tokenizer, CONVERSATIONS["plain"], template=given)
    assert renderings.count <= 20 * 3 + 10


def test_private_use_characters_of_the_text_stay():
    tokenizer = tokenizer_for("qwen2_5")
    words = "\U000f0000 \U00100000 \U0010fffd"
    encoded = encode_conversation(tokenizer, [user(words), answer(words)])
    assert marked_runs(tokenizer, encoded) == [words + "<|im_end|>"]


def test_figures_that_a_template_drops_are_an_error():
    tokenizer = tokenizer_for("qwen2_5").__class__(tokenizer_object=tokenizer_for("qwen2_5").backend_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = tokenizer_for("qwen2_5").chat_template.replace("tool_call.arguments | tojson", "'{}'")
    with pytest.raises(ValueError, match="leaves out the tool call of message 2"):
        encode_conversation(tokenizer, CONVERSATIONS["call"])


def test_thinking_can_be_switched_off():
    tokenizer = tokenizer_for("qwen3")
    encoded = encode_conversation(
        tokenizer, CONVERSATIONS["plain"], template=TemplateInput(kwargs={"enable_thinking": False})
    )
    prompt = tokenizer.decode(encoded.prompt_ids, skip_special_tokens=False)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert encoded.input_ids[: len(encoded.prompt_ids)] == encoded.prompt_ids


def test_tools_reach_the_template():
    schema = {"type": "function", "function": {"name": "weather", "description": "Says the weather.", "parameters": {}}}
    for name in ("qwen2_5", "llama3_1", "mistral_v3"):
        tokenizer = tokenizer_for(name)
        encoded = encode_conversation(tokenizer, CONVERSATIONS["call"], template=TemplateInput(tools=[schema]))
        assert "Says the weather." in tokenizer.decode(encoded.input_ids)
    with pytest.raises(ValueError, match="does not write the tools"):
        encode_conversation(tokenizer_for("llama3"), CONVERSATIONS["plain"], template=TemplateInput(tools=[schema]))
