"""The ``ncclx`` command: ``ncclx <sub-command> --help``, also as ``python -m ncclx_py``.

A sub-command is a module of ``ncclx_py/commands``; adding one means adding it to `COMMANDS`. Exit status: 0 when it did
what was asked, 1 when it failed (the reason is on stderr), 2 when the command line was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import ncclx_py
from ncclx_py.commands import bench, diagnose, doctor, info, launch, plan, probe, simulate, tune

COMMANDS = (info, doctor, launch, bench, plan, probe, tune, simulate, diagnose)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"ncclx {args.command}: error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ncclx", description="Topology-aware collectives for torch.distributed.")
    parser.add_argument("--version", action="version", version=f"ncclx {ncclx_py.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP.capitalize() + ".")
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser
