"""What the teacher ranks serve: each teacher and the reference is a service, held by some of them.

Both ends make the same list from the configuration; what the models alone know (sizes, dtype, fingerprint) a holder says at
the start, as JSON in the job's store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.config import ModelSpec, RunConfig
from distill.methods import Method
from distill.teachers.routing import ranks_of_teachers
from distill.teachers.signals import Signal
from distill.teachers.sources import teacher_specs
from distill.teachers.wire import tensor_shapes, to_tensors

STATS_BYTES = 16  # before each answer to the first student: seconds at work and in all, two fp64
PRINT_BYTES = 16  # a fingerprint, two fp64


@dataclass(frozen=True)
class Service:
    """One model that is served. ``places`` are those at the bridge that score for it; the rest is known once it is loaded."""

    number: int
    name: str  # "teacher", "reference", or one of ``teacher.many``
    spec: ModelSpec
    places: tuple[int, ...]
    kind: str
    top_k: int
    wire: torch.dtype = torch.float32
    own: torch.dtype = torch.float32  # of its weights
    hidden_size: int = 0
    vocabulary: int = 0
    bias: bool = False  # of the head, like scale and softcap
    scale: float = 1.0
    softcap: float | None = None
    fingerprint: tuple[float, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, int | None]]:
        return tensor_shapes(self.kind, self.wire, self.hidden_size, self.vocabulary, self.top_k)

    @property
    def token_bytes(self) -> int:
        return sum(dtype.itemsize * (1 if columns is None else columns) for dtype, columns in self.shapes.values())

    def pack(self, signal: Signal) -> Tensor:
        """A signal's tensors end to end, as bytes."""
        tensors = to_tensors(signal, self.wire)
        return torch.cat([tensors[name].contiguous().reshape(-1).view(torch.uint8) for name in self.shapes])

    def unpack(self, data: Tensor, positions: int) -> dict[str, Tensor]:
        """What ``pack`` laid end to end for so many positions."""
        shapes = self.shapes
        sizes = [positions * dtype.itemsize * (1 if columns is None else columns) for dtype, columns in shapes.values()]
        found = {}
        for (name, (dtype, columns)), piece in zip(shapes.items(), data.split(sizes), strict=True):
            aligned = piece if piece.storage_offset() % dtype.itemsize == 0 else piece.clone()
            found[name] = aligned.view(dtype).view((positions,) if columns is None else (positions, columns))
        return found

    def without(self, ranks: Sequence[int], left: Sequence[int]) -> Service:
        """The same among those who are ``left`` of the bridge's ``ranks``."""
        kept = [left.index(ranks[place]) for place in self.places if ranks[place] in left]
        return replace(self, places=tuple(kept))


def list_services(config: RunConfig, method: Method, students: int, size: int) -> list[Service]:
    """The services of a job of ``size`` ranks, in the order of their numbers.

    With several teachers each has ranks of its own, as far as there are enough; every teacher rank holds the reference. A sharded
    model is asked at its first rank alone.
    """
    section, teachers = config.teacher, size - students
    specs = teacher_specs(config)
    holders = ranks_of_teachers(list(specs), teachers)
    everyone = tuple(range(students, size)) if section.shard == "none" else (students,)
    found = []
    if "teacher" in method.needs:
        for number, (name, spec) in enumerate(specs.items()):
            places = everyone if section.shard != "none" else tuple(students + index for index in holders[name])
            found.append(Service(number, name, spec, places, section.signal, section.top_k))
    if "reference" in method.needs and config.model.reference.path:
        found.append(Service(len(found), "reference", config.model.reference, everyone, section.signal, section.top_k))
    return found
