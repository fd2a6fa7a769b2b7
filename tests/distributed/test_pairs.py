"""Which student, teacher and tokenizer go together: ids without a row, renamed tokens, a teacher given as an object."""

from __future__ import annotations

import logging

import pytest

from engine import GKDConfig, GKDTrainer
from tests.library.models import tiny_llama, tiny_tokenizer

ROWS = [{"prompt": "abc", "completion": "defgh"}, {"prompt": "abc", "completion": "xyz"}] * 2
LAST = 258  # `<|end|>`, the last id of the tiny tokenizer


def attempt(output_dir: str, cases: dict) -> dict[str, str]:
    """For each case the error with which a trainer is refused, or the warnings with which it trains a step."""
    results = {}
    for name, case in cases.items():
        config = GKDConfig(
            output_dir=f"{output_dir}/{name}", bf16=False, report_to="none", lmbda=0.5, max_steps=1, save_steps=None,
            max_length=32, max_new_tokens=8, per_device_train_batch_size=1, **case.get("fields", {}),
        )  # fmt: skip
        tokenizer, teacher_tokenizer = tiny_tokenizer(), case.get("teacher_processing_class")
        models = [tiny_llama(case.get("num_rows", 259), seed=seed) for seed in (0, 1)]
        models[1].config.name_or_path = case.get("teacher_name", "")
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())
        logging.getLogger("engine").addHandler(handler)
        try:
            trainer = GKDTrainer(
                *models, config, train_dataset=case.get("rows", ROWS), processing_class=tokenizer,
                teacher_processing_class=teacher_tokenizer,
            )  # fmt: skip
            trainer.train()
            trainer.run.student.engine.destroy()
            results[name] = "trained. " + " ".join(said)
        except ValueError as error:
            results[name] = f"error: {error}"
        finally:
            logging.getLogger("engine").removeHandler(handler)
    return results


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """A folder with a tokenizer whose last token has another name."""
    folder = tmp_path_factory.mktemp("renamed")
    tiny_tokenizer().save_pretrained(folder)
    for file in folder.glob("*.json*"):
        file.write_text(file.read_text().replace("<|end|>", "<|eom|>"))
    return folder


def test_pairs(ranks, renamed, tmp_path):
    cases = {
        "fewer rows than ids": {"num_rows": LAST},
        "a row uses the id": {"num_rows": LAST, "rows": [*ROWS, {"prompt": "a", "completion": "b<|end|>"}]},
        "a prompt uses the id": {"num_rows": LAST, "rows": [{"prompt": "a<|end|>", "completion": "b"}, *ROWS]},
        "the stop has no row": {"num_rows": 256},
        "nobody knows": {},
        "the folder says": {"teacher_name": str(renamed)},
        "the folder is gone": {"teacher_name": str(renamed / "gone")},
        "accepted": {"teacher_name": str(renamed), "fields": {"allow_token_renames": ["<|eom|>"]}},
        "given": {"teacher_processing_class": tiny_tokenizer()},
    }
    (results,) = ranks(1).run(attempt, str(tmp_path), cases)
    unchecked = "the teacher came as an object without a tokenizer"
    assert results["fewer rows than ids"].startswith("trained.")
    for name, row in (("a row uses the id", 5), ("a prompt uses the id", 1)):
        said = results[name]
        assert f"train_dataset, row {row}: token '<|end|>' has id {LAST}" in said, said
        assert said.startswith("error:") and f"share only {LAST} embedding rows" in said
    assert results["the stop has no row"].startswith("error: token '<|im_end|>' has id 256")
    assert results["nobody knows"].startswith("trained.") and unchecked in results["nobody knows"]
    assert unchecked in results["the folder is gone"]
    assert "differ at 1 of 259" in results["the folder says"]
    assert results["the folder says"].endswith(f"--allow_token_renames {LAST}")
    for name in ("accepted", "given"):
        assert results[name].startswith("trained.") and unchecked not in results[name]
