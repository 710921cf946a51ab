"""Bubble ratio of training rollouts with and without sorting, on lengths with a heavy tail.

    python -m distill.rollouts.bench_schedule --json schedule.json

Decodes the same prompts for ``--updates`` updates of ``--batch`` samples: plain (each update waits for its longest sample), and
sorted with unfinished samples kept (``partial``), dropped (``drop``), and dropped with nothing kept at all (``on-policy``,
max_staleness 0). A tiny model counts down (see `distill.rollouts.bench`): all its weights do real work, lengths are what is
asked for. They are Pareto-distributed from ``--shortest`` on, shape ``--tail``, cut at ``--longest``. Weights do not change.

Columns: ``bubble`` as `distill.rollouts.slot_time` defines it, over all updates; ``cut`` its share of the plain one that is gone;
``ticks`` decode steps; ``dropped`` the share of decoded tokens that were thrown away; ``yield`` tokens trained on per slot-tick;
``stale`` mean and greatest staleness in updates; ``first`` and ``last`` mean length in the first and last quarter of a cycle's
updates (the curriculum); ``seconds`` wall-clock.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.rollouts.bench import FIRST, bare_tokenizer, bench_parser, countdown_model, write_results
from distill.rollouts.generator import Generator
from distill.rollouts.pool import Pool, Response, Unit
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.slot_time import SlotTime, bubble_ratio
from distill.rollouts.sorting import SortedRollouts

Update = tuple[list[int], list[int], SlotTime]
"""Lengths, staleness of each, slot-time."""


@dataclass(frozen=True)
class Result:
    """One way to schedule; see the module for the fields."""

    schedule: str
    bubble: float
    cut: float
    ticks: int
    dropped: float
    yielded: float
    stale_mean: float
    stale_max: int
    first: float
    last: float
    seconds: float


def tail_prompts(args: argparse.Namespace) -> list[list[int]]:
    """A prompt per sample that makes the model count down for a Pareto-distributed number of tokens."""
    chance = random.Random(args.seed)
    lengths = [
        min(args.longest, int(args.shortest * chance.paretovariate(args.tail)))
        for _ in range(args.batch * args.updates)
    ]
    return [[FIRST + length - 1] for length in lengths]


def plain(generator: Generator, prompts: list[list[int]], args: argparse.Namespace) -> list[Update]:
    """Each update decodes its own samples."""
    updates: list[Update] = []
    for start in range(0, len(prompts), args.batch):
        part = prompts[start : start + args.batch]
        found = generator.generate(part, params(args), range(start, start + len(part)))
        updates.append(([len(one.response_ids) for one in found], [0] * len(found), generator.slot_time))
    return updates


def sorted_by_end(generator: Generator, prompts: list[list[int]], args: argparse.Namespace, pool: Pool) -> list[Update]:
    """Each update takes what ends first."""
    waiting = [Unit(n, [Response(n, prompt, n)]) for n, prompt in enumerate(prompts)][::-1]

    def more(count: int) -> list[Unit]:
        return [waiting.pop() for _ in range(min(count, len(waiting)))]

    rollouts, updates = SortedRollouts(pool), []
    for version in range(args.updates):
        units, slot_time = rollouts.update(generator, params(args), args.batch, version, more)
        updates.append(([unit.length for unit in units], [unit.staleness(version) for unit in units], slot_time))
    return updates


def params(args: argparse.Namespace) -> SamplingParams:
    """Greedy, so that every way writes the same texts."""
    return SamplingParams(max_new_tokens=2 * args.longest, temperature=0.0)


def measure(name: str, updates: list[Update], seconds: float, reference: float | None, over: float) -> Result:
    """Sums over the updates; ``over`` updates are a cycle, of which the first and last quarter are compared."""
    times = [slot_time for _, _, slot_time in updates]
    whole = sum(time.slots * time.ticks for time in times)
    bubble = sum(bubble_ratio([time]) * time.slots * time.ticks for time in times) / whole
    cycle = max(1, round(over))
    quarter = max(1, cycle // 4)
    first = [n for i, (lengths, _, _) in enumerate(updates) if i % cycle < quarter for n in lengths]
    last = [n for i, (lengths, _, _) in enumerate(updates) if i % cycle >= cycle - quarter for n in lengths]
    ages = [age for _, found, _ in updates for age in found]
    return Result(
        name,
        round(bubble, 4),
        0.0 if reference is None else round(1 - bubble / reference, 3),
        sum(time.ticks for time in times),
        round(sum(time.dropped for time in times) / sum(time.busy for time in times), 3),
        round(sum(sum(lengths) for lengths, _, _ in updates) / whole, 3),
        round(statistics.fmean(ages), 2),
        max(ages),
        round(statistics.fmean(first), 1),
        round(statistics.fmean(last), 1),
        round(seconds, 3),
    )


def table(results: Sequence[Result]) -> str:
    """The results as aligned text."""
    lines = [
        f"{'schedule':10} {'bubble':>7} {'cut':>6} {'ticks':>7} {'dropped':>8} {'yield':>6} {'stale':>10} {'first':>7} "
        f"{'last':>7} {'seconds':>8}"
    ]
    for r in results:
        stale = f"{r.stale_mean:.2f} ≤ {r.stale_max}"
        lines.append(
            f"{r.schedule:10} {r.bubble:7.3f} {r.cut:6.0%} {r.ticks:7} {r.dropped:8.1%} {r.yielded:6.2f} {stale:>10} "
            f"{r.first:7.1f} {r.last:7.1f} {r.seconds:8.2f}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    numbers = {
        "threads": (1, "torch threads"),
        "batch": (32, "samples per update"),
        "slots": (32, "rows in flight"),
        "updates": (32, "updates"),
        "shortest": (12, "shortest response in tokens"),
        "longest": (400, "longest response in tokens"),
        "max-staleness": (4, "updates, of partial and drop"),
        "seed": (0, "of the lengths"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument("--oversubscribe", type=float, default=4.0, help="pool over batch (default 4)")
    parser.add_argument("--tail", type=float, default=1.0, help="Pareto shape; smaller is heavier (default 1)")
    args = parser.parse_args(argv)
    for name in ("threads", "batch", "slots", "updates", "shortest", "max_staleness"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.longest <= args.shortest:
        parser.error(f"--longest must exceed --shortest={args.shortest}")
    if not args.oversubscribe >= 1 or not args.tail > 0:
        parser.error("--oversubscribe must be at least 1 and --tail above 0")
    return args


def main(argv: list[str] | None = None) -> list[Result]:
    """Run all schedules, print the table, write the JSON."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    prompts = tail_prompts(args)
    model: Any = countdown_model(64, 2, FIRST + args.longest)
    generator = Generator(model, bare_tokenizer(), slots=args.slots)
    generator.generate(prompts[: args.batch], params(args), range(args.batch))  # warm-up
    pools = {
        "partial": Pool(args.oversubscribe, "partial", args.max_staleness),
        "drop": Pool(args.oversubscribe, "drop", args.max_staleness),
        "on-policy": Pool(args.oversubscribe, "drop", 0),
    }
    results: list[Result] = []
    for name in ("plain", *pools):
        began = time.perf_counter()
        updates = (
            plain(generator, prompts, args) if name == "plain" else sorted_by_end(generator, prompts, args, pools[name])
        )
        seconds = time.perf_counter() - began
        reference = results[0].bubble if results else None
        results.append(measure(name, updates, seconds, reference, args.oversubscribe))
        assert sum(sum(lengths) for lengths, _, _ in updates) == sum(prompt[0] - FIRST + 1 for prompt in prompts)
    lengths = sorted(prompt[0] - FIRST + 1 for prompt in prompts)
    print(
        f"{len(lengths)} samples in {args.updates} updates of {args.batch}, {args.slots} slots, pool of {args.oversubscribe:g} "
        f"updates; lengths: median {lengths[len(lengths) // 2]}, mean {statistics.fmean(lengths):.0f}, longest {lengths[-1]}"
    )
    print(table(results))
    write_results(args, results)
    return results


if __name__ == "__main__":
    main()
