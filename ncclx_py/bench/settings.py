"""What a benchmark run measures: one value that the command line makes and every rank receives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "all_to_all_v", "broadcast", "reduce")
GROUP_BACKENDS = ("ncclx", "gloo", "nccl")
MPI_BACKENDS = ("openmpi", "openmpi-han")
DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int8", "uint8")
OPS = ("sum", "avg", "max", "min")


@dataclass(frozen=True)
class Settings:
    """`sizes` are bytes, `skew` the share of a host's rows on its heaviest rank, `timeout` seconds for one collective.

    `window` allocates the tensors of ncclx where its peers can read them. `tcp` measures a raw transfer beside.
    """

    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    backends: tuple[str, ...] = ("ncclx", "gloo")
    iters: int = 5
    warmup: int = 1
    check: bool = True
    dtype: str = "float32"
    op: str = "sum"
    root: int = 0
    skew: float = 0.8
    device: str = "cpu"
    window: bool = False
    tcp: bool = True
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("collective", self.collectives, COLLECTIVES),
            ("backend", self.backends, GROUP_BACKENDS + MPI_BACKENDS),
            ("dtype", (self.dtype,), DTYPES),
            ("op", (self.op,), OPS),
        ):
            for one in value:
                if one not in known:
                    raise ValueError(f"{name} {one!r} is none of {', '.join(known)}.")
        if self.iters < 1 or self.warmup < 0:
            raise ValueError(f"{self.iters} iterations, {self.warmup} for warming up: at least 1 and 0 are needed.")
        if not 0 < self.skew <= 1:
            raise ValueError(f"skew {self.skew} is the share of one rank: it lies above 0 and is at most 1.")
        if (
            self.op == "avg"
            and "gloo" in self.backends
            and {"all_reduce", "reduce_scatter", "reduce"} & {*self.collectives}
        ):
            raise ValueError("gloo has no avg: leave it out of --backends, or use --op sum.")
        if "nccl" in self.backends and self.device == "cpu":
            raise ValueError("nccl carries no CPU tensors: use --device cuda, or leave it out of --backends.")

    @property
    def group_backends(self) -> list[str]:
        return [backend for backend in self.backends if backend in GROUP_BACKENDS]

    @property
    def mpi_backends(self) -> list[str]:
        return [backend for backend in self.backends if backend in MPI_BACKENDS]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        fields: dict[str, Any] = {}
        for name, value in json.loads(text).items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return cls(**fields)


def sizes_between(begin: int, end: int, factor: float) -> tuple[int, ...]:
    """`begin`, `begin` · `factor`, … up to `end`, in bytes. Raises ValueError where that is no ascending series."""
    if not 1 <= begin <= end:
        raise ValueError(f"Sizes from {begin} to {end} bytes: begin with at least 1 and end no lower.")
    if factor <= 1:
        raise ValueError(f"-f {factor}: the factor between sizes is above 1.")
    sizes = [begin]
    while (following := max(round(sizes[-1] * factor), sizes[-1] + 1)) <= end:
        sizes.append(following)
    return tuple(sizes)
