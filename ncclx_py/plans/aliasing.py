"""Whether a plan stays right when the caller's `output` lies inside its `input`, or its `input` inside its `output`.

torch allows both in all_gather and reduce_scatter (FSDP gathers into the buffer that holds its own shard). A plan says
nothing about it: to the plan they are two buffers. `survives` looks for a step that would overwrite elements of `input`
that another step has yet to read.
"""

from __future__ import annotations

from ncclx_py.plans.plan import RankPlan, Span
from ncclx_py.plans.verify_order import completed_before


def survives(plan: RankPlan, shift: int) -> bool:
    """True when `plan` gives the same result where element i of `output` is element i + `shift` of `input`.

    A write of `output` is harmless when it copies elements onto themselves, or when every step that reads the same
    elements of `input` has completed before it starts.
    """
    before = completed_before(plan.steps)
    reads = [(index, step.src) for index, step in enumerate(plan.steps) if step.src and step.src.buffer == "input"]
    for index, step in enumerate(plan.steps):
        if step.dst is None or step.dst.buffer != "output":
            continue
        written = Span("input", step.dst.start + shift, step.dst.stop + shift)
        if step.op == "copy" and step.src == written:
            continue
        for reader, span in reads:
            meets = max(span.start, written.start) < min(span.stop, written.stop)
            same_element = reader == index and span == written
            if meets and not same_element and not before[index] >> reader & 1:
                return False
    return True
