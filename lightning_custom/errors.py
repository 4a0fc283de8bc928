"""The errors that a user mends without reading a traceback; the command line prints them as one line."""


class ConfigError(ValueError):
    """A value from the user cannot be used; the message names the field, the value and the remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file, the reason and what was done."""


class SolverError(RuntimeError):
    """A method has no answer for the gradients of a step; the message names it, the tasks and their condition."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight is not finite; ``step`` is the step by whose end it was so.

    The checkpoints before it are good: one with a weight that is not finite is never written.
    """

    def __init__(self, what: str, *, step: int | None = None) -> None:
        super().__init__(what)
        self.what, self.step = what, step
        self.checkpoint: str | None = None
        self.run_dir: str | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}: "
        checkpoint = "" if self.checkpoint is None else f"; last good checkpoint: {self.checkpoint}"
        return f"{step}{self.what}{checkpoint}"
