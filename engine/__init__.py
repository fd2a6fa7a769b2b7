"""Generalized knowledge distillation on DeepSpeed ZeRO-3. Public names; torch loads with the trainer, not before."""

from engine.config import GKDConfig

__all__ = ["GKDConfig", "GKDTrainer", "__version__"]

__version__ = "0.1.0"  # pyproject.toml reads it from here


def __getattr__(name: str):
    if name == "GKDTrainer":
        from engine.trainer import GKDTrainer

        return GKDTrainer
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
