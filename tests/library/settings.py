"""DeepSpeed's own view of its JSON."""


def load_in_deepspeed(settings: dict):
    """DeepSpeed's configuration object of resolved settings, which raises for what it does not take."""
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(settings)
