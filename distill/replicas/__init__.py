"""Several jobs that train one model and may die: what the trainer asks of them, and the answers when there is one job.

    one.py      a job on its own: every question has a simple answer
    many.py     one of several replicas: dealing of samples, figures and gradients over all, the commit of a step
    transfer.py the state that a returning replica fetches, and the steps that it catches up with
    books.py    what is written once per step, and who made which sample

Membership, the lanes between replicas and the store are ``ncclx_py.elastic``. See docs/elastic.md.
"""

from distill.replicas.one import OneReplica

__all__ = ["OneReplica"]
