"""The process group that torch calls, and what stands between it and the bytes.

Reading order: ``process_group`` (what torch calls), ``local`` (one collective on one device), ``cpu`` and ``nccl`` (what
differs between the two), ``planned`` (collectives of CPU tensors, as problems), ``engine`` with ``basis``, ``settings``
and ``choices`` (problem to verified plan), ``progress`` (runs them in order, over ``ncclx_py.transport``), ``native_plans``
(GPUs on several hosts), ``reduction`` and ``staging`` (how a tensor becomes what a library takes), ``work`` and ``pending``
(how it ends).
"""
