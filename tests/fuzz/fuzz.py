"""Feeds malformed input to every reader: never a hang, a crash without a message, or a file outside of the case's folder.

    python tests/fuzz/fuzz.py --cases 100000                     # what `make fuzz` runs
    python tests/fuzz/fuzz.py --target plan --case 1234          # one case again, with its traceback

A case follows from (seed, target, number) alone. Exit status 1 and a line to replay each failure where there are some.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[2]]

from guard import Hang, arm, guarded
from mutate import mutated
from targets import Target, all_targets

SECONDS = 10.0  # for one case
SHOWN = 10  # failures of one target
_PERIOD = 5.0  # seconds between lines of progress


@dataclass(frozen=True)
class Failure:
    """What went wrong with case `number` of a target; `story` begins with the error."""

    target: str
    number: int
    story: str
    data: bytes

    def __str__(self) -> str:
        shown = repr(self.data[:300]) + (f"… ({len(self.data)} bytes)" if len(self.data) > 300 else "")
        return f"{self.target} case {self.number}: {self.story}\n  input: {shown}"


def case(target: Target, seed: int, number: int) -> bytes:
    """The input of one case."""
    return mutated(random.Random(f"{seed}/{target.name}/{number}"), target.seeds)


def run_case(target: Target, seed: int, number: int, trace: bool = False) -> Failure | None:
    """Runs one case in a folder of its own; None when it was accepted, or refused as it should be."""
    data, folder = case(target, seed, number), Path(tempfile.mkdtemp(prefix="ncclx-fuzz-"))
    story = ""
    try:
        with guarded(folder, SECONDS) as offences:
            target.read(data, folder)
    except target.errors as error:
        story = "" if str(error).strip() else f"{type(error).__name__} without a message"
    except Hang:
        story = f"not done after {SECONDS:g} s: {_place(sys.exc_info()[1])}"
    except (Exception, SystemExit) as error:
        story = f"{type(error).__name__}: {str(error)[:200]} at {_place(error)}"
        if trace:
            traceback.print_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if offences:
        story = f"{story} outside of its folder: {'; '.join(offences[:3])}".strip()
    return Failure(target.name, number, story, data) if story else None


def run_target(
    target: Target, seed: int, cases: int, note: Callable[[str], None], until: float | None = None
) -> tuple[int, list[Failure]]:
    """Runs cases 0 to `cases` - 1; stops early after `SHOWN` failures. Returns how many ran, and the failures."""
    failures: list[Failure] = []
    began = last = time.monotonic()
    number = 0
    while number < cases and len(failures) < SHOWN and (until is None or time.monotonic() < until):
        failure = run_case(target, seed, number)
        number += 1
        if failure is not None:
            failures.append(failure)
        if time.monotonic() - last > _PERIOD:
            last = time.monotonic()
            note(f"{target.name}: {number} of {cases}, {number / (last - began):.0f}/s, {len(failures)} failures")
    return number, failures


def prepare() -> list[Target]:
    """All targets, with this process guarded; call it once."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    targets = all_targets()
    for target in targets:  # imports on first use happen before memory is limited
        folder = Path(tempfile.mkdtemp(prefix="ncclx-fuzz-"))
        target.read(target.seeds[0], folder)
        shutil.rmtree(folder)
    arm()
    return targets


def _place(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="in total, at least (default 100000)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other cases (default 1)")
    parser.add_argument("--target", action="append", help="only these; repeat")
    parser.add_argument("--case", type=int, metavar="N", help="only case N of --target, with its traceback")
    options = parser.parse_args()
    targets = prepare()
    names = [target.name for target in targets]
    if unknown := sorted(set(options.target or ()) - set(names)):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = [target for target in targets if not options.target or target.name in options.target]
    if options.case is not None:
        failures = [found for target in chosen if (found := run_case(target, options.seed, options.case, trace=True))]
        print(*failures or ["no failure"], sep="\n")
        return 1 if failures else 0
    return _run_all(chosen, options.cases, options.seed)


def _run_all(targets: list[Target], cases: int, seed: int) -> int:
    began, total, failures = time.monotonic(), 0, []
    shares = sum(target.share for target in targets)
    for target in targets:
        wanted = -(-cases * target.share // shares)
        count, found = run_target(target, seed, int(wanted), lambda line: print(line, flush=True))
        total += count
        failures += found
        print(f"{target.name}: {count} cases, {len(found)} failures", flush=True)
        for failure in found:
            print(
                f"{failure}\n  replay: python tests/fuzz/fuzz.py --seed {seed} --target {target.name} --case {failure.number}"
            )
    print(f"{total} cases in {time.monotonic() - began:.0f} s, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
