"""The sub-commands of ``ncclx``, one module each.

A module has `NAME`, `HELP`, ``add_arguments(parser)`` and ``run(args) -> int`` (the exit status); a failure that the user
can mend is raised as ValueError, RuntimeError or OSError with a message for them. It is listed in ``ncclx_py/cli.py``.
"""
