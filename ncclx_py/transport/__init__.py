"""Moves the bytes of plans and of messages between CPU ranks: shared memory inside a host, TCP between hosts.

Reading order: ``fabric`` (how the ranks of a group reach each other), ``executor`` (runs a plan), ``lowering`` (plan to
operations), ``operations`` with ``local_operations`` and ``remote_operations`` (what each step does), ``channels``,
``house``, ``window``, ``segments``, ``arena`` (shared memory), ``tcp`` and ``poller`` (sockets), ``waiting`` and ``bells`` (how a
rank waits and is woken), ``identity`` and ``neighbours`` (how the ranks found each other). Messages between two ranks are
apart from plans: ``mail`` (the mailbox), ``sorting`` (which send belongs to which receive), ``letters`` (a message and its
frames), ``lines`` and ``doors`` (connections).
"""
