"""What a cache of teacher scores gives, against the teacher in process: ``python -m distill.bench.cache``.

    python -m distill.bench.cache --json cache.json                      # a teacher of 4 times the student's parameters
    python -m distill.bench.cache --signals hidden --steps 40 --threads 1

Student and teacher are random Qwen3 models on the embedded task, with a vocabulary of ``--vocabulary`` rows. Each signal's cache is
filled by ``distill rollout --save``; all its sequences are read in a random order, from the disk (what the kernel held of the files
is dropped first) and again from memory; then the same run is trained with the teacher in process and from the cache. Steps are
compared by their median.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from os import POSIX_FADV_DONTNEED, posix_fadvise
from pathlib import Path
from typing import Any

import torch

from distill.config import CommConfig, load_config
from distill.data import char_tokenizer
from distill.distributed import process_group
from distill.metrics import read_metrics
from distill.models import build_model, count_parameters
from distill.rollout import load_rollout_config, rollout
from distill.runs import write_json
from distill.teachers.cache.index import SHARDS
from distill.teachers.cache.reader import CacheReader
from distill.train import train

BATCH = 8  # sequences of one read


def make(folder: Path, hidden: int, layers: int, vocabulary: int, seed: int) -> int:
    """A random model in ``folder``; its parameters."""
    tokenizer = char_tokenizer("0123456789+-=\n#")
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "head_dim": 32}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "vocab_size": vocabulary}
    model = build_model({"model_type": "qwen3", "max_position_embeddings": 512, **shape, **heads}, tokenizer, "sdpa")
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return count_parameters(model)


def read_speed(folder: Path, cold: bool) -> dict[str, float]:
    """All sequences once, in a random order."""
    if cold:
        for shard in (folder / SHARDS).iterdir():
            with shard.open("rb") as file:
                posix_fadvise(file.fileno(), 0, 0, POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    reader = CacheReader(folder)
    opened = time.perf_counter()
    wanted = reader.entries()
    random.Random(1).shuffle(wanted)
    started = time.perf_counter()
    for start in range(0, len(wanted), BATCH):
        reader.read(wanted[start : start + BATCH])
    seconds = time.perf_counter() - started
    tokens = sum(count for _, count in wanted)
    reader.close()
    return {
        "tokens_per_s": tokens / seconds,
        "mb_per_s": tokens * reader.layout.token_bytes / seconds / 1e6,
        "open_s": opened - began,
    }


def steps(overrides: list[str]) -> float:
    """Median seconds of a step, the first three left out."""
    config = load_config("config", overrides)
    train(config)
    found = [step["perf/step_s"] for step in read_metrics(Path(config.run.dir) / "metrics.jsonl")]
    return statistics.median(found[3:])


def measure(root: Path, signal: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fill, read and train with one signal."""
    cache = root / f"cache_{signal}"
    shared = [
        f"train.max_length={options.length}",
        f"data.train_size={options.examples}",
        "method=off_policy",
        "data.min_terms=20",
    ]
    shared += [
        f"data.max_terms={options.terms}",
        f"teacher.signal={signal}",
        f"train.micro_batch_size={options.micro_batch}",
    ]
    teacher = [f"model.teacher.path={root}/teacher", "model.teacher_dtype=float32"]
    saving = [*shared, *teacher, f"teacher.cache={cache}", "rollout.examples=null", "rollout.save=true"]
    saved = rollout(*load_rollout_config(saving))["cache"]
    training = [
        *shared,
        "model=hf",
        f"model.student.path={root}/student",
        f"train.steps={options.steps}",
        "run.tensorboard=false",
    ]
    training += [f"train.batch_size={options.batch}", "checkpoint.every=1000000"]
    live = steps([*training, *teacher, f"run.dir={root}/live_{signal}"])
    cached = steps(
        [
            *training,
            "teacher=cache",
            f"teacher.signal={signal}",
            f"teacher.cache={cache}",
            f"run.dir={root}/cached_{signal}",
        ]
    )
    return {
        "bytes_per_token": saved["bytes_per_token"],
        "bytes_per_token_on_disk": saved["bytes_per_token_on_disk"],
        "tokens": saved["tokens"],
        "scored_tokens_per_s": saved["tokens_per_s"],
        "read_from_disk": read_speed(cache, cold=True),
        "read_from_memory": read_speed(cache, cold=False),
        "live_step_s": live,
        "cached_step_s": cached,
        "speed_up": live / cached,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.bench.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--signals", nargs="+", default=["hidden", "topk", "logits"], choices=["hidden", "topk", "logits"]
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--terms", type=int, default=40, help="of the longest problem")
    parser.add_argument("--length", type=int, default=400, help="train.max_length")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as name, process_group(CommConfig()):
        root = Path(name)
        student = make(root / "student", 128, 4, options.vocabulary, 1)
        teacher = make(root / "teacher", 256, 7, options.vocabulary, 2)
        figures: dict[str, Any] = {
            "student_parameters": student,
            "teacher_parameters": teacher,
            "ratio": teacher / student,
        }
        for signal in options.signals:
            figures[signal] = measure(root, signal, options)
    print(json.dumps(figures, indent=2))
    if options.json:
        write_json(Path(options.json), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
