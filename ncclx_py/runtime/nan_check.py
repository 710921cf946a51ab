"""``NCCLX_NAN_CHECK=1``: a NaN is stopped on the rank where it comes in, before a reduction spreads it to all ranks.

It costs one pass over every floating-point input (on CUDA a synchronisation, too), so it is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ncclx_py.errors import Call, CollectiveError, failure

_RECEIVING = ("recv", "recv_any_source", "scatter")  # what is given to these is overwritten


def wanted(env: Mapping[str, str]) -> bool:
    """Whether the environment asks for it. Raises ValueError for a value that is neither 0 nor 1."""
    value = env.get("NCCLX_NAN_CHECK", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"NCCLX_NAN_CHECK={value!r} is neither 0 nor 1.")
    return value == "1"


def check(call: Call, inputs: Any) -> None:
    """Raises CollectiveError where this rank gives a NaN to the collective; the call is marked in the trace."""
    if call.op in _RECEIVING or (call.op == "broadcast" and call.root != call.rank):
        return
    tensors = inputs if isinstance(inputs, list) else [inputs]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout is not torch.strided:
            continue
        bad = torch.isnan(tensor)
        if bad.any():
            call.nan = True
            place = int(bad.reshape(-1).nonzero()[0])
            raise failure(
                call,
                CollectiveError(
                    f"the input of rank {call.rank} holds a NaN at element {place} of {tensor.numel()} ({int(bad.sum())} in all). "
                    "Look at this rank's loss, gradients and data in this step (torch.autograd.set_detect_anomaly)."
                ),
            )
