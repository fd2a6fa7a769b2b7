"""Errors that end a run and are not the user's input (that is `ValueError`). The commands print them in one line."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or converted; earlier ones are intact."""


class BadStepsError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""
