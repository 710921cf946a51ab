"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and fails on spills or narrow loads.

    python -m distill.kernels.aot            # the whole table, under two minutes on two cores; exit status 1 on a failure
    python -m distill.kernels.aot sm_90      # one architecture

Registers and bandwidth are won or lost at compile time: a kernel that spills, or whose loads are 2 bytes wide, is several
times slower and no CPU test can see it. Checked for each kernel: no local memory (spills, stack), no barrier or shuffle in
a loop (but for the top-k), every global load and store in a loop at least 16 bytes wide, in the specialisation that a
launch for `VOCABULARIES` gets (integers divisible by 16 are marked so, as the launcher marks them). Registers and local
memory are read back from the compiled binary.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARIES = (128256, 151936, 152064, 32000)
ARCHITECTURES = (80, 90, 100)
_TOKENS = 8192  # only its divisibility matters
_THREADS_PER_SM = 2048
_REGISTERS_PER_SM = 65536


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel in one specialisation for one architecture."""

    name: str
    kernel: str  # "module:function"
    arch: int
    values: tuple[tuple[str, Any], ...]  # run-time arguments: pointer types as "*bf16", numbers as numbers
    constants: tuple[tuple[str, Any], ...]
    warps: int


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made of a job; `narrow` lists loop accesses under 16 bytes, `exchanges` counts loop barriers."""

    job: Job
    registers: int
    local_bytes: int
    shared_bytes: int
    loop_accesses: int
    narrow: tuple[str, ...]
    exchanges: int

    @property
    def ok(self) -> bool:
        alone = self.exchanges == 0 or self.job.kernel.endswith(":topk_kernel")  # top-k compares whole tiles by design
        return self.local_bytes == 0 and not self.narrow and self.loop_accesses > 0 and alone

    @property
    def warps_per_sm(self) -> int:
        blocks = _REGISTERS_PER_SM // (max(self.registers, 1) * 32 * self.job.warps)
        return min(blocks * self.job.warps, _THREADS_PER_SM // 32)


def jobs(architectures: tuple[int, ...]) -> Iterator[Job]:
    """Every job; vocabularies that specialise alike share one."""
    for arch in architectures:
        for divisible in sorted({v % 16 == 0 for v in VOCABULARIES}, reverse=True):
            vocabulary = next(v for v in VOCABULARIES if (v % 16 == 0) == divisible)
            yield from _dense_jobs(arch, vocabulary)
            yield from _other_jobs(arch, vocabulary)


def check(job: Job) -> Report:
    """Compiles a job and reads registers, local memory and access widths back."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # today's default, said aloud: triton 3.9 warns otherwise
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = job.kernel.split(":")
    kernel = getattr(__import__(f"{__package__}.{module}", fromlist=[function]), function)
    values, constants = dict(job.values), dict(job.constants)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values.get(name)
        signature[name] = "constexpr" if name in constants else _type_of(value)
        if name not in constants and (isinstance(value, str) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options={"num_warps": job.warps})
    registers, local, shared = _resources(compiled.asm["cubin"])
    accesses = list(_loop_accesses(compiled.asm["ptx"]))
    narrow = tuple(text for text, width in accesses if width < 16)
    exchanges = sum("bar.sync" in line or "shfl.sync" in line for line in _loop_lines(compiled.asm["ptx"]))
    return Report(job, registers, local, shared, len(accesses), narrow, exchanges)


def main(arguments: list[str]) -> int:
    """Prints the table; the exit status is 1 if any kernel failed."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("aot: unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    chosen = tuple(int(a.removeprefix("sm_")) for a in arguments) or ARCHITECTURES
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        reports = list(pool.map(check, list(jobs(chosen))))
    print(f"vocabularies {', '.join(map(str, VOCABULARIES))} (all launch the specialisation below)")
    print(
        f"{'kernel':42} {'arch':>6} {'warps':>5} {'regs':>4} {'warps/SM':>8} {'local B':>7} {'loop ld/st':>10}  verdict"
    )
    for r in reports:
        verdict = "ok" if r.ok else f"FAILED {'; '.join(r.narrow) or 'spills, barriers in a loop, or no loop'}"
        row = f"{r.job.name:42} {'sm_' + str(r.job.arch):>6} {r.job.warps:>5} {r.registers:>4} {r.warps_per_sm:>8}"
        print(f"{row} {r.local_bytes:>7} {r.loop_accesses:>10}  {verdict}")
    failed = sum(not r.ok for r in reports)
    print(f"{len(reports)} kernels, {failed} failed")
    return 1 if failed else 0


def _dense_jobs(arch: int, vocabulary: int) -> Iterator[Job]:
    from .kinds import KINDS

    for kind in KINDS:
        for dtype in ("bf16", "fp32"):
            yield _dense_job(arch, vocabulary, kind, dtype, "backward")
            yield _dense_job(arch, vocabulary, kind, dtype, "forward", stats=True)
        yield _dense_job(arch, vocabulary, kind, "bf16", "forward")
    for kind in ("forward_kl", "jsd"):
        for side in ("forward", "backward"):
            yield _dense_job(arch, vocabulary, kind, "bf16", side, stats=side == "forward", softcap=True, masked=True)
    yield _dense_job(arch, vocabulary, "jsd", "bf16", "terms")


def _dense_job(
    arch: int, vocabulary: int, kind: str, dtype: str, side: str, stats: bool = False, softcap: bool = False,
    masked: bool = False,
) -> Job:  # fmt: skip
    from .launch import launch_config

    config = launch_config(side == "backward", {"bf16": 2, "fp32": 4}[dtype])
    pointers = {"S": f"*{dtype}", "T": f"*{dtype}", "VALID": "*u8", "OUT": "*fp32" if side == "terms" else f"*{dtype}"}
    floats = dict.fromkeys(("c_s", "c_t", "s_scale", "s_cap", "t_scale", "t_cap", "mix", "slope"), 0.5)
    outputs = dict.fromkeys(("LOSS", "SAVED", "STATS", "GRAD"), "*fp32")
    strides = {f"{x}_stride_{axis}": vocabulary * (_TOKENS if axis == "b" else 1) for x in "sto" for axis in "bt"}
    numbers = {"count": _TOKENS, "steps": _TOKENS, "V": vocabulary, "segments": 10, "span": config.span}
    constants = {"KIND": kind, "HAS_VALID": masked, "S_CAPPED": softcap, "T_CAPPED": softcap, **config.tile()}
    if side == "forward":
        constants["WITH_STATS"] = stats
    name = f"{kind} {dtype} {side}" + " +stats" * stats + " +softcap" * softcap + " +mask" * masked
    values = pointers | outputs | strides | numbers | floats
    return Job(
        name, f"triton_kernels:{side}_kernel", arch, tuple(values.items()), tuple(constants.items()), config.warps
    )


def _other_jobs(arch: int, vocabulary: int) -> Iterator[Job]:
    from .launch import TOPK_BLOCK, launch_config

    strides = {"stride_b": vocabulary * _TOKENS, "stride_t": vocabulary}
    numbers = {"steps": _TOKENS, "V": vocabulary, "k": 20, **strides}
    pointers = {"X": "*bf16", "VALID": "*u8", "VALUES": "*fp32", "IDS": "*i64"}
    constants = {"HAS_VALID": False, "K": 32, "BLOCK": TOPK_BLOCK}
    values = tuple((pointers | numbers).items())
    yield Job("top-k bf16", "triton_row_kernels:topk_kernel", arch, values, tuple(constants.items()), 4)
    for backward in (False, True):
        config = launch_config(backward, 2)
        yield _token_job(arch, numbers, config, backward)


def _token_job(arch: int, numbers: dict[str, int], config: Any, backward: bool) -> Job:
    strides = {"o_stride_b": numbers["stride_b"], "o_stride_t": numbers["stride_t"], "count": _TOKENS}
    work = {"segments": 10, "span": config.span}
    pointers = {"X": "*bf16", "OUT": "*bf16", "VALID": "*u8", "SAVED": "*fp32", "STATS": "*fp32", "DENSE": "*fp32"}
    floats = dict.fromkeys(("c", "scale", "cap", "slope"), 0.5)
    constants = {"HAS_VALID": False, "CAPPED": False, **config.tile()}
    if not backward:
        constants["WITH_STATS"] = True
    name = "token log-probs bf16 " + ("backward" if backward else "forward +stats")
    kernel = "triton_row_kernels:" + ("dense_backward_kernel" if backward else "lse_kernel")
    values = pointers | numbers | strides | work | floats
    return Job(name, kernel, arch, tuple(values.items()), tuple(constants.items()), config.warps)


def _type_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    return "fp32"


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers per thread, bytes of local memory per thread, bytes of static shared memory) of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"]


def _loop_lines(ptx: str) -> Iterator[str]:
    """Every line between a label and a later jump back to it."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\$\w+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if jump and labels.get(jump.group(1), i) < i:
            inside.update(range(labels[jump.group(1)], i))
    return (lines[i] for i in sorted(inside))


def _loop_accesses(ptx: str) -> Iterator[tuple[str, int]]:
    """(instruction, bytes) of every global load and store in a loop."""
    for line in _loop_lines(ptx):
        access = re.search(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", line)
        if access:
            yield access.group(0), int(access.group(1) or 1) * int(access.group(2)) // 8


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
