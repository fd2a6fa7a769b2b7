"""Configuration: every field, its default, its meaning and its checks.

Imports neither torch nor DeepSpeed, so `--help` and a misspelt key answer at once. Field names follow TRL's GKD script
and Hugging Face's `TrainingArguments` (engine/TRL.md says what each does here). DeepSpeed's JSON owns ZeRO and offload
(engine/zero/settings.py); this room owns batch, optimizer and lengths.
"""

from engine.config.algorithm import DIVERGENCE_KINDS as DIVERGENCE_KINDS
from engine.config.algorithm import GENERATION_PLACEMENTS as GENERATION_PLACEMENTS
from engine.config.gkd import GKDConfig as GKDConfig
from engine.config.gkd import config_from_dict as config_from_dict
from engine.config.models import RESERVED_TEMPLATE_KWARGS as RESERVED_TEMPLATE_KWARGS
