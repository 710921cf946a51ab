"""The ``distill`` command: ``distill train``, ``rollout``, ``eval``, ``compare``; Hydra overrides as ``key=value``.

Each subcommand is a module of its own (``python -m distill.train`` is the same). A mistake in the input is one message and
exit code 2; a failure while running is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.runs import write_json

COMMANDS = {
    "train": "train a student, alone or from a teacher",
    "rollout": "write trajectories of a student and its teacher, as data",
    "eval": "measure what a model can do",
    "compare": "compare methods over seeds on equal budgets",
}


def main() -> int:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(
        prog="distill",
        description="Distil reasoning language models.",
        epilog="`distill COMMAND --help` explains a command; every command takes Hydra overrides: key=value.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    chosen, rest = parser.parse_known_args()
    return int(import_module(f"distill.{chosen.command}").main(rest))


def run_command(
    name: str,
    documentation: str,
    body: Callable[[list[str]], dict[str, Any]],
    arguments: Sequence[str] | None,
    switches: Mapping[str, tuple[str, str]] = {},
) -> int:
    """Parse the arguments of one subcommand, run it, report; returns the exit code.

    ``switches``: option → the override that it stands for, and its help.
    """
    parser = argparse.ArgumentParser(
        prog=f"distill {name}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_groups(),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, for example train.steps=50")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE ('-' for standard output)")
    for switch, (override, purpose) in switches.items():
        parser.add_argument(switch, dest="switched", action="append_const", const=override, help=purpose)
    options = parser.parse_intermixed_args(arguments)
    try:
        figures = body([*options.overrides, *(getattr(options, "switched", None) or [])])
    except DistillError as error:
        return _report(error)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    if options.json and os.environ.get("RANK", "0") == "0":
        _write(options.json, figures)
    return 0


def _report(error: DistillError) -> int:
    """One message per job: where all ranks fail alike, rank 0 speaks; else the rank that failed does."""
    index = os.environ.get("RANK", "0")
    if index == "0" or not error.on_every_rank:
        kind = "error: " if error.exit_status in (1, 2) else ""  # one that was told to stop has not failed
        print(f"{kind}{error}", file=sys.stderr, flush=True)
    else:
        time.sleep(1.0)  # torchrun ends the job at the first exit: let rank 0 speak
    return error.exit_status


def _write(target: str, figures: dict[str, Any]) -> None:
    if target == "-":
        print(json.dumps(figures, indent=2))
    else:
        write_json(Path(target), figures)


def _groups() -> str:
    """The choices of every configuration group, for ``--help``."""
    from distill.config import conf_folder

    lines = ["configuration groups (conf/GROUP/CHOICE.yaml lists and explains each group's keys):"]
    for folder in sorted(path for path in conf_folder().iterdir() if path.is_dir()):
        choices = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        lines.append(f"  {folder.name}={choices}" if choices else f"  {folder.name}")
    return "\n".join(lines)
