"""What several methods share: text of any writer, the shared vocabulary, sums over sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distill.config import one_of
from distill.errors import DataError

ANY_TEXT = ("reference", "teacher", "student")
ROW_BUDGET = 1 << 24  # elements of a [rows, V] temporary, for what no kernel computes


@dataclass(kw_only=True)
class AnyTextSpec:
    """Common option of methods whose loss is defined on anybody's text."""

    name: str
    text: str = "reference"

    def __post_init__(self) -> None:
        one_of("method.text", self.text, ANY_TEXT)


def shared_vocabulary(*logits: Tensor) -> int:
    """Ids that all of these ``[T, V_i]`` logits know; what lies above is padding of the larger ones."""
    return min(each.shape[-1] for each in logits)


def sums_per_sequence(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Each target's value ``[T]`` → the sum over its sequence ``[T]``; ``sequence_index`` ``[T]`` says which that is."""
    if not len(values):
        return values
    sums = values.new_zeros(int(sequence_index.max()) + 1).index_add_(0, sequence_index, values)
    return sums[sequence_index]


def row_chunks(rows: int, width: int) -> list[slice]:
    """Slices of rows whose ``[rows, width]`` temporaries stay under ROW_BUDGET elements."""
    size = max(1, ROW_BUDGET // max(width, 1))
    return [slice(start, start + size) for start in range(0, rows, size)]


def no_verdict(sample: int, method: str) -> DataError:
    """The error of a method that learns from verdicts, on data without answers. All ranks raise it together."""
    error = DataError(
        f"sample {sample} has no answer to check a rollout against, and method={method} learns from verdicts; "
        "use data with answers, or another method"
    )
    error.on_every_rank = True
    return error
