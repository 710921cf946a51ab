"""Every placement of a teacher as the contract's tests open it: one function each, from a teacher on disk to a ``Scorer``.

A new placement is one more function here; ``test_contract`` then asks of it what the trainer relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from distill.data.batch import TokenBatch
from distill.teachers.base import Scorer
from distill.teachers.colocated import Colocated
from distill.teachers.frozen import FrozenModel


@dataclass(frozen=True)
class Case:
    """A teacher, and what is asked of it."""

    teacher: Path  # a folder with a model (no tokenizer)
    kind: str
    top_k: int
    batches: Sequence[TokenBatch]  # all that will be asked
    folder: Path  # to write into


def teacher_of(case: Case) -> FrozenModel:
    """The teacher in process: what every placement is compared with."""
    return FrozenModel(AutoModelForCausalLM.from_pretrained(case.teacher))


@contextmanager
def colocated(case: Case) -> Iterator[Scorer]:
    scorer = Colocated(teacher_of(case), case.kind, case.top_k)
    yield scorer
    scorer.close()


@dataclass(frozen=True)
class Placement:
    open: Callable[[Case], AbstractContextManager[Scorer]]
    signals: tuple[str, ...] = ("logits", "hidden", "topk", "sampled")
    tolerance: float = 0.0  # of log-probabilities, logits and hidden states; say why where it is not 0


PLACEMENTS = {"colocated": Placement(colocated)}
