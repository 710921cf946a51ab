"""What every rank does in a collective, as data: topology → algorithm → plan → verified, costed, chosen, printed.

Everything here is pure: no process group, no tensors, no clock. ``runtime/`` reads the plans and moves the bytes.
"""
