"""Problems by size in bytes, as users, rules and tables speak of them."""

from __future__ import annotations

from ncclx_py.plans.plan import Collective, Problem


def payload(problem: Problem, itemsize: int) -> int:
    """The bytes of a problem, as in nccl-tests: the whole vector, or all blocks of one rank.

    For an all-to-all it is what the rank that sends most sends in all, its own block included.
    """
    if problem.collective == "all_to_all":
        return max((sum(row) for row in problem.matrix), default=0) * itemsize
    if problem.collective in ("reduce_scatter", "all_gather"):
        return sum(problem.counts) * itemsize
    return problem.count * itemsize


def uniform(collective: Collective, ranks: int, size: int, itemsize: int, root: int = 0) -> Problem:
    """The problem of `size` bytes with blocks as equal as they can be; a size that elements do not fill is rounded down."""
    elements = size // itemsize
    share = tuple(elements // ranks + (rank < elements % ranks) for rank in range(ranks))
    if collective == "all_to_all":
        return Problem(collective, ranks, matrix=(share,) * ranks)
    if collective in ("reduce_scatter", "all_gather"):
        return Problem(collective, ranks, counts=share)
    return Problem(collective, ranks, count=elements, root=root)
