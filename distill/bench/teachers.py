"""``python -m distill.bench.teachers``: a teacher on ranks of its own against one beside the student, on one host and between two.

    python -m distill.bench.teachers --json outputs/bench/teachers.json               # both (emulated hosts need root)
    python -m distill.bench.teachers --rate none --json outputs/bench/teachers.json   # one host only

Teacher and student cost the same per batch: the teacher gets as many layers as make it so, which is measured first. Every rank has
one thread. The runs are ordinary ``distill train`` runs on fixed text:

    colocated        1 rank, teacher beside the student: the base line
    hidden, 1 host   1 student and 1 teacher rank, fp32 on the wire: its losses must be those of `colocated`, bit for bit
    hidden, 2 hosts  the same in bf16 between two emulated hosts
    logits, 2 hosts  whole logits in bf16: what hidden states spare

Samples per second are of the median step after warm-up. Bytes between the hosts are those that the student host's interfaces
received, less nothing: headers and the control of connections are in them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ncclx_py.launch.emulate import Cluster
from ncclx_py.launch.ranks import Outcome, Process, run_ranks
from rich.table import Table
from torch.nn import functional

from distill.data import char_tokenizer
from distill.local_ranks import environments
from distill.metrics import read_metrics
from distill.models import build_model
from distill.progress import console
from distill.runs import write_json

WARMUP = 3  # first steps of a run, not counted
TRIALS = 5  # of each measurement that sizes the teacher
TOKENS = 64  # of a sequence in these measurements
COUNTERS = "DISTILL_BENCH_COUNTERS"  # file that rank 0 writes what its interfaces have received into


def architecture(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    width = options.hidden
    return {
        "model_type": "qwen3", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "vocab_size": options.vocabulary,
    }  # fmt: skip


def make_model(options: argparse.Namespace, layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return build_model(architecture(options, layers), char_tokenizer("0123456789+-=\n#"), "sdpa")


def fitting_layers(options: argparse.Namespace) -> int:
    """How many layers make the teacher's forward pass as long as the student's forward, backward and update of one micro-batch."""
    ids = torch.randint(0, 16, (options.micro_batch, TOKENS))
    student = make_model(options, options.layers, 0)
    optimizer = torch.optim.AdamW(student.parameters())

    def learn() -> None:
        logits = student(input_ids=ids, use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    few, many = (make_model(options, layers, 1).eval() for layers in (2, 6))

    def score(teacher: Any) -> None:
        with torch.no_grad():
            teacher.model(input_ids=ids, use_cache=False)

    short, long = (seconds(lambda teacher=teacher: score(teacher)) for teacher in (few, many))
    layer = (long - short) / 4
    return max(1, round((seconds(learn) - (short - 2 * layer)) / layer))


def seconds(body: Any) -> float:
    """The median over trials, the first left out."""
    times = []
    for _ in range(TRIALS + 1):
        began = time.perf_counter()
        body()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def run(
    name: str, overrides: Sequence[str], options: argparse.Namespace, ranks: int, rate: str | None = None
) -> dict[str, Any]:
    """One run in processes of its own, on one host, or a rank each on hosts with links of ``rate``."""
    folder = Path(options.folder) / name.replace(",", "").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    common = [
        "model=hf", f"model.student.path={options.folder}/student", f"model.teacher.path={options.folder}/teacher",
        "model.teacher_dtype=float32", "method=off_policy", "data.min_terms=6", "data.max_terms=6", "train.max_length=128",
        f"train.steps={options.steps}", f"train.batch_size={2 * options.micro_batch}",
        f"train.micro_batch_size={options.micro_batch}", "checkpoint.every=100000", "run.tensorboard=false",
        "engine.schedule=constant", "engine.lr=1e-4", f"run.dir={folder / 'run'}",
    ]  # fmt: skip
    program = ["-m", "distill.bench.teachers", "--rank", *common, *overrides]
    lines: list[str] = []

    def show(rank: int, line: str, error: bool) -> None:
        lines.append(f"[{rank}] {line}")

    counters = folder / "counters.json"
    env = {"OMP_NUM_THREADS": "1", COUNTERS: str(counters), "TOKENIZERS_PARALLELISM": "false"}
    console.print(f"{name} …")
    if rate is None:
        outcome = _here(program, env, ranks, show)
    else:
        with Cluster([1] * ranks, rate) as cluster:
            outcome = cluster.run(program, env, show)
    if outcome.status:
        raise SystemExit(f"error: the run '{name}' failed:\n" + "\n".join(lines[-30:]))
    return _figures(name, options, read_metrics(folder / "run" / "metrics.jsonl"), counters)


def _here(program: list[str], env: dict[str, str], ranks: int, show: Any) -> Outcome:
    return run_ranks(
        [
            Process(rank, [sys.executable, *program], {**os.environ, **env, **numbers})
            for rank, numbers in enumerate(environments(ranks))
        ],
        show,
    )


def _figures(name: str, options: argparse.Namespace, rows: Sequence[dict[str, Any]], counters: Path) -> dict[str, Any]:
    timed = rows[WARMUP:-1]  # while the last step is trained nobody asks for more
    step_s = statistics.median(row["perf/step_s"] for row in timed)
    tokens, sent = (sum(row.get(key, 0.0) for row in rows) for key in ("train/tokens", "teacher/bytes"))
    received = int(counters.read_text())
    busy = statistics.mean(row["teacher/busy"] for row in timed) if "teacher/busy" in rows[0] else None
    return {
        "run": name,
        "samples_per_s": 2 * options.micro_batch / step_s,
        "step_s": step_s,
        "teacher_busy": busy,
        "student_wait_s": statistics.median(row.get("teacher/wait_s", 0.0) for row in timed),
        "tokens": tokens,
        "signal_bytes": sent,
        "bytes_per_token": sent / tokens,
        "between_hosts_bytes": received if "hosts" in name else None,
        "losses": [row["train/loss"] for row in rows],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what follows from them."""
    torch.set_num_threads(1)
    layers = options.teacher_layers or fitting_layers(options)
    for who, count, seed in (("student", options.layers, 0), ("teacher", layers, 1)):
        make_model(options, count, seed).save_pretrained(f"{options.folder}/{who}")
        char_tokenizer("0123456789+-=\n#").save_pretrained(f"{options.folder}/{who}")
    console.print(f"student: {options.layers} layers of {options.hidden}; teacher: {layers} layers, as long per batch")
    separate = ["teacher.placement=separate", "teacher.signal=hidden"]
    base = run("colocated", ["teacher.signal=hidden"], options, 1)
    one = run("hidden, 1 host", separate, options, 2)
    rows = [base, one]
    if options.rate != "none":
        wire = [*separate, "teacher.wire=bfloat16"]
        rows.append(run("hidden, 2 hosts", wire, options, 2, options.rate))
        rows.append(run("logits, 2 hosts", [*wire, "teacher.signal=logits"], options, 2, options.rate))
    for row in rows:
        row["gain"] = row["samples_per_s"] / base["samples_per_s"]
    found = {"teacher_layers": layers, "rows": rows, "losses_equal": one.pop("losses") == base.pop("losses")}
    for row in rows[2:]:
        row.pop("losses")
        row["over_arithmetic"] = row["between_hosts_bytes"] / row["signal_bytes"] - 1.0
    return {**found, "options": vars(options)}


def show(found: dict[str, Any]) -> Table:
    table = Table("run", "samples/s", "gain", "step s", "teacher busy", "wait s", "B/token", "between hosts")
    for row in found["rows"]:
        busy = row["teacher_busy"]
        over = (
            f"{row['between_hosts_bytes'] / 2**20:.2f} MiB ({row['over_arithmetic']:+.1%})"
            if "over_arithmetic" in row
            else ""
        )
        table.add_row(
            row["run"], f"{row['samples_per_s']:.1f}", f"{row['gain']:.2f}x", f"{row['step_s']:.3f}",
            "" if busy is None else f"{busy:.0%}", f"{row['student_wait_s']:.3f}", f"{row['bytes_per_token']:,.0f}", over,
        )  # fmt: skip
    return table


def interface_bytes() -> int:
    """What this host's interfaces have received, loopback left out."""
    lines = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line]
    return sum(int(values.split()[0]) for name, values in lines if name.strip() != "lo")


def train_counted(overrides: Sequence[str]) -> int:
    """``distill train`` on one rank; rank 0 writes what its host has received from the first step to the end."""
    from distill.train import main as train_main
    from distill.trainer import Trainer

    begun: list[int] = []
    step = Trainer.step

    def counted(trainer: Trainer) -> tuple[dict[str, float], list[str]]:
        if not begun:
            begun.append(interface_bytes())
        return step(trainer)

    Trainer.step = counted  # type: ignore[assignment]
    status = train_main(list(overrides))
    if os.environ["RANK"] == "0" and not status:
        Path(os.environ[COUNTERS]).write_text(str(interface_bytes() - begun[0]))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--rank"]:
        return train_counted(words[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of both models")
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--teacher-layers", type=int, help="instead of measuring how many are as long as the student")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences; a step has two of them")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rate", default="200mbit", help="of the link between emulated hosts; none: one host only")
    parser.add_argument("--folder", default="outputs/bench/teachers", help="models and runs")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    options = parser.parse_args(words)
    if options.steps < WARMUP + 3:
        parser.error(
            f"--steps={options.steps} leaves nothing to measure after {WARMUP} warm-up steps; use {WARMUP + 3} or more"
        )
    found = measure(options)
    console.print(show(found))
    console.print(f"losses of `hidden, 1 host` equal those of `colocated` bit for bit: {found['losses_equal']}")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.json), found)
    return 0 if found["losses_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
