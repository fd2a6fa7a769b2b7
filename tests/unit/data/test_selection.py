"""Rows with an answer and rows without: two orders, two positions, and no step without a token to train on."""

import logging

import pytest

from engine.config import GKDConfig
from engine.data.encoding import RowEncoder
from engine.data.order import DataOrder
from engine.data.samples import StepData, build_rows
from engine.data.selection import MapRows, StreamRows
from engine.data.tally import RowRules
from tests.library.models import tiny_tokenizer

NUM_ROWS = 20


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def mixed_rows(every: int = 4, count: int = NUM_ROWS) -> list[dict]:
    """Rows with an answer at every `every`-th place, prompts alone elsewhere."""
    rows = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}] for i in range(count)
    ]
    return [{"messages": row if i % every == 0 else row[:1]} for i, row in enumerate(rows)]


def config(**values) -> GKDConfig:
    return GKDConfig(**({"max_length": 200, "max_new_tokens": 8, "per_device_train_batch_size": 2} | values))


def number_of(tokenizer, sample) -> int:
    return int(tokenizer.decode(sample.prompt_ids).split("question ")[1].split("<")[0])


def run(rows, tokenizer, on_policy: list[bool], world_size: int = 1, batch: int = 4, position: tuple = (0, 0)):
    """The row numbers of each step as the trainer takes them, with the positions after it; all answers checked."""
    settings = config(per_device_train_batch_size=batch, seed=5, max_steps=100)
    ranks = [StepData(rows(), settings, world_size, rank) for rank in range(world_size)]
    (batches, answered_batches), steps, positions = position, [], []
    for own in on_policy:
        lacks = [data.lacks_answers(batches) for data in ranks]
        assert len(set(lacks)) == 1
        use_answered = lacks[0] and not own
        samples = []
        for data in ranks:
            number = answered_batches if use_answered else batches
            samples += [s for micro in data.step_batches(number, answered=use_answered) for s in micro]
        assert own or all(sample.num_response_tokens for sample in samples)
        answered_batches, batches = answered_batches + use_answered, batches + (not use_answered)
        steps.append([number_of(tokenizer, sample) for sample in sorted(samples, key=lambda sample: sample.index)])
        positions.append((batches, answered_batches))
    return steps, positions


def build(rows_type, rows, tokenizer, **rules):
    return rows_type(rows, RowEncoder(tokenizer, 200), "rows", RowRules(**({"answers": "some"} | rules)))


@pytest.mark.parametrize("rows_type", [MapRows, StreamRows])
@pytest.mark.parametrize("every", [2, 4])
def test_mixed_rows_have_two_orders_that_resume_at_any_world_size(rows_type, every, tokenizer):
    def rows():
        return build(rows_type, mixed_rows(every), tokenizer)

    on_policy = [step % 3 == 0 for step in range(24)]
    steps, positions = run(rows, tokenizer, on_policy)
    own = [number for step, is_own in zip(steps, on_policy, strict=True) if is_own for number in step]
    assert sorted(own[:NUM_ROWS]) == list(range(NUM_ROWS))  # a first epoch of all rows
    from_data = [number for step, is_own in zip(steps, on_policy, strict=True) if not is_own for number in step]
    epoch = NUM_ROWS // every
    for start in range(0, len(from_data) - epoch, epoch):
        assert sorted(from_data[start : start + epoch]) == list(range(0, NUM_ROWS, every))
    for step in (4, 11):
        again = run(rows, tokenizer, on_policy[step:], world_size=2, batch=2, position=positions[step - 1])
        assert again == (steps[step:], positions[step:])


def test_the_orders_are_permutations_of_seed_and_epoch(tokenizer):
    steps, positions = run(lambda: build(MapRows, mixed_rows(), tokenizer), tokenizer, [False, True, False])
    all_rows, answered = DataOrder(NUM_ROWS, 5), DataOrder(NUM_ROWS // 4, 5)
    assert steps[0] + steps[2] == [4 * answered.row(k) for k in range(8)]
    assert steps[1] == [all_rows.row(k) for k in range(4)]
    assert positions == [(0, 1), (1, 1), (1, 2)]


@pytest.mark.parametrize("rows_type", [MapRows, StreamRows])
def test_where_every_row_has_an_answer_there_is_one_position(rows_type, tokenizer):
    def rows(**rules):
        return lambda: build(rows_type, mixed_rows(1), tokenizer, **rules)

    on_policy = [step % 2 == 0 for step in range(8)]
    steps, positions = run(rows(), tokenizer, on_policy)
    assert positions == [(step, 0) for step in range(1, 9)]
    assert steps == run(rows(answers="optional"), tokenizer, on_policy)[0]
    numbers = [number for step in steps for number in step]
    assert sorted(numbers[:NUM_ROWS]) == list(range(NUM_ROWS))


@pytest.mark.parametrize(
    "settings, used, said",
    [
        ({"lmbda": 0.5}, NUM_ROWS, "15 of 20 rows have no answer and are used on on-policy steps only"),
        ({"lmbda": 0.0}, 5, "15 of 20 rows have no answer and are left out, as lmbda=0"),
        ({"lmbda": 0.0, "seq_kd": True}, NUM_ROWS, None),
        ({"lmbda": 1.0}, NUM_ROWS, None),
    ],
)
def test_prompts_alone_are_used_where_the_answer_is_written_anew(settings, used, said, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = build_rows(mixed_rows(), tokenizer, config(**settings), "train")
        build_rows(mixed_rows(), tokenizer, config(**settings), "train", rank=1)
    assert len(rows) == used and caplog.messages == ([] if said is None else [f"train_dataset: {said}"])
    data = StepData(rows, config(**settings), 1, 0)
    assert data.lacks_answers(0) is (settings["lmbda"] == 0.5)
    assert data.steps_per_epoch == used / data.global_batch


@pytest.mark.parametrize("rows_type", [MapRows, StreamRows])
def test_no_answer_anywhere_is_an_error_before_a_step(rows_type, tokenizer):
    for answers in ("some", "all"):
        with pytest.raises(ValueError, match="rows 1 to 20: none has an assistant turn"):
            data = StepData(
                build(rows_type, mixed_rows(every=100)[1:] * 2, tokenizer, answers=answers, limit=20), config(), 1, 0
            )
            data.step_batches(0, answered=data.lacks_answers(0))


def test_a_row_without_room_for_an_answer_is_no_prompt_alone(tokenizer):
    rows = mixed_rows(1, 3)
    rows[1]["messages"][0]["content"] = "x" * 500
    kept = build(MapRows, rows, tokenizer)
    assert len(kept) == 2 and not kept.lacks_answers(0, 1, 0, True)
