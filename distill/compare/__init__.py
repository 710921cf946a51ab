"""``distill compare [key=value …]``, the same as ``python -m distill.compare``: methods × seeds on one task and one budget.

    distill compare experiment=methods compare.parallel=2                       # the whole table
    distill compare experiment=methods 'compare.entries=[motab,on_policy]' 'compare.seeds=[0,1]' --json -
    distill compare experiment=methods compare.budget.tokens=2000000 compare.ranks=2 compare.dir=outputs/tokens

Every run is an ordinary ``distill train`` run in a folder and a process of its own. One seed means the same data order and the
same initial student for all entries. compare.dir gets table.md and table.csv (an entry per line: means over seeds with 95 %
intervals), runs.csv (a run per line), report.json, two pictures (accuracy over tokens, length over accuracy), and the runs with
their logs.

Start the same command again after a kill: finished runs are left alone, the ones in progress continue from their checkpoints,
failed ones are tried again. The exit code is 1 when a run failed; the others go on, and the table says which failed and why.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    from distill.compare import command  # late: a run's process imports this package, too, and needs nothing of it

    return command.main(arguments)
