"""Several jobs that train one model and may die: what the trainer asks of them, and the answers when there is one job.

    one.py      a job on its own: every question has a simple answer
    many.py     one of several replicas: dealing of samples, the commit of a step, who writes
    joining.py  how a replica gets its seat
    lanes.py    facts, figures and gradients over all replicas, in one epoch
    agreement.py   all ranks of a job return, or all raise the same
    transfer.py the state that a returning replica fetches, and the steps that it catches up with
    books.py    what is written once per step, and who made which sample

Membership, the lanes between replicas and the store are ``ncclx_py.elastic``. See docs/elastic.md.
"""

from distill.replicas.one import OneReplica

__all__ = ["OneReplica"]
