"""A script as people write it for TRL: the best model is kept, callbacks watch and stop, a second call goes on."""

import json
import os
import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"
TEACHER = "Qwen/Qwen2.5-1.5B-Instruct"
DATA = "trl-lib/chatbot_arena_completions"
OUTPUT = "gkd-best"


class LossLog(TrainerCallback):
    """Writes losses to a file, and stops where the loss is below a goal or at a step."""

    def __init__(self, path, goal, last_step=None):
        self.path, self.goal, self.last_step = path, goal, last_step

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        assert model is not None and processing_class is not None
        assert state.max_steps > 0 and args.learning_rate > 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            with open(self.path, "a") as file:
                row = {
                    "step": state.global_step,
                    "epoch": state.epoch,
                    "loss": logs["loss"],
                    "lr": logs["learning_rate"],
                }
                file.write(json.dumps(row) + "\n")
            if logs["loss"] < self.goal:
                control.should_training_stop = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        assert "eval_loss" in metrics

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last_step:
            control.should_training_stop = True
        return control


tokenizer = AutoTokenizer.from_pretrained(STUDENT)
model = AutoModelForCausalLM.from_pretrained(STUDENT)
teacher_model = AutoModelForCausalLM.from_pretrained(TEACHER)
dataset = load_dataset(DATA)
resume = "--resume" in sys.argv

args = GKDConfig(
    output_dir=OUTPUT,
    num_train_epochs=3,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    learning_rate=1e-3,
    warmup_steps=1,
    max_new_tokens=8,
    max_length=64,
    bf16=False,
    gradient_checkpointing=False,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="steps",
    save_steps=2,
    save_total_limit=2,
    load_best_model_at_end=True,
    metric_for_best_model="eval_loss",
    greater_is_better=False,
    logging_steps=1,
    report_to=[],
)

trainer = GKDTrainer(
    model=model,
    teacher_model=teacher_model,
    args=args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
)
trainer.add_callback(LossLog(os.path.join(OUTPUT, "losses.jsonl"), goal=0.0, last_step=8 if resume else 4))

trainer.train(resume_from_checkpoint=True if resume else None)

best = trainer.state.best_model_checkpoint
assert best is not None and os.path.isdir(best), best
evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
assert trainer.state.best_metric == min(evaluated), (trainer.state.best_metric, evaluated)
metrics = trainer.evaluate()
assert abs(metrics["eval_loss"] - trainer.state.best_metric) < 1e-3 * abs(trainer.state.best_metric), metrics
trainer.save_model(os.path.join(OUTPUT, "best-model"))
trainer.save_state()
if trainer.is_world_process_zero():
    print(f"step {trainer.state.global_step}, best {trainer.state.best_metric:.4f} at {os.path.basename(best)}")
