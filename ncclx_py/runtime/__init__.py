"""The half of ncclx_py that moves bytes: the process group, its work objects and the libraries underneath.

Reading order: ``process_group`` (what torch calls) → ``local`` (one collective on one device, over a c10d library) →
``gloo`` and ``nccl`` (what differs between the two) → ``reduction``, ``staging`` (how a tensor becomes what the library
takes) → ``work`` and ``errors`` (how it ends).
"""
