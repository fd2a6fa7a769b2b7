"""Row checks: what other tools give a meaning is honoured or refused, and Arrow's padding is no data."""

import json

import pytest
from datasets import Dataset

from engine.data.rows import parse_row
from tests.library.rows import talk


def flagged(contents: str, **flags: dict) -> list[dict]:
    """`talk` with flags by message: `m1={"weight": 0}`."""
    messages = talk(*contents.split())
    for name, values in flags.items():
        messages[int(name[1:])].update(values)
    return messages


CALL = {"type": "function", "function": {"name": "f", "arguments": {"text": "hi"}}}


@pytest.mark.parametrize(
    "messages, count, responses",
    [
        (talk("a", "b", "c", "d"), 4, (1, 3)),
        (talk("a", "b", "c"), 3, ()),
        (flagged("a b c d", m1={"weight": 0}), 4, (3,)),
        (flagged("a b c d", m1={"weight": 1}, m3={"weight": 1.0}), 4, (1, 3)),
        (flagged("a b c d", m1={"train_on_turn": False}), 4, (3,)),
        (flagged("a b c d", m1={"loss": False}, m3={"train": True}), 4, (3,)),
        (flagged("a b c d", m3={"weight": 0}), 2, (1,)),  # what follows the last trained turn has no effect
        (flagged("a b c d e", m1={"weight": 1}), 4, (1, 3)),  # trained by name, so not a prompt alone
        (flagged("a b c", m1={"weight": 0}), 3, ()),
        (flagged("a b", m0={"weight": 0, "train_on_turn": False}, m1={"weight": None}), 2, (1,)),
    ],
)
def test_weights_choose_what_is_trained_on(messages, count, responses):
    row = parse_row({"messages": messages}, "row")
    assert (len(row.messages), row.responses) == (count, responses)
    assert all(set(message) == {"role", "content"} for message in row.messages)


def test_weights_in_prompt_and_completion():
    completion = flagged("a b c d", m1={"weight": 0})[1:]
    row = parse_row({"prompt": flagged("x y z", m1={"weight": 0}), "completion": completion}, "row")
    assert [message["content"] for message in row.messages] == ["x", "y", "z", "b", "c", "d"] and row.responses == (5,)
    with pytest.raises(ValueError, match="`prompt` has a message with a weight above 0"):
        parse_row({"prompt": flagged("x y z", m1={"weight": 1}), "completion": talk("a", "b")[1:]}, "row")
    with pytest.raises(ValueError, match="every assistant turn of `completion` has weight 0"):
        parse_row({"prompt": talk("x"), "completion": flagged("a b", m1={"weight": 0})[1:]}, "row")


def call_of(arguments) -> dict:
    return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}


@pytest.mark.parametrize("nothing", [None, "", "null", {}])
def test_no_arguments_are_an_empty_dict(nothing):
    row = parse_row({"messages": [*talk("a"), call_of(nothing)]}, "row")
    assert row.messages[-1]["tool_calls"][0]["arguments"] == {}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": flagged("a b", m1={"weight": 0.5})}, r"messages 2 \(assistant\): weight=0.5: must be 0 or"),
        ({"messages": flagged("a b", m1={"weight": "0"})}, "weight='0': must be 0 or"),
        ({"messages": flagged("a b", m1={"weight": 1, "train_on_turn": False})}, "contradict each other"),
        ({"messages": flagged("a b", m0={"train_on_turn": True})}, "only assistant turns are trained on"),
        ({"messages": flagged("a b", m1={"weight": 0})}, "every assistant turn has weight 0, and the last"),
        ({"messages": flagged("a b", m1={"label": False})}, "`label` means something to other tools"),
        ({"messages": flagged("a b", m1={"train_detail": [{"begin": 0}]})}, "`train_detail` means something"),
        ({"messages": flagged("a b", m0={"images": ["x.png"]})}, "`images` means something to other tools"),
        ({"messages": talk("a", "b"), "images": ["x.png"]}, "`images` has content"),
        ({"prompt": "a", "completion": "b", "audio": {"path": "x.wav"}}, "`audio` has content"),
        ({"prompt": "a", "completion": "b", "label": False}, "`label` marks good and bad completions"),
        ({"messages": talk("a", "b"), "system": "be kind"}, "`system` has text"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ShareGPT's form: give `messages`"),
        ({"conversations": talk("a", "b")}, "rename the column `conversations` to `messages`"),
        ({"messages": [{"from": "human", "value": "a"}]}, "messages 1 is ShareGPT's form"),
        ({"messages": talk("a", [{"type": "image_url", "image_url": "x"}])}, "content has a part of type 'image_url'"),
        ({"messages": talk("a", [{"type": "text"}])}, "content has a part of type 'text'"),
        ({"messages": talk("a", [])}, "content is empty"),
        ({"messages": talk("a", {"text": "b"})}, "content must be text, is a dict"),
        ({"messages": talk("a", "b\ud800")}, r"messages 2 \(assistant\): content has '\\ud800' at character 2"),
        ({"prompt": "\udfff", "completion": "b"}, "prompt has .* half of a pair"),
        ({"messages": talk("a", "b"), "tools": "{"}, "tools is not valid JSON"),
        ({"messages": talk("a", "b"), "tools": [1]}, "tools 1 must be a dict"),
        ({"messages": talk("a", "b"), "tools": {"name": "f"}}, "`tools` must be a list of dicts"),
        ({"prompt": "a", "tools": [CALL]}, "a `prompt` of plain text does not pass"),
        ({"messages": talk("a", "b"), "chat_template_kwargs": [1]}, "`chat_template_kwargs` must be a dict"),
        ({"messages": talk("a", "b"), "chat_template_kwargs": {"tools": []}}, "`tools`, which the engine sets itself"),
        ({"messages": [*talk("a"), {"role": "assistant", "tool_calls": "f()"}]}, "tool_calls must be a list"),
        ({"messages": [*talk("a"), {"role": "assistant", "tool_calls": ["f"]}]}, "tool call 1 must be a dict"),
        ({"messages": [*talk("a"), {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "has no name of a function"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "only an assistant turn can have"),
        ({"messages": [*talk("a"), {"role": "assistant", "content": None, "tool_calls": []}]}, "content is missing"),
        ({"messages": [*talk("a", "b"), {"role": "tool"}]}, r"messages 3 \(tool\): content is missing"),
        ({"messages": {"role": "user"}}, "must be a list of messages"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "has role"),
        ({"messages": flagged("a b", m1={"function_call": {"name": "f"}})}, "`function_call` is OpenAI's older form"),
        ({"messages": flagged("a b", m1={"prefix": True})}, "`prefix` means something to other tools"),
        ({"messages": talk("a", "b"), "functions": [CALL]}, "`functions` is OpenAI's older form"),
        ({"messages": talk("a", "b"), "weight": 0}, "weight=0 for a whole row"),
        ({"prompt": "a", "completion": "b", "weight": 0.5}, "weight=0.5 for a whole row"),
        ({"messages": [*talk("a"), call_of(False)]}, "arguments must be a dict or its JSON text, is False"),
        ({"messages": [*talk("a"), call_of([])]}, "arguments must be a dict or its JSON text"),
        ({"messages": [*talk("a"), call_of({"x": ["b\ud800"]})]}, "arguments has .* half of a pair"),
        ({"messages": flagged("a b", m1={"reasoning_content": "\ud800"})}, "reasoning_content has .* half of a pair"),
        (None, "a row must be a dict, is a NoneType"),
        ([("messages", 1)], "a row must be a dict, is a list"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match="^row 7: .*" + message):
        parse_row(row, "row 7")


def test_text_parts_and_empty_results_and_other_keys():
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"], "name": "Ann"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "d", "tool_calls": [], "reasoning_content": "e"},
    ]
    row = parse_row({"messages": messages, "images": [], "system": "is in the messages too"}, "row")
    assert row.messages[1] == {"role": "user", "content": "abc", "name": "Ann"}
    assert row.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert row.messages[3] == {"role": "tool", "content": "", "tool_call_id": "1"}
    assert row.messages[4] == {"role": "assistant", "content": "d", "reasoning_content": "e"}
    assert row.responses == (2, 4) and row.notes == ()


def test_messages_win_over_a_prompt():
    row = parse_row({"messages": talk("a", "b"), "prompt": "p"}, "row")
    assert row.messages == talk("a", "b") and row.notes == ("`messages` win over `prompt`, which is not used",)


@pytest.mark.parametrize("wrap", [lambda call: call, lambda call: {"id": "1", "type": "function", "function": call}])
def test_arguments_are_decoded_once(wrap):
    def arguments(given):
        messages = [*talk("a"), {"role": "assistant", "tool_calls": [wrap({"name": "f", "arguments": given})]}]
        call = parse_row({"messages": messages}, "row").messages[1]["tool_calls"][0]
        return call.get("function", call)["arguments"]

    inner = {"text": "hi", "null": None, "code": '{"x": 1}'}
    assert arguments(inner) == arguments(json.dumps(inner)) == inner
    assert arguments("") == arguments(None) == arguments("{}") == {}
    for text, problem in (('{"x": ', "is not valid JSON"), ("[1]", "must be a dict"), ('"{}"', "must be a dict")):
        with pytest.raises(ValueError, match=rf"row: messages 2 \(assistant\): tool call 1 \(f\): arguments {problem}"):
            arguments(text)


def test_tools_and_template_variables():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        assert parse_row({"messages": talk("a", "b"), "tools": tools}, "row").tools == [tool]
    for tools in (None, [], "", "[]"):
        assert parse_row({"messages": talk("a", "b"), "tools": tools}, "row").tools is None
    for values in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        row = parse_row({"messages": talk("a", "b"), "chat_template_kwargs": values}, "row")
        assert row.template_kwargs == {"enable_thinking": False}


def test_nulls_that_arrow_adds_are_dropped_and_others_are_kept(tmp_path):
    def row(arguments, tool):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [*talk("a"), {"role": "assistant", "tool_calls": [call]}]
        return {"messages": messages, "tools": [tool], "chat_template_kwargs": {"list": [1, None]}}

    first = row({"text": "hi", "deep": {"items": [{"p": 1}]}}, {"name": "f", "parameters": {"text": "string"}})
    second = row({"x": 1, "y": 2, "deep": {"items": [{"q": 2}]}}, {"name": "g", "extra": {"y": "int"}})
    dataset = Dataset.from_list([first, second])
    dataset.to_parquet(tmp_path / "rows.parquet")
    padded = dataset[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert padded["x"] is None and padded["deep"]["items"][0] == {"p": 1, "q": None}  # what Arrow makes of it
    for source in (dataset, Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))):
        for raw, given in zip(source, (first, second), strict=True):
            assert parse_row(raw, "row", from_arrow=True) == parse_row(given, "row")
    kept = row({"text": None, "deep": {}}, {"name": "f", "default": None})
    assert parse_row(kept, "row").messages[1]["tool_calls"][0]["function"]["arguments"]["text"] is None
    assert parse_row(kept, "row").tools == [{"name": "f", "default": None}]
