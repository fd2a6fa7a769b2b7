"""A script as people write it for TRL: strategies, precision by what the hardware has, metrics, save_model."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GKDConfig, GKDTrainer

STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"
TEACHER = "Qwen/Qwen2.5-1.5B-Instruct"
DATA = "trl-lib/chatbot_arena_completions"
OUTPUT = "gkd-strategies"

set_seed(42)
has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()

tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.bfloat16 if has_bf16 else torch.float32)
model.config.use_cache = False
teacher_model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype="auto")

dataset = load_dataset(DATA)

args = GKDConfig(
    output_dir=OUTPUT,
    num_train_epochs=2,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=2e-5,
    optim="adamw_torch",
    lr_scheduler_type="cosine",
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    lmbda=0.5,
    beta=0.5,
    temperature=0.9,
    max_new_tokens=8,
    max_length=64,
    seq_kd=False,
    fp16=False,
    bf16=has_bf16,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="epoch",
    save_total_limit=1,
    logging_strategy="steps",
    logging_steps=1,
    logging_first_step=True,
    dataloader_pin_memory=False,
    dataloader_num_workers=0,
    remove_unused_columns=False,
    ddp_find_unused_parameters=False,
    report_to="none",
    run_name="gkd",
    seed=42,
)

trainer = GKDTrainer(
    model=model,
    teacher_model=teacher_model,
    args=args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
)

result = trainer.train()
trainer.save_model(args.output_dir)
if trainer.is_world_process_zero():
    tokenizer.save_pretrained(args.output_dir)

metrics = result.metrics
metrics["train_samples"] = len(dataset["train"])
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)
trainer.save_state()

metrics = trainer.evaluate()
metrics["eval_samples"] = len(dataset["test"])
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)

if trainer.is_world_process_zero():
    print(f"trained {result.global_step} steps, loss {result.training_loss:.4f}, eval_loss {metrics['eval_loss']:.4f}")
