"""Errors a person can act on.

Everything a user can get wrong (a key, a path, a value, a full disk) raises a subclass of ``DistillError`` whose
message names the value, the place and the remedy. The command line prints that message without a traceback and exits
with 2, or 1 where nothing was wrong with the input; anything else is a defect of ours and keeps its traceback.
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


class CacheError(DistillError):
    """A cache of teacher scores that cannot be written or read, or does not fit the run."""


class MeetingError(DistillError):
    """The ranks of a job did not come together; the message names those that are missing, where that can be known."""

    exit_status = 1


class ServerError(DistillError):
    """A rollout server that cannot be started or reached, or that does not serve what the run needs."""

    exit_status = 1


class TeacherRankLost(DistillError):
    """A rank that teaches (``teacher.placement=separate``) is gone, as this student rank learnt; others may learn it elsewhere. Or
    the servers that teach (``server``) stay away or refuse a request, as all ranks learn together.

    The trainer carries it to the end of the step, where all students agree to save and stop, or to go on without that rank.
    """

    exit_status = 1


class TeacherLost(DistillError):
    """A teacher, on ranks of its own or behind a server, that no longer answers; every student rank raises it at the same call."""

    on_every_rank = True
    exit_status = 1


class NonFiniteLossError(DistillError):
    """The loss became NaN or infinite; the message names the step and the samples."""

    on_every_rank = True
    exit_status = 1
