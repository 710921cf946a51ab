"""Moves the bytes of a plan between CPU ranks: shared memory inside a host, TCP between hosts.

Reading order: ``fabric`` (how the ranks of a group reach each other), ``executor`` (runs a plan), ``lowering`` (plan to
operations), ``operations`` with ``local_operations`` and ``remote_operations`` (what each step does), ``channels``,
``window``, ``segments``, ``arena`` (shared memory), ``tcp`` and ``poller`` (sockets), ``waiting`` and ``bells`` (how a
rank waits and is woken), ``identity`` and ``neighbours`` (how the ranks found each other).
"""
