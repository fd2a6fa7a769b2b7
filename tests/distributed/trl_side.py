"""Ten steps of TRL's own GKD, run by the interpreter of a venv that has TRL and not this engine.

    python trl_side.py SETTINGS.json

Leaves the student and `losses.json` in the folder that the settings name.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

settings = json.loads(open(sys.argv[1]).read())
student, teacher = (AutoModelForCausalLM.from_pretrained(settings[name]) for name in ("student", "teacher"))
trainer = GKDTrainer(
    model=student.float(),
    teacher_model=teacher.float(),
    args=GKDConfig(**settings["fields"], use_cpu=True, save_strategy="no", report_to="none", logging_steps=1),
    train_dataset=Dataset.from_list(settings["rows"]),
    processing_class=AutoTokenizer.from_pretrained(settings["student"]),
)
trainer.train()
trainer.save_model(settings["out"])
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (Path(settings["out"]) / "losses.json").write_text(json.dumps(losses))
