"""``python -m distill.bench.loss_path``: a training step from logits and from hidden states, time and peak memory side by side.

    python -m distill.bench.loss_path                                   # V = 151936, H = 256, 2048 tokens: minutes, and some 8 GiB
    python -m distill.bench.loss_path --vocabulary 4096 --tokens 256    # the same code in seconds

A small student and teacher with a real vocabulary, random weights, fp32: the head and the loss are nearly all of the step. Each
way runs in a process of its own, one after another; a step is the teacher's forward pass, the student's forward and backward
pass, and AdamW. ``logits`` is ``train.loss_path=logits``; ``forward`` is ``fused`` as the trainer runs it, the gradient formed with
the loss; ``recompute`` is the same with the logits formed again in the backward pass. Memory is what a step takes, gradients
included, above both models and the optimizer's state (resident memory, Linux; CUDA: the allocator's).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from distill.data.batch import TokenBatch
from distill.kernels.bench_memory import peak_above
from distill.loss_path import LOGITS, LossPath
from distill.methods.base import DivergenceSpec, StudentSignal, Targets
from distill.progress import console
from distill.runs import write_json
from distill.student_losses import StudentLosses
from distill.teachers.frozen import FrozenModel

WAYS = ("logits", "forward", "recompute")


def make_model(vocabulary: int, hidden: int, layers: int, length: int) -> Any:
    """A Qwen3-architecture model, head tied to the embedding, random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = max(1, hidden // 64)
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "head_dim": 64,
    }
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": length}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=True, **shape))


def make_batch(tokens: int, rows: int, vocabulary: int, device: str) -> TokenBatch:
    """Random text of ``rows`` equal rows, every position a target."""
    ids = torch.randint(vocabulary, (rows, tokens // rows))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(tokens // rows))
    following = torch.randint(vocabulary, (len(places),))
    positions = torch.arange(tokens // rows).expand(rows, -1)
    unknown = torch.full((len(places),), float("nan"))
    batch = TokenBatch(ids, positions, None, places, following, places[:, 0], unknown, [str(i) for i in range(rows)])
    return batch.to(torch.device(device))


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and the bytes that one takes at its peak."""
    torch.manual_seed(0)
    length = options.tokens // options.rows
    with torch.device(options.device):
        student = make_model(options.vocabulary, options.hidden, options.layers, length)
        teacher = FrozenModel(make_model(options.vocabulary, options.teacher_hidden, options.layers, length))
    batch = make_batch(options.tokens, options.rows, options.vocabulary, options.device)
    scales = torch.ones(len(batch.target_ids), device=options.device)
    spec = DivergenceSpec(kind=options.kind)
    module = StudentLosses(student, LOGITS if way == "logits" else LossPath(True, options.bytes, ""), None)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def score(signal: StudentSignal) -> Tensor:
        said = teacher.signal(batch, "logits" if way == "logits" else "hidden", 1)
        known = scales if way == "forward" else None
        return spec(Targets(signal, said, batch.target_ids, scales=known)).loss

    def step() -> None:
        (module(batch, score) * scales).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    step()  # the optimizer's state exists after this
    peak = peak_above(step, options.device)
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "peak_bytes": float(peak)}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    if options.only is not None:
        print(json.dumps(measure(options.only, options)))
        return 0
    table = Table(
        "way",
        "step",
        "peak above state",
        title=f"{options.tokens} tokens, V = {options.vocabulary}, H = {options.hidden}",
    )
    found: dict[str, dict[str, float]] = {}
    for way in options.ways:
        command = [sys.executable, "-W", "ignore", "-m", "distill.bench.loss_path", *arguments, "--only", way]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            print(
                f"{way}: exit status {run.returncode} (killed for memory, where it is -9)\n{run.stderr[-2000:]}",
                file=sys.stderr,
            )
            return 1
        found[way] = json.loads(run.stdout.splitlines()[-1])
        table.add_row(way, f"{found[way]['seconds']:.3f} s", f"{found[way]['peak_bytes'] / 2**20:,.0f} MiB")
        console.print(f"{way}: {found[way]}")
    console.print(table)
    if options.json:
        write_json(Path(options.json), {"options": vars(options), "threads": torch.get_num_threads(), "ways": found})
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.bench.loss_path", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256, help="of the student, a multiple of 64")
    parser.add_argument("--teacher-hidden", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="of either model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="that the tokens lie in")
    parser.add_argument("--bytes", type=int, default=256 * 2**20, help="train.loss_bytes")
    parser.add_argument("--kind", default="forward_kl", help="of divergence")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
