"""A script as people write it for TRL: positional arguments, bf16 objects, rows brought into shape by map."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"
TEACHER = "Qwen/Qwen2.5-1.5B-Instruct"
DATA = "trl-lib/chatbot_arena_completions"
OUTPUT = "gkd-positional"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
model = AutoModelForCausalLM.from_pretrained(STUDENT, torch_dtype=torch.bfloat16, device_map=None)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER, torch_dtype=torch.bfloat16, device_map=None)
teacher.eval()
for parameter in teacher.parameters():
    parameter.requires_grad = False


def to_pair(row):
    *context, answer = row["messages"]
    return {"question": context[-1]["content"], "answer": answer["content"]}


def to_messages(row):
    return {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }


dataset = load_dataset(DATA)
dataset = dataset.map(to_pair, remove_columns=["messages"]).map(to_messages, remove_columns=["question", "answer"])
train = dataset["train"].shuffle(seed=1).select(range(8))
eval_set = dataset["test"]

args = GKDConfig(
    OUTPUT,
    max_steps=2,
    per_device_train_batch_size=2,
    learning_rate=1e-4,
    bf16=torch.cuda.is_available(),
    lmbda=1.0,
    beta=0.1,
    max_new_tokens=8,
    max_length=64,
    save_strategy="no",
    eval_strategy="no",
    logging_steps=1,
    report_to="none",
)

trainer = GKDTrainer(model, teacher, args, None, train, eval_set, tokenizer)
output = trainer.train()
assert output.global_step == 2 and trainer.state.global_step == 2
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert len(losses) == 2, trainer.state.log_history
assert not any("eval_loss" in entry for entry in trainer.state.log_history)
trainer.save_model()
if trainer.is_world_process_zero():
    print("losses", losses)
