"""Speed and peak memory of every divergence, beside its peers and the copy bandwidth of the device.

    python -m distill.kernels.bench                                # on a GPU: the whole sweep, from logits and fused-linear
    python -m distill.kernels.bench --device cpu                   # the torch path: speed, and fused-linear peak memory
    python -m distill.kernels.bench_step                           # a whole training step, see there
    python -m distill.kernels.bench --tokens 8192 --vocab 151936 --dtypes bf16 --kinds forward_kl jsd --what logits

One CSV row per measurement goes to `kernels/results/<device>.csv` (or `--out`), with device, versions and commit; a table is
printed. On CPU every row is measured in a process of its own, because resident memory is; `--threads` sets its threads.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .bench_cases import LINEAR_PROVIDERS, LOGIT_PROVIDERS, Case, available, build
from .bench_memory import peak_above

RESULTS = Path(__file__).parent / "results"
KINDS = ("forward_kl", "reverse_kl", "jsd")
_GPU: dict[str, list] = {
    "tokens": [1024, 4096, 8192, 16384],
    "vocab": [32000, 128256, 151936, 262144],
    "dtypes": ["bf16", "fp32"],
}
_CPU: dict[str, list] = {"tokens": [256], "vocab": [32000], "dtypes": ["fp32"]}
# The fused-linear sizes that the project promises something about: (tokens, vocabulary, hidden).
_LINEAR = {"cuda": [(8192, 128256, 4096), (4096, 151936, 1024)], "cpu": [(256, 151936, 256), (8192, 151936, 256)]}


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The sweep, peers included where they can run."""
    device = arguments.device
    defaults = _GPU if device == "cuda" else _CPU
    for dtype in arguments.dtypes or defaults["dtypes"] if "logits" in arguments.what else ():
        for vocab in arguments.vocab or defaults["vocab"]:
            for tokens in arguments.tokens or defaults["tokens"]:
                for kind in arguments.kinds:
                    yield from _logit_cases(kind, dtype, tokens, vocab, device, arguments.modes)
    if "linear" in arguments.what:
        sizes = _LINEAR[device]
        if arguments.hidden:
            sizes = [(n, v, h) for n in arguments.tokens for v in arguments.vocab for h in arguments.hidden]
        for tokens, vocab, hidden in sizes:
            for provider in LINEAR_PROVIDERS:
                if available(provider, device):
                    dtype = "bf16" if device == "cuda" else "fp32"
                    yield Case(provider, arguments.kinds[0], "full", dtype, tokens, vocab, hidden, device)


def measure(case: Case, repeats: int, threads: int) -> dict[str, object]:
    """Median, 20th and 80th percentile of the seconds of a step, and its peak memory above inputs and gradients."""
    if case.device == "cpu":
        torch.set_num_threads(threads)
        _load_libraries()
    needed = eager_bytes(case)
    if case.device == "cpu" and needed > 0.7 * _free_bytes():
        return asdict(case) | {"error": f"not run: needs about {needed / 2**30:.0f} GiB"}
    try:
        step = build(case)
        start = time.perf_counter()
        peak = peak_above(step, case.device)
        seconds = [time.perf_counter() - start]
        if repeats > 1 or case.device == "cuda":
            seconds = _timings(step, case.device, repeats)
    except torch.cuda.OutOfMemoryError:
        return asdict(case) | {"error": "out of memory"}
    low, middle, high = _percentiles(seconds)
    gigabytes = 0.0 if case.hidden else case.bytes_per_element() * case.tokens * case.vocab / middle / 1e9
    numbers = {"seconds": middle, "seconds_p20": low, "seconds_p80": high, "peak_bytes": peak, "gb_per_s": gigabytes}
    return asdict(case) | {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in numbers.items()}


def eager_bytes(case: Case) -> int:
    """What an eager step allocates: about six fp32 tensors `[N, V]` from logits, eight from hidden states; 0 for others."""
    return 4 * case.tokens * case.vocab * (8 if case.hidden else 6) if case.provider == "eager" else 0


def copy_bandwidth(device: str) -> float:
    """GB/s read plus written by copying 1 GiB (CPU: 256 MiB): the limit that the kernels are held against."""
    count = 2**28 if device == "cuda" else 2**26
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    seconds = _timings(lambda: target.copy_(source), device, 20)
    return 2 * 4 * count / statistics.median(seconds) / 1e9


def main(arguments: argparse.Namespace) -> None:
    """Runs the sweep; appends rows to the CSV as they come."""
    out = arguments.out or RESULTS / f"{slug(_device_name(arguments.device))}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    limit = copy_bandwidth(arguments.device)
    place = {"copy_gb_per_s": f"{limit:.4g}", "threads": arguments.threads if arguments.device == "cpu" else ""}
    place |= facts(arguments.device)
    print(f"{place['device_name']}: copy {limit:.0f} GB/s")
    for case in cases(arguments):
        row = _isolated(case, arguments) if arguments.device == "cpu" else measure(case, arguments.repeats, 0)
        _append(out, row | place)
        _print(row, limit)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    print(f"rows appended to {out}")


def _logit_cases(kind: str, dtype: str, tokens: int, vocab: int, device: str, modes: list[str]) -> Iterator[Case]:
    for provider in LOGIT_PROVIDERS:
        if not available(provider, device):
            continue
        for mode in modes:
            yield Case(provider, kind, mode, dtype, tokens, vocab, 0, device)
            if provider == "triton":
                yield Case(provider, kind, mode, dtype, tokens, vocab, 0, device, stats=True)


def _isolated(case: Case, arguments: argparse.Namespace) -> dict[str, object]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case, arguments.repeats, arguments.threads))


def _timings(step: object, device: str, repeats: int) -> list[float]:
    """Seconds of `repeats` steps after one (CUDA: three) that warm up; the L2 cache is flushed between CUDA steps."""
    assert callable(step)
    seconds = []
    if device == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return seconds
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    for i in range(repeats + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds


def _percentiles(seconds: list[float]) -> tuple[float, float, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def _load_libraries() -> None:
    """A tiny step first: shared libraries that load during a measurement would count as its memory."""
    build(Case("eager", "jsd", "full", "fp32", 4, 8, 4, "cpu"))()
    build(Case("recompute", "jsd", "full", "fp32", 4, 8, 4, "cpu"))()


def facts(device: str) -> dict[str, object]:
    """What every row says about where it was measured."""
    return {
        "device_name": _device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger": _version("liger-kernel"),
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m distill.kernels.{Path(sys.argv[0]).stem} " + " ".join(sys.argv[1:]),
    }


def _append(path: Path, row: dict[str, object]) -> None:
    fields = [
        *Case.__dataclass_fields__, "seconds", "seconds_p20", "seconds_p80", "peak_bytes", "gb_per_s", "copy_gb_per_s",
        "error", "device_name", "threads", "torch", "triton", "liger", "commit", "time", "command",
    ]  # fmt: skip
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _print(row: dict[str, object], limit: float) -> None:
    what = f"{row['provider']} {row['kind']} {row['mode']}{' +stats' if row['stats'] else ''} {row['dtype']}"
    size = f"N={row['tokens']} V={row['vocab']}" + (f" H={row['hidden']}" if row["hidden"] else "")
    if "error" in row:
        print(f"{what:42} {size:28} {row['error']}")
        return
    share = float(str(row["gb_per_s"])) / limit
    speed = f"{float(str(row['seconds'])) * 1e3:10.2f} ms" + (f"  {share:5.0%} of copy" if share else "")
    print(f"{what:42} {size:28} {speed}  peak {int(str(row['peak_bytes'])) / 2**20:9.0f} MiB", flush=True)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor() or 'CPU'}, {os.cpu_count()} cores"


def slug(name: object) -> str:
    """A file name from a device name."""
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def _free_bytes() -> int:
    pages = os.sysconf("SC_AVPHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m distill.kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="N, numbers of tokens")
    parser.add_argument("--vocab", type=int, nargs="+", help="V, vocabulary sizes")
    parser.add_argument("--hidden", type=int, nargs="+", help="H, hidden sizes of the fused-linear rows")
    parser.add_argument("--what", nargs="+", choices=("logits", "linear"), default=["logits", "linear"])
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="those that every peer knows")
    parser.add_argument("--modes", nargs="+", choices=("forward", "full"), default=["forward", "full"])
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help="timed steps after a first (default 20, on CPU 3); 1 on CPU times the first",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    arguments = parser.parse_args(argv)
    if arguments.hidden and not (arguments.tokens and arguments.vocab):
        parser.error("--hidden needs --tokens and --vocab")
    arguments.repeats = arguments.repeats or (20 if arguments.device == "cuda" else 3)
    return arguments


if __name__ == "__main__":
    main(_parse(sys.argv[1:]))
