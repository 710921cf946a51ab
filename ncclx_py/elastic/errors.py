"""What can end a step of an elastic run."""


class ElasticError(RuntimeError):
    """Something that a person must mend: no store, a wrong token, two replicas with one id."""


class EpochChanged(Exception):
    """The members are no longer those that began the step: nothing of it was applied; repeat it with the new ones."""


class Dropped(Exception):
    """This replica is not a member any more: its state is out of date. Join again and fetch a newer one."""


class RunFinished(Exception):
    """The run is complete: there is nothing left to take part in."""
