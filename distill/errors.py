"""Errors a person can act on.

Everything a user can get wrong (a key, a path, a value, a full disk) raises a subclass of ``DistillError`` whose
message names the value, the place and the remedy. The command line prints that message without a traceback and exits
with 2; anything else is a defect of ours and keeps its traceback.
"""


class DistillError(Exception):
    """Base of all errors whose message is meant for the person at the terminal.

    ``on_every_rank`` says that all ranks raise the same error, so that rank 0 alone should print it.
    """

    on_every_rank = False
    exit_status = 2  # of the command


class ConfigError(DistillError):
    """A configuration key or value that cannot work."""

    on_every_rank = True


class ModelError(DistillError):
    """A model or tokenizer that cannot be loaded, or two that do not fit together."""


class DataError(DistillError):
    """A dataset, or a sample of it, that cannot be used."""


class CheckpointError(DistillError):
    """A checkpoint that cannot be written, read, or continued from."""


class ServerError(DistillError):
    """A rollout server that cannot be started or reached, or that does not serve what the run needs."""


class NonFiniteLossError(DistillError):
    """The loss became NaN or infinite; the message names the step and the samples."""

    on_every_rank = True
