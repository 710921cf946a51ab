"""``python -m distill.bench.training``: one on-policy distillation step, ours and TRL's, on the same models, prompts and threads.

    python -m distill.bench.training --peer-python .venv-peers/bin/python --json outputs/bench/training.json

Both train a tiny Qwen3-architecture student by reverse KL on its own samples from the same prompts, in fp32, one process, the same
number of threads. Runs alternate, so that a noisy machine is noisy for both; the figure is the ratio. Two cases: responses that
mostly run to the limit, and responses whose lengths differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.progress import console
from distill.runs import write_json

WARMUP = 3  # first steps of a run, not counted
CASES = {
    # vocabulary size decides how soon a random model says EOS
    "64 tokens, full length": {"symbols": 1000, "max_new_tokens": 64},
    "up to 128 tokens, mixed": {"symbols": 60, "max_new_tokens": 128},
    "up to 320 tokens, mixed": {"symbols": 200, "max_new_tokens": 320},
}


def make_models(folder: Path, symbols: int) -> dict[str, str]:
    """A random student (about 0.6 M parameters) and teacher (about 2 M) with one token per symbol."""
    import torch

    from distill.data import char_tokenizer
    from distill.models import build_model

    tokenizer = char_tokenizer("".join(chr(0x4E00 + i) for i in range(symbols)))
    paths = {}
    for number, (who, width) in enumerate((("student", 96), ("teacher", 192))):
        torch.manual_seed(number)
        init = {
            "model_type": "qwen3", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }  # fmt: skip
        paths[who] = str(folder / who)
        build_model(init, tokenizer, "sdpa").save_pretrained(paths[who])
        tokenizer.save_pretrained(paths[who])
    return paths


def prompts(symbols: int, count: int) -> list[str]:
    """Prompts of 8 to 31 symbols."""
    return ["".join(chr(0x4E00 + (7 * i + 13 * j) % symbols) for j in range(8 + i % 24)) for i in range(count)]


def run_ours(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run of ``distill train`` in a process of its own."""
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in job["prompts"]))
    overrides = [
        "model=hf", f"model.student.path={job['student']}", f"model.teacher.path={job['teacher']}", "method=on_policy",
        "model.teacher_dtype=float32", "data=jsonl", f"data.path={data}", f"data.test_path={data}", "train.max_length=384",
        f"train.steps={job['steps']}", f"train.batch_size={job['batch_size']}", f"train.micro_batch_size={job['batch_size']}",
        f"rollout.max_new_tokens={job['max_new_tokens']}", f"rollout.slots={job['batch_size']}", f"engine.lr={job['lr']}",
        "engine.schedule=constant", "checkpoint.every=100000", "run.tensorboard=false", f"run.dir={folder / 'run'}",
    ]  # fmt: skip
    program = (
        "import resource, sys, torch; torch.set_num_threads(int(sys.argv[1])); from distill.train import main;"
        "code = main(sys.argv[3:]);"
        "open(sys.argv[2], 'w').write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)); sys.exit(code)"
    )
    peak = folder / "peak"
    command = [sys.executable, "-c", program, str(job["threads"]), str(peak), *overrides]
    _run(command, folder / "log", job["threads"])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_s": [row["perf/step_s"] for row in rows],
        "tokens": [row["rollout/mean_length"] * job["batch_size"] for row in rows],
        "loss": [row["train/loss"] for row in rows],
        "peak_rss_bytes": int(peak.read_text()),
    }


def run_trl(job: dict[str, Any], folder: Path, python: str) -> dict[str, Any]:
    """The same job in TRL, in the peer's environment."""
    (folder / "job.json").write_text(json.dumps({**job, "folder": str(folder / "trl")}))
    program = Path(__file__).with_name("peers") / "trl_on_policy.py"
    _run([python, str(program), str(folder / "job.json"), str(folder / "result.json")], folder / "log", job["threads"])
    return dict(json.loads((folder / "result.json").read_text()))


def _run(command: list[str], log: Path, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode:
            raise SystemExit(f"error: {command[0]} failed:\n{log.read_text()[-2000:]}")


def tokens_per_second(result: dict[str, Any]) -> float:
    """Tokens over seconds of the steps of one run, warm-up left out."""
    return sum(result["tokens"][WARMUP:]) / sum(result["step_s"][WARMUP:])


def compare(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate the contestants ``--runs`` times; one row each."""
    folder = Path(options.folder) / case.replace(",", "").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    shape = CASES[case]
    job = {
        **make_models(folder, shape["symbols"]), "prompts": prompts(shape["symbols"], 512), "batch_size": options.batch_size,
        "max_new_tokens": shape["max_new_tokens"], "steps": options.steps, "threads": options.threads, "lr": 1e-4,
    }  # fmt: skip
    results: dict[str, list[dict[str, Any]]] = {"distill": [], "trl": []}
    for number in range(options.runs):
        for name in results:
            place = folder / f"{name}-{number}"
            place.mkdir(parents=True, exist_ok=True)
            result = run_ours(job, place) if name == "distill" else run_trl(job, place, options.peer_python)
            results[name].append(result)
            console.print(f"{case}: {name} run {number + 1}/{options.runs}: {tokens_per_second(result):,.0f} tokens/s")
    return [row(case, name, runs) for name, runs in results.items()]


def row(case: str, name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread over runs."""
    rates = [tokens_per_second(run) for run in runs]
    return {
        "case": case,
        "trainer": name,
        "tokens_per_s": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "step_s": statistics.median(s for run in runs for s in run["step_s"][WARMUP:]),
        "tokens_per_step": statistics.mean(t for run in runs for t in run["tokens"]),
        "peak_rss_MiB": statistics.median(run["peak_rss_bytes"] for run in runs) / 2**20,
        "first_loss": runs[0]["loss"][0],
        "versions": runs[0].get("versions", {}),
    }


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "trainer", "tokens/s", "spread", "step s", "tokens/step", "peak MiB", "ratio")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        for each in (ours, theirs):
            ratio = f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.2f}x" if each is ours else ""
            table.add_row(
                each["case"], each["trainer"], f"{each['tokens_per_s']:,.0f}", f"{each['low']:,.0f}–{each['high']:,.0f}",
                f"{each['step_s']:.3f}", f"{each['tokens_per_step']:,.0f}", f"{each['peak_rss_MiB']:,.0f}", ratio,
            )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="python of an environment that has trl")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", default="outputs/bench/training", help="models, logs and results of each run")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    rows = [entry for case in CASES for entry in compare(case, options)]
    console.print(show(rows))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.json), rows)


if __name__ == "__main__":
    main()
