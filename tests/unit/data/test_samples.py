"""Sources, row checks, truncation and the stateless order."""

import json
import logging

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config import GKDConfig
from engine.data.chat import encode_conversation
from engine.data.encoding import RowEncoder
from engine.data.order import DataOrder, epoch_generator, shuffled
from engine.data.rows import parse_row
from engine.data.samples import StepData, build_rows, eval_batches
from engine.data.selection import MapRows, StreamRows
from engine.data.sources import JsonLines, load_rows
from engine.data.tally import RowRules
from tests.library.rows import dialogues, talk, write_jsonl

GOLDEN_PERMUTATION = [3, 1, 5, 7, 4, 0, 6, 2]  # seed 42, epoch 0

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, so that lengths can be counted by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<s>", "<u>", "<a>", "<t>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    )


def config(**values) -> GKDConfig:
    return GKDConfig(**({"max_length": 200, "max_new_tokens": 8, "per_device_train_batch_size": 2} | values))


def build(rows_type, rows, tokenizer, max_length=200, rank=0, **rules):
    return rows_type(rows, RowEncoder(tokenizer, max_length), "rows", RowRules(**rules), rank)


def question_number(tokenizer, sample) -> int:
    return int(tokenizer.decode(sample.prompt_ids).split("question ")[1].split("<")[0])


# --- sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved", "saved_dict", "folder", "folder_jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_gives_the_same_samples(kind, streaming, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows, path = dialogues(7), tmp_path / "data"
    dataset = Dataset.from_list(rows)
    if kind == "jsonl":
        path = tmp_path / "data.jsonl"
        write_jsonl(path, rows)
    elif kind == "json":
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        path = tmp_path / "data.parquet"
        dataset.to_parquet(path)
    elif kind == "saved":
        dataset.save_to_disk(path)
    elif kind == "saved_dict":
        DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(path)
    else:
        path.mkdir()
        name = "train.jsonl" if kind == "folder_jsonl" else "train-00000-of-00001.jsonl"
        write_jsonl(path / name, rows)
    settings = config(dataset_name=str(path), dataset_streaming=streaming, max_steps=5)
    found = StepData(build_rows(None, tokenizer, settings, "train"), settings, 1, 0)
    expected = StepData(build(MapRows, rows, tokenizer), settings, 1, 0)
    if streaming:
        expected = StepData(build(StreamRows, rows, tokenizer), settings, 1, 0)
    assert [found.step_batches(step) for step in range(5)] == [expected.step_batches(step) for step in range(5)]


def test_dataset_objects(tokenizer):
    rows, settings = dialogues(4), config(max_steps=3)
    dataset = Dataset.from_list(rows)
    expected = build(MapRows, rows, tokenizer)
    for data in (rows, dataset, dataset.with_format("torch"), DatasetDict(train=dataset)):
        built = build_rows(data, tokenizer, settings, "train")
        assert [built[i] for i in range(4)] == [expected[i] for i in range(4)]
    stream = build_rows(dataset.to_iterable_dataset(), tokenizer, settings, "train")
    assert isinstance(stream, StreamRows)
    with pytest.raises(ValueError, match="set max_steps"):
        build_rows(dataset.to_iterable_dataset(), tokenizer, config(), "train")
    with pytest.raises(ValueError, match="evaluation needs rows with a length"):
        build_rows(dataset.to_iterable_dataset(), tokenizer, settings, "test")
    with pytest.raises(ValueError, match="train_dataset must be a datasets.Dataset.*is a str|is str"):
        build_rows("rows", tokenizer, settings, "train")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        build_rows(DatasetDict(train=dataset), tokenizer, settings, "test")


def test_limits_apply_to_their_split(tokenizer):
    settings = config(max_samples=3, eval_max_samples=2)
    assert len(build_rows(dialogues(5), tokenizer, settings, "train")) == 3
    assert len(build_rows(dialogues(5), tokenizer, settings, "test")) == 2


def test_source_errors(tmp_path):
    one_file = write_jsonl(tmp_path / "one.jsonl", dialogues(1))
    with pytest.raises(ValueError, match="single file and has only the training split, not 'test'"):
        load_rows(config(dataset_name=one_file), "test")
    with pytest.raises(ValueError, match="dataset_name is not set"):
        load_rows(config(), "train")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match="must be a .jsonl, .json or .parquet file"):
        load_rows(config(dataset_name=str(tmp_path / "rows.txt")), "train")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="bad.parquet.*cannot be read"):
        load_rows(config(dataset_name=str(tmp_path / "bad.parquet")), "train")
    Dataset.from_list(dialogues(1)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds one dataset, the training split"):
        load_rows(config(dataset_name=str(tmp_path / "saved")), "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty.*cannot be read"):
        load_rows(config(dataset_name=str(tmp_path / "empty")), "train")


def test_json_lines_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n   \n{"prompt": "\u00e9"}\n{"prompt": \n[1]\n{"prompt": "z"}')
    rows = JsonLines(path)
    assert len(rows) == 5 and rows[1] == {"prompt": "\u00e9"} and rows[4] == {"prompt": "z"}
    with pytest.raises(ValueError, match=r"rows.jsonl, line 5: not valid JSON"):
        rows[2]
    with pytest.raises(ValueError, match=r"rows.jsonl, line 5: not valid JSON"):
        list(rows)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 6: must be a JSON object, is a list"):
        rows[3]


# --- row checks ------------------------------------------------------------------------------------------------

BAD_ROWS = [
    ({"messages": [{"role": "human", "content": "hi"}]}, "messages 1 has role 'human': must be one of system, user"),
    ({"messages": [*talk("hi"), {"role": "assistant"}]}, r"messages 2 \(assistant\): content is missing"),
    ({"messages": talk("hi", " \n")}, r"messages 2 \(assistant\): content is empty"),
    ({"messages": talk("hi", 3)}, r"messages 2 \(assistant\): content must be text, is a int"),
    ({"messages": []}, "must be a list of messages with at least one"),
    ({"messages": "hi"}, "must be a list of messages"),
    ({"messages": ["hi"]}, "messages 1 must be a dict"),
    ({"messages": talk("hi", "yo")[1:]}, "starts with an assistant turn"),
    ({"messages": [{"role": "system", "content": "be kind"}]}, "nothing to answer"),
    ({"words": "hi"}, "needs `messages`, or `prompt`.*its columns: words"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "hi", "completion": ""}, "completion is empty"),
    ({"prompt": "hi", "completion": talk("hi", "yo")[1:]}, "completion must be text"),
    ({"prompt": talk("hi"), "completion": "yo"}, "`completion` must be a list of messages"),
    ({"prompt": talk("hi"), "completion": talk("hi")}, "completion must end in an assistant turn"),
    ({"messages": talk("hi", "yo"), "tools": [{"name": "f"}]}, "has `tools`, and the chat template writes none"),
    ("hi", "a row must be a dict"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_bad_row_is_named(row, message, tokenizer, tmp_path):
    rows = [*dialogues(2), row]
    with pytest.raises(ValueError, match="train_dataset, row 3: .*" + message):
        build_rows(rows, tokenizer, config(), "train")
    stream = StepData(build(StreamRows, rows, tokenizer), config(), 1, 0, shuffle=False)
    stream.step_batches(0)
    with pytest.raises(ValueError, match="rows, row 3: .*" + message):
        stream.step_batches(1)
    if isinstance(row, dict):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        with pytest.raises(ValueError, match="rows.jsonl, line 3: .*" + message):
            build_rows(None, tokenizer, config(dataset_name=path), "train")


def test_keys_that_arrow_adds_are_dropped(tokenizer):
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    conversation = {
        "messages": [*talk("hi"), call, {"role": "tool", "content": "3"}],
        "prompt": None,
        "completion": None,
    }
    dataset = Dataset.from_list([conversation, {"messages": None, "prompt": "hi", "completion": "yo"}])
    assert dataset[0]["messages"][0]["tool_calls"] is None
    first, second = (parse_row(row, "row") for row in dataset)
    assert [sorted(message) for message in first.messages] == [
        ["content", "role"],
        ["content", "role", "tool_calls"],
        ["content", "role"],
    ]
    assert first.completion is None and second.completion == "yo"


def test_empty_dataset(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        build_rows([], tokenizer, config(), "train")
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="none.jsonl.* is empty"):
        build_rows(None, tokenizer, config(dataset_name=str(tmp_path / "none.jsonl")), "train")
    with pytest.raises(ValueError, match="rows is empty"):
        StepData(build(StreamRows, [], tokenizer), config(), 1, 0).step_batches(0)


def test_prompts_alone_need_lmbda_one_or_seq_kd(tokenizer):
    prompts = [{"prompt": "hi"}, {"messages": talk("hi", "yo", "and?")}, {"prompt": talk("hi")}]
    for settings in (config(lmbda=1.0), config(lmbda=0.0, seq_kd=True)):
        rows = build_rows(prompts, tokenizer, settings, "train")
        assert [rows[i].num_response_tokens for i in range(3)] == [0, 0, 0]
        assert all(rows[i].prompt_ids == rows[i].input_ids for i in range(3))
    with pytest.raises(ValueError, match="rows 1 to 3: none has an assistant turn"):
        build_rows(prompts, tokenizer, config(lmbda=0.9), "train")
    build_rows(prompts, tokenizer, config(lmbda=0.9), "test")
    mixed = build_rows(prompts + dialogues(1), tokenizer, config(lmbda=0.9), "train")
    assert [mixed[i].num_response_tokens for i in range(4)] == [0, 0, 0, len("answer 0") + 1]
    with pytest.raises(ValueError, match="none has an assistant turn"):
        rows = build(StreamRows, prompts, tokenizer, answers="some")
        StepData(rows, config(), 1, 0, shuffle=False).step_batches(1)


def test_template_error_names_the_row_before_training(tokenizer):
    strict = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    strict.chat_template = "{% if messages | length == 1 %}{{ raise_exception('too short') }}{% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match="train_dataset, row 1: the chat template refuses.*too short"):
        build_rows(dialogues(2), strict, config(), "train")

    hiding = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    hiding.chat_template = "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}"
    with pytest.raises(ValueError, match="train_dataset, row 1: the chat template leaves out the text of message 2"):
        build_rows(dialogues(2), hiding, config(), "train")


# --- lengths ---------------------------------------------------------------------------------------------------


def test_completion_is_cut_and_prompt_is_not(tokenizer):
    rows = [{"prompt": "p" * 10, "completion": "c" * 30}, {"messages": talk("u" * 8, "a" * 30)}]
    plain, chat = (build(MapRows, rows, tokenizer, 16)[i] for i in range(2))
    assert tokenizer.decode(plain.input_ids) == "p" * 10 + "c" * 6
    assert plain.response_mask == [False] * 10 + [True] * 6 and plain.prompt_ids == plain.input_ids[:10]
    assert tokenizer.decode(chat.input_ids) == "<u>" + "u" * 8 + "<eos><a>" + "a" * 5
    assert chat.num_response_tokens == 5 and len(chat.prompt_ids) == 11
    whole = build(MapRows, rows, tokenizer, 41)[0]
    assert len(whole.input_ids) == 41 and tokenizer.decode(whole.input_ids).endswith("c<eos>")


def test_conversation_loses_its_last_turns_first(tokenizer):
    messages = talk("u" * 5, "a" * 5, "v" * 20, "b" * 5)
    row = {"messages": messages}
    sizes = {size: build(MapRows, [row], tokenizer, size)[0] for size in (10, 30, 37, 38, 60)}
    first = encode_conversation(tokenizer, messages[:2])
    for size in (30, 37):  # 37 tokens are the whole second prompt
        assert (sizes[size].prompt_ids, sizes[size].input_ids, sizes[size].response_mask) == first
    assert tokenizer.decode(sizes[10].input_ids) == "<u>uuuuu<eos><a>aa"
    assert tokenizer.decode(sizes[38].input_ids).endswith("<a>" + "a" * 5 + "<eos><u>" + "v" * 20 + "<eos><a>b")
    assert (sizes[60].prompt_ids, sizes[60].input_ids, sizes[60].response_mask) == encode_conversation(
        tokenizer, messages
    )
    context = {"prompt": messages[:3], "completion": messages[3:]}
    with pytest.raises(ValueError, match="every prompt fills max_length=30"):
        build(MapRows, [context], tokenizer, 30)  # its prompt has an answer, but none that may be trained on


@pytest.mark.parametrize("rows_type", [MapRows, StreamRows])
def test_prompts_without_room_are_dropped_and_counted(rows_type, tokenizer, caplog):
    rows = [{"prompt": "p" * size, "completion": "c"} for size in (19, 20, 21, 5)] + [{"prompt": "q" * 20}]
    with caplog.at_level(logging.WARNING):
        data = StepData(build(rows_type, rows, tokenizer, 20), config(), 1, 0, shuffle=False)
        samples = [sample for step in (0, 1) for sample in data.step_batches(step)[0]]
    assert [len(sample.prompt_ids) for sample in samples] == [19, 5, 19, 5]
    assert [len(sample.input_ids) for sample in samples] == [20, 7, 20, 7]
    assert [record.getMessage() for record in caplog.records] == [
        "rows: dropped 3 of 5 rows, whose prompt fills max_length=20 tokens"
    ]
    caplog.clear()
    quiet = StepData(build(rows_type, rows, tokenizer, 20, rank=1), config(), 1, 0, shuffle=False)
    quiet.step_batches(1)
    assert not caplog.records
    with pytest.raises(ValueError, match="every prompt fills max_length=20 tokens"):
        StepData(build(rows_type, rows[1:3], tokenizer, 20), config(), 1, 0).step_batches(0)


@pytest.mark.parametrize("added", ["", "x" * 25])
def test_measuring_a_prompt_never_disagrees_with_tokenising_it(added, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", added + TEMPLATE)
    rows = [{"messages": talk("u" * size, "a", "v", "b")} for size in range(1, 31)] + [{"prompt": "p\u00e9" * 9}]
    for max_length in (30, 40, 50):
        kept = build(MapRows, rows, tokenizer, max_length)
        expected = [i for i in range(30) if i + 1 + 3 + len(added) < max_length] + [30] * (27 < max_length)
        assert [kept[i].index for i in range(len(kept))] == expected


# --- order -----------------------------------------------------------------------------------------------------


def global_batches(rows, world_size, accumulation, batch, steps, shuffle=True, seed=3):
    """For each step, the samples of all ranks by their index, as the trainer would see them."""
    settings = config(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, seed=seed, max_steps=steps
    )
    ranks = [StepData(rows(), settings, world_size, rank, shuffle) for rank in range(world_size)]
    result = []
    for step in range(steps):
        samples = []
        for rank, data in enumerate(ranks):
            micro_batches = data.step_batches(step)
            assert [len(micro) for micro in micro_batches] == [batch] * accumulation
            for number, micro in enumerate(micro_batches):
                for sample in micro:
                    assert sample.index // (world_size * batch) == number
                    assert sample.index % (world_size * batch) // batch == rank
            samples += [sample for micro in micro_batches for sample in micro]
        samples.sort(key=lambda sample: sample.index)
        assert [sample.index for sample in samples] == list(range(world_size * accumulation * batch))
        result.append(samples)
    return result


@pytest.mark.parametrize("rows_type", [MapRows, StreamRows])
@pytest.mark.parametrize("shuffle", [True, False])
def test_order_is_the_same_at_any_world_size_and_split(rows_type, shuffle, tokenizer):
    def rows():
        return build(rows_type, dialogues(11), tokenizer)

    whole = global_batches(rows, 1, 1, 8, steps=5, shuffle=shuffle)
    for world_size, accumulation, batch in [(1, 2, 4), (2, 1, 4), (2, 2, 2), (4, 1, 2), (4, 2, 1), (1, 8, 1)]:
        assert global_batches(rows, world_size, accumulation, batch, steps=5, shuffle=shuffle) == whole


@pytest.mark.parametrize("rows_type", [MapRows, StreamRows])
def test_every_row_once_per_epoch_and_epochs_differ(rows_type, tokenizer):
    def stream(seed):
        batches = global_batches(lambda: build(rows_type, dialogues(11), tokenizer), 1, 1, 4, 11, seed=seed)
        return [question_number(tokenizer, sample) for batch in batches for sample in batch]

    numbers = stream(seed=3)
    epochs = [numbers[start : start + 11] for start in (0, 11, 22, 33)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream(seed=4) != numbers and stream(seed=3) == numbers


def test_unshuffled_stream_equals_random_access(tokenizer):
    rows = dialogues(9)
    mapped = global_batches(lambda: build(MapRows, rows, tokenizer), 2, 1, 2, 6, shuffle=False)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert global_batches(lambda: build(StreamRows, stream, tokenizer), 2, 1, 2, 6, shuffle=False) == mapped
    assert [question_number(tokenizer, sample) for sample in mapped[2]] == [8, 0, 1, 2]


@pytest.mark.parametrize("rows_type", [MapRows, StreamRows])
def test_resume_and_going_back(rows_type, tokenizer):
    def data():
        return StepData(build(rows_type, dialogues(11), tokenizer), config(), 2, 1)

    forward = data()
    steps = [forward.step_batches(step) for step in range(9)]
    resumed = data()
    assert [resumed.step_batches(step) for step in (7, 8, 2, 2, 3)] == [steps[step] for step in (7, 8, 2, 2, 3)]


def test_stream_reads_no_further_than_it_needs(tokenizer):
    class Counted(list):
        read = 0

        def __iter__(self):
            for row in super().__iter__():
                self.read += 1
                yield row

    source = Counted(dialogues(50))
    data = StepData(build(StreamRows, source, tokenizer), config(), 2, 0, shuffle=False)
    data.step_batches(0)
    data.step_batches(1)
    assert source.read == 8


def test_order_pins_its_permutation():
    # golden: a change here changes the data order of every run that resumes
    assert epoch_generator(42, 0).permutation(8).tolist() == GOLDEN_PERMUTATION
    assert [DataOrder(8, seed=42).row(k) for k in range(8)] == GOLDEN_PERMUTATION
    assert epoch_generator(-1, 0).permutation(8).tolist() != GOLDEN_PERMUTATION


def test_shuffle_buffer_loses_nothing():
    for size in (1, 4, 100):
        assert sorted(shuffled(range(20), np.random.RandomState(0), size)) == list(range(20))
    assert list(shuffled(range(20), np.random.RandomState(0), 1)) == list(range(20))
    assert list(shuffled(range(20), np.random.RandomState(0), 8)) != list(range(20))


def test_lengths_of_a_run(tokenizer):
    settings = config(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    data = StepData(build(MapRows, dialogues(30), tokenizer), settings, 2, 0)
    assert (data.num_rows, data.global_batch, data.steps_per_epoch) == (30, 12, 2.5)
    with pytest.raises(ValueError, match="set max_steps"):
        StepData(build(StreamRows, dialogues(3), tokenizer), settings, 2, 0).num_rows  # noqa: B018


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_eval_uses_every_row_once(num_rows, world_size, tokenizer):
    rows = build(MapRows, [{"prompt": "p" * 300}, *dialogues(num_rows)], tokenizer)
    shares = [eval_batches(rows, rank, world_size, 2) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    samples = [sample for share in shares for batch in share for sample in batch]
    assert sorted(sample.index for sample in samples) == list(range(1, num_rows + 1))
    assert all(question_number(tokenizer, sample) == sample.index - 1 for sample in samples)
    assert all(len(batch) <= 2 for share in shares for batch in share)
