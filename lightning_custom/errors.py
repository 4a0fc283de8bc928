"""The errors that a user mends without reading a traceback; the command line prints them as one line."""


class ConfigError(ValueError):
    """A value from the user cannot be used; the message names the field, the value and the remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file, the reason and what was done."""
