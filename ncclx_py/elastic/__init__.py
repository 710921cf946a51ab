"""Replicas that may die: membership by epochs, a fault-tolerant all-reduce, and state for those who return.

A replica is a job of its own (its own torchrun, its own process group). What joins several of them:

    store.py        one small process, `python -m ncclx_py.elastic.store`: who is alive, which step is committed. It may be
                    killed and restarted: what it decided stands in a journal on disk
    membership.py   its rules, without any input or output: epochs, stages of a step, leases, deadlines, the commit
    member.py       one rank's part: heartbeats, requests that outlive a restart of the store
    lanes.py        rank r of each replica with rank r of the others: a process group per epoch, sums in a fixed order
    states.py       a returning replica fetches the state of a healthy one, and what has been committed since

A step is committed by the store, once every member of the epoch has reported that it holds the step's sums; then all apply
it. A member that dies or stalls before that ends the epoch: the others repeat the step without it. See docs/elastic.md.
"""

from ncclx_py.elastic.errors import Dropped, ElasticError, EpochChanged, RunFinished

__all__ = ["Dropped", "ElasticError", "EpochChanged", "RunFinished"]
