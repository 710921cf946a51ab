"""What monitored rollouts cost beside the work that cannot be avoided.

    python -m distill.rollouts.bench_monitored --threads 1 --repeats 5 --json monitored.json

The unavoidable work, each part with full batches of the same models and measured apart:

    student   a plain rollout of exactly the tokens that the student wrote (continuous batching, no steps, no stops but the ends)
    reading   one prefill of prompts and these tokens through the teacher
    writing   the teacher's own tokens, decoded behind prefixes that are already in its cache

``ratio`` is the time of the monitored rollouts over the sum of the three. The models count down (see `distill.rollouts.bench`): all
weights do real work, lengths are what is asked for, and a teacher that skips a number now and then breaches exactly there.
Numbers divisible by ``--stride`` at random places end steps, so that steps have unequal lengths.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distill.rollouts.bench import FIRST, bench_parser, countdown_model, countdown_prompts, write_results
from distill.rollouts.flight import Flight
from distill.rollouts.generator import open_shared
from distill.rollouts.monitored import Monitored, MonitoredTrajectory, MonitorOptions
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.session import Session
from distill.seeds import mix

_ENDLESS = 1 << 20
_clock = time.perf_counter
Rows = list[list[int]]


@dataclass(frozen=True)
class Result:
    """One scenario: seconds of each part (medians) and the ratio, with its range over the repeats."""

    scenario: str
    prompts: int
    breach_rate: float
    student_tokens: int
    teacher_tokens: int
    steps: int
    monitored_s: float
    student_s: float
    reading_s: float
    writing_s: float
    ratio: float
    ratio_range: tuple[float, float]
    student_idle: float
    teacher_idle: float


def step_tokenizer(vocabulary: int, stride: int) -> PreTrainedTokenizerFast:
    """A word per id; about one in ``stride`` ends with ``.``, the step delimiter."""
    ends = {number for number in range(FIRST, vocabulary) if mix(number) % stride == 0}
    words = {f"<{n}>" if n < FIRST else f" w{n}{'.' if n in ends else ''}": n for n in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, "<1>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<0>", pad_token="<1>")


def skipping_teacher(args: argparse.Namespace) -> Any:
    """A countdown model that leaves out one number in ``--skips``, where the student therefore breaches."""
    model = countdown_model(args.teacher_hidden, args.teacher_layers, args.vocabulary, seed=1)
    with torch.no_grad():
        head = model.lm_head.weight
        for number in range(FIRST + 1, args.vocabulary - 1):
            if args.skips and mix(number, 7) % args.skips == 0:
                head[number - 1] += head[number]  # what asked for `number` now asks for the one below as well, and more
                head[number] = -head[number]
    return model


def plain(model: Any, rows: Rows, limits: list[int], slots: int) -> float:
    """Seconds to decode ``limits[i]`` tokens behind ``rows[i]``, new rows entering as others end."""
    began = _clock()
    session = Session(model, slots=min(slots, len(rows)))
    flight = Flight(session, SamplingParams(max_new_tokens=_ENDLESS, temperature=0.0), [])
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while waiting or flight:
        if waiting and (not flight or session.free * 8 >= session.slots):
            entering = [waiting.pop() for _ in range(min(session.free, len(waiting)))]
            opened = open_shared(session, [rows[i] for i in entering])
            flight.add(opened, [0] * len(opened), [limits[i] for i in entering])
        session.close([segment.row for segment in flight.step()])
    return _clock() - began


def reading(model: Any, rows: Rows, new: Rows, slots: int) -> float:
    """Seconds to read prompts and all new tokens, one prefill per batch of slots."""
    began = _clock()
    session = Session(model, slots=min(slots, len(rows)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + len(new[i]))
    for start in range(0, len(order), session.slots):
        part = order[start : start + session.slots]
        opened = open_shared(session, [rows[i] for i in part])
        logits = torch.cat(session.score(opened, [new[i][:-1] for i in part]))
        ids = torch.tensor([token for i in part for token in new[i]])
        (logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)).sum().item()
        session.close(opened)
    return _clock() - began


def writing(model: Any, rows: Rows, limits: list[int], slots: int) -> float:
    """Seconds to decode behind prefixes that are in the cache, the longest first, in full batches."""
    spent = 0.0
    order = sorted(range(len(rows)), key=lambda i: limits[i])
    for start in range(0, len(order), slots):
        part = order[start : start + slots]
        session = Session(model, slots=len(part))
        flight = Flight(session, SamplingParams(max_new_tokens=_ENDLESS, temperature=0.0), [])
        flight.add(open_shared(session, [rows[i] for i in part]), [0] * len(part), [limits[i] for i in part])
        began = _clock()
        while flight:
            flight.step()
        spent += _clock() - began
    return spent


def unavoidable(
    student: Any, teacher: Any, prompts: Rows, found: list[MonitoredTrajectory], slots: int
) -> tuple[float, float, float]:
    """Seconds of the three parts for exactly the tokens of these trajectories (none may have been rewound twice)."""
    explored = [[token for step in one.steps for token in step.ids] for one in found]
    wrote = [(i, one) for i, one in enumerate(found) if one.takeovers]
    prefixes, limits = [], []
    for i, one in wrote:
        assert one.accepted_ids is not None
        prefixes.append(prompts[i] + one.accepted_ids[: len(one.accepted_ids) - one.takeovers[0].tokens])
        limits.append(one.takeovers[0].tokens)
    return (
        plain(student, prompts, [len(ids) for ids in explored], slots),
        reading(teacher, prompts, explored, slots),
        writing(teacher, prefixes, limits, slots) if wrote else 0.0,
    )


def measure(scenario: str, options: MonitorOptions, prompts: Rows, args: argparse.Namespace) -> Result:
    """Monitored and unavoidable work alternate ``args.repeats`` times after one warm-up."""
    student = countdown_model(args.hidden, args.layers, args.vocabulary)
    teacher = skipping_teacher(args)
    engine = Monitored(
        student,
        teacher,
        step_tokenizer(args.vocabulary, args.stride),
        options,
        SamplingParams(max_new_tokens=2 * args.longest, temperature=0.0),
        slots=args.slots,
    )
    seeds = range(len(prompts))
    found = engine.generate(prompts, seeds)
    unavoidable(student, teacher, prompts, found, args.slots)
    times = []
    for _ in range(args.repeats):
        began = _clock()
        engine.generate(prompts, seeds)
        times.append((_clock() - began, *unavoidable(student, teacher, prompts, found, args.slots)))
    ratios = [whole / sum(parts) for whole, *parts in times]
    medians = [round(statistics.median(column), 4) for column in zip(*times)]
    usage = engine.usage
    return Result(
        scenario,
        len(prompts),
        round(sum(bool(one.takeovers) for one in found) / len(found), 3),
        usage.student_tokens,
        usage.teacher_tokens,
        sum(len(one.steps) for one in found),
        medians[0],
        medians[1],
        medians[2],
        medians[3],
        round(statistics.median(ratios), 3),
        (round(min(ratios), 3), round(max(ratios), 3)),
        round(usage.figures()["student_idle"], 3),
        round(usage.figures()["teacher_idle"], 3),
    )


def table(results: list[Result]) -> str:
    """The results as aligned text."""
    head = (
        "scenario",
        "breach",
        "steps",
        "stud tok",
        "teach tok",
        "monitored",
        "student",
        "reading",
        "writing",
        "ratio",
    )
    lines = [f"{head[0]:24} " + " ".join(f"{name:>9}" for name in head[1:]) + "  range"]
    for r in results:
        counts = f"{r.breach_rate:9.2f} {r.steps:9} {r.student_tokens:9} {r.teacher_tokens:9}"
        seconds = " ".join(f"{value:8.3f}s" for value in (r.monitored_s, r.student_s, r.reading_s, r.writing_s))
        lines.append(f"{r.scenario:24} {counts} {seconds} {r.ratio:9.2f}  {r.ratio_range[0]}–{r.ratio_range[1]}")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    numbers = {
        "threads": (1, "torch threads"),
        "repeats": (5, "timed runs per scenario"),
        "slots": (64, "rows in flight"),
        "prompts": (256, "trajectories"),
        "shortest": (16, "shortest countdown in tokens"),
        "longest": (256, "longest countdown in tokens"),
        "stride": (10, "mean tokens per step"),
        "skips": (150, "one number in so many is left out by the teacher; 0: none"),
        "hidden": (64, "hidden size of the student"),
        "layers": (2, "layers of the student"),
        "teacher-hidden": (128, "hidden size of the teacher"),
        "teacher-layers": (4, "layers of the teacher"),
        "vocabulary": (512, "vocabulary size"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor instead of wall-clock time: for a busy machine"
    )
    args = parser.parse_args(argv)
    if args.vocabulary < FIRST + args.longest:
        parser.error(f"--vocabulary must be at least {FIRST + args.longest} to count down from {args.longest}")
    return args


def main(argv: list[str] | None = None) -> list[Result]:
    """Run all scenarios, print the table, write the JSON."""
    args = parse(argv)
    global _clock
    _clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    prompts = countdown_prompts(args.prompts, (args.shortest, args.longest), args.vocabulary)
    results = [
        measure(
            "monitored, backtracking",
            MonitorOptions(epsilon=0.2, value="minimum", delimiters=["."], keep_flawed=False),
            prompts,
            args,
        ),
        measure("nothing breaches", MonitorOptions(epsilon=0.0, delimiters=["."], keep_flawed=False), prompts, args),
    ]
    print(f"{args.threads} thread(s), torch {torch.__version__}, median of {args.repeats}")
    print(table(results))
    write_results(args, results)
    return results


if __name__ == "__main__":
    main()
