"""Every row is checked and tokenised once, before training, by several processes, and found again by the next run."""

import datetime
import json
import logging
import multiprocessing
import re
import shutil
import time

import datasets
import pytest
from datasets import Dataset

from engine.config import GKDConfig
from engine.data import encoding
from engine.data.encoding import RowEncoder, encode_source
from engine.data.samples import StepData, build_rows
from engine.data.selection import MapRows, StreamRows
from engine.data.sources import JsonLines
from engine.data.tally import RowRules
from engine.data.template import TemplateInput
from tests.library.models import CHATML, tiny_tokenizer
from tests.library.rows import dialogues, talk, write_jsonl

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder / encoding.CACHE_FOLDER


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def config(**values) -> GKDConfig:
    return GKDConfig(**({"max_length": 200, "max_new_tokens": 8, "per_device_train_batch_size": 2} | values))


TWO_USERS = {"messages": talk("a", "b") + talk("c")[:1] + talk("d", "e")}
BAD_ROWS = [
    (TWO_USERS, "the chat template refuses this conversation: roles must alternate"),
    ({"messages": [*talk("a", "b"), {"role": "assistant", "content": "c"}]}, "roles must alternate"),
    ("hi", "a row must be a dict, is a str"),
    (3, "a row must be a dict, is a int"),
    ({"messages": [*talk("a"), {"role": "assistant", "content": "b\udc00"}]}, r"content has '\udc00' at character 2"),
    ('{"messages": [', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_every_bad_row_is_found_before_training(kind, tokenizer, tmp_path, caplog):
    tokenizer.chat_template = ALTERNATING
    bad = [pair for pair in BAD_ROWS if kind == "jsonl" or not str(pair[1]).startswith("not valid")]
    rows = dialogues(2)
    for row, _ in bad:
        rows += [row, *dialogues(1)]
    if kind == "jsonl":
        data, settings = None, {"dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
        bad[2] = ("hi", "not valid JSON")
        bad[3] = (3, "must be a JSON object, is a int")
        place = "rows.jsonl, line {}: "
    else:
        data, settings, place = rows, {}, "train_dataset, row {}: "
    with pytest.raises(ValueError) as caught:
        build_rows(data, tokenizer, config(**settings), "train")
    first, rest = str(caught.value).split(f" ({len(bad)} of {len(rows)} rows cannot be used; then ")
    assert place.format(3) in first and bad[0][1] in first
    assert place.format(5) in rest and "on_bad_row=skip leaves them out" in rest and place.format(9) not in rest

    with caplog.at_level(logging.WARNING):
        kept = build_rows(data, tokenizer, config(on_bad_row="skip", **settings), "train")
    assert [kept[i].index for i in range(len(kept))] == [i for i in range(len(rows)) if i < 2 or i % 2]
    (said,) = caplog.messages
    assert f"skipped {len(bad)} of {len(rows)} rows that cannot be used (on_bad_row=skip)" in said
    for number, (_, problem) in enumerate(bad):
        assert f"{place.format(3 + 2 * number)}" in said and problem in said

    caplog.clear()
    source = JsonLines(tmp_path / "rows.jsonl") if kind == "jsonl" else rows
    stream = StepData(StreamRows(source, kept_encoder(tokenizer), "rows", RowRules(on_bad_row="skip")), config(), 1, 0)
    with caplog.at_level(logging.INFO):
        stream.step_batches(len(rows))
    assert sum("; skipped (on_bad_row=skip)" in text for text in caplog.messages) == len(bad)
    strict = StepData(StreamRows(source, kept_encoder(tokenizer), "rows"), config(), 1, 0, shuffle=False)
    strict.step_batches(0)
    with pytest.raises(ValueError, match=("line 3" if kind == "jsonl" else "row 3") + ".*roles must alternate"):
        strict.step_batches(1)


def kept_encoder(tokenizer) -> RowEncoder:
    return RowEncoder(tokenizer, 200)


def test_media_are_refused_without_decoding_them(tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", None)  # as without the library that decodes
    columns = {"messages": [talk("a", "b")] * 3, "images": [[], None, [{"path": "x.png", "bytes": b"x"}]]}
    messages = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    features = datasets.Features({"messages": messages, "images": datasets.List(datasets.Image())})
    dataset = Dataset.from_dict(columns, features=features)
    with pytest.raises(ValueError, match="train_dataset, row 3: `images` has content: this engine trains on text"):
        build_rows(dataset, tokenizer, config(), "train")
    assert len(build_rows(dataset, tokenizer, config(on_bad_row="skip"), "train")) == 2


def test_ten_bad_rows_are_named_and_all_bad_is_an_error(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = build_rows([{"prompt": ""}] * 25 + dialogues(2), tokenizer, config(on_bad_row="skip"), "train")
    assert len(rows) == 2 and caplog.text.count("prompt is empty") == 10 and "skipped 25 of 27" in caplog.text
    with pytest.raises(ValueError, match=r"row 1: prompt is empty \(train_dataset: none of its 3 rows can be used\)"):
        build_rows([{"prompt": ""}] * 3, tokenizer, config(on_bad_row="skip"), "train")


def test_a_stream_says_that_it_is_checked_as_it_is_read(tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        StreamRows(dialogues(2), kept_encoder(tokenizer), "rows")
        StreamRows(dialogues(2), kept_encoder(tokenizer), "rows", rank=1)
    assert caplog.messages == ["rows is a stream: its rows are checked as they are read, not before training"]


def samples(rows) -> list:
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("kind", ["jsonl", "dataset", "list"])
def test_the_second_time_nothing_is_tokenised(kind, tokenizer, tmp_path, monkeypatch):
    rows = dialogues(30)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = {"jsonl": None, "dataset": Dataset.from_list(rows), "list": rows}[kind]
    settings = config(dataset_name=path)
    first = build_rows(source, tokenizer, settings, "train")
    expected = samples(first)

    def refuse(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(RowEncoder, "outcome", refuse)
    other = tiny_tokenizer()
    assert samples(build_rows(source, other, settings, "train")) == expected
    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    StepData(first, settings, 1, 0).step_batches(3)  # nor at use


@pytest.mark.lengthy
def test_a_start_costs_little_and_the_next_one_next_to_nothing(tokenizer, tmp_path):
    """Of 200,000 rows in 150 s on two cores, and in 10 s the second time: a hundredth, in CPU seconds of one core."""
    rows = [{"messages": talk(f"{i}: what is {i % 97}+{i % 89}?", f"{i % 97 + i % 89}.")} for i in range(2000)]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    for limit_s in (2 * 150 / 100, 10 / 100):
        started = time.process_time()
        assert len(MapRows(JsonLines(path), kept_encoder(tokenizer), "rows", RowRules(num_proc=1))) == 2000
        assert time.process_time() - started < limit_s


def test_processes_change_nothing(tokenizer, tmp_path):
    rows = [*dialogues(25), {"prompt": ""}, *dialogues(3)]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    found = {}
    for processes in (1, 3):
        encoder = RowEncoder(tokenizer, 100 + processes)
        kept = MapRows(JsonLines(path), encoder, "rows", RowRules(on_bad_row="skip", num_proc=processes))
        found[processes] = samples(kept)
    assert found[1] == found[3] and len(found[1]) == 28


def test_the_key_holds_all_that_tokens_depend_on(tokenizer, cache, tmp_path, monkeypatch):
    def num_files(rows=None, max_length=100, template=CHATML, **template_input):
        tokenizer.chat_template = template
        rows = dialogues(3) if rows is None else rows
        encode_source(rows, "rows", RowEncoder(tokenizer, max_length, TemplateInput(**template_input)), len(rows), None)
        return len(list(cache.glob("*.arrow")))

    today, tomorrow = datetime.datetime(2026, 1, 1), datetime.datetime(2026, 1, 2)
    thinking = CHATML + "{{ '' if thinking else '' }}"
    assert num_files() == 1
    assert num_files(now=today) == num_files(now=tomorrow) == 1  # this template writes no date
    assert num_files(rows=dialogues(2)) == 2
    assert num_files(rows=[*dialogues(2), {"messages": talk("question 2", "answer 3")}]) == 3
    assert num_files(max_length=99) == 4
    assert num_files(template=thinking) == 5
    assert num_files(template=thinking, kwargs={"thinking": True}) == 6
    assert num_files(template=DATED, now=today) == 7
    assert num_files(template=DATED, now=tomorrow) == 8
    tokenizer.add_tokens(["question"])
    assert num_files() == 9
    room = tmp_path / "room"
    shutil.copytree(encoding.ROOM, room)
    monkeypatch.setattr(encoding, "ROOM", room)
    assert num_files() == 9
    (room / "chat.py").write_text("# another release")
    assert num_files() == 10 == num_files()


def test_every_module_that_encoding_uses_is_part_of_the_key():
    """Their text is: the room's own files. Of other rooms it uses the configuration alone, which is in the key."""
    seen, waiting = set(), ["encoding"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        text = (encoding.ROOM / f"{name}.py").read_text()
        found = set(re.findall(r"^from engine\.([\w.]+) import", text, re.M))
        assert all(module.split(".")[0] in ("data", "config") for module in found), (name, found)
        waiting += {module.split(".")[1] for module in found if module != "config"} - seen
    assert {"chat", "template", "turns", "rows"} <= seen


def encode_and_count(folder, queue) -> None:
    datasets.config.HF_DATASETS_CACHE = folder
    queue.put(encode_source(dialogues(300), "rows", kept_encoder(tiny_tokenizer()), 300, None)["num_responses"][:3])


def test_hosts_that_share_a_folder_do_not_disturb_each_other(cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    hosts = [context.Process(target=encode_and_count, args=(cache.parent, queue)) for _ in range(3)]
    for host in hosts:
        host.start()
    assert [queue.get(timeout=60) for _ in hosts] == [[9, 9, 9]] * 3  # "answer 0" and the token that ends the turn
    for host in hosts:
        host.join()
    (file,) = cache.iterdir()  # no temporary one is left
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"delete {file.stem}"):
        encode_source(dialogues(300), "rows", kept_encoder(tiny_tokenizer()), 300, None)


def test_a_folder_that_cannot_be_written_is_named(tokenizer, cache):
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(ValueError, match="rows: the tokenised rows cannot be kept under .*set HF_DATASETS_CACHE"):
        MapRows(dialogues(1), kept_encoder(tokenizer), "rows")


def test_a_template_takes_the_date_that_it_is_given(tokenizer):
    tokenizer.chat_template = DATED
    day = datetime.datetime(2025, 3, 9)
    row = build_rows(dialogues(1), tokenizer, config(), "train", now=day)[0]
    assert tokenizer.decode(row.input_ids).startswith("09 Mar 2025\n")
    assert tokenizer.decode(row.prompt_ids).startswith("09 Mar 2025\n")


def test_template_variables_of_configuration_and_row(tokenizer, caplog):
    tokenizer.chat_template = "{{ style if style is defined else 'none' }}\n" + CHATML
    rows = [{"messages": talk("a", "b"), "chat_template_kwargs": kwargs} for kwargs in (None, {"style": "own"})]
    for given, expected in (({}, ["none", "own"]), ({"style": "ours"}, ["ours", "own"])):
        for source in (rows, Dataset.from_list(rows)):
            built = build_rows(source, tokenizer, config(chat_template_kwargs=given), "train")
            texts = [tokenizer.decode(sample.prompt_ids).split("\n")[0] for sample in samples(built)]
            assert texts == expected
    with pytest.raises(ValueError, match="chat_template_kwargs has `stile`, and the chat template has no such"):
        build_rows(rows, tokenizer, config(chat_template_kwargs={"stile": "x"}), "train")
    rows[0]["chat_template_kwargs"] = {"thinking": True}
    caplog.clear()
    build_rows(rows, tokenizer, config(), "train")
    assert "`thinking` in chat_template_kwargs is not a variable of the chat template (1 of 2 rows)" in caplog.text


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools[0].function.name if tools else 'none' }}\n" + CHATML
    tool = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {}}}
    rows = [{"messages": talk("a", "b"), "tools": tools} for tools in ([tool], json.dumps([tool]), None)]
    texts = [
        tokenizer.decode(s.prompt_ids).split("\n")[0] for s in samples(build_rows(rows, tokenizer, config(), "train"))
    ]
    assert texts == ["look_up", "look_up", "none"]


def test_messages_beside_a_prompt_are_told_once(tokenizer, caplog):
    rows = [{"prompt": "p", **row} for row in dialogues(5)]
    built = build_rows(rows, tokenizer, config(), "train")
    assert samples(built) == samples(build_rows(dialogues(5), tokenizer, config(), "train"))
    assert caplog.messages == ["train_dataset: `messages` win over `prompt`, which is not used (5 of 5 rows)"]
