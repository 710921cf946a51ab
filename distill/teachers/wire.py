"""A signal as plain tensors, for whatever sends it to another rank or keeps it in a file.

    wire = wire_dtype(config.teacher.wire, teacher_dtype)
    tensors = to_tensors(signal, wire)              # {"ids": [T, K] int32, "logprobs": [T, K] fp32}, …
    signal = from_tensors("topk", tensors, head)    # equal to dtype rounding; bit for bit where ``wire`` is the signal's own

The bytes of the tensors are ``signals.bytes_per_token`` times T: nothing travels beside them but their sizes and, once, the head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.teachers.signals import FullLogits, Head, HiddenStates, SampledToken, Signal, TopK

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def wire_dtype(name: str, own: torch.dtype) -> torch.dtype:
    """The dtype that ``teacher.wire=name`` means for a teacher whose weights are ``own``."""
    return own if name == "auto" else WIRE_DTYPES[name]


def tensor_shapes(kind: str, wire: torch.dtype, hidden_size: int, vocabulary: int, top_k: int) -> dict[str, tuple]:
    """Name → (dtype, columns) of each tensor of a signal; columns None: one value per position, ``[T]``."""
    if kind == "hidden":
        scale = {"scale": (torch.float32, None)} if wire.itemsize == 1 else {}
        return {"hidden": (wire, hidden_size), **scale}
    if kind == "logits":
        return {"logits": (wire, vocabulary)}
    if kind == "topk":
        columns = min(top_k, vocabulary)
        return {"ids": (torch.int32, columns), "logprobs": (torch.float32, columns)}
    return {"logprobs": (torch.float32, None)}


def to_tensors(signal: Signal, wire: torch.dtype) -> dict[str, Tensor]:
    """The tensors of ``tensor_shapes``, on the signal's device; hidden states and logits in ``wire``."""
    if isinstance(signal, HiddenStates):
        return _scaled(signal.hidden, wire) if wire.itemsize == 1 else {"hidden": signal.hidden.to(wire)}
    if isinstance(signal, FullLogits):
        return {"logits": signal.values.to(wire)}
    if isinstance(signal, TopK):
        return {"ids": signal.ids.int(), "logprobs": signal.logprobs.float()}
    assert isinstance(signal, SampledToken), "what several teachers say is sent and kept one by one"
    return {"logprobs": signal.logprobs.float()}


def from_tensors(kind: str, tensors: Mapping[str, Tensor], head: Head | None) -> Signal:
    """The signal that ``to_tensors`` took apart; ``head`` (its dtype is that of float8's values) for ``hidden`` only."""
    if kind == "hidden":
        assert head is not None
        hidden = tensors["hidden"]
        if hidden.dtype.itemsize == 1:
            hidden = (hidden.float() * tensors["scale"].unsqueeze(-1)).to(head.weight.dtype)
        return HiddenStates(hidden, head)
    if kind == "logits":
        return FullLogits(tensors["logits"])
    if kind == "topk":
        return TopK(tensors["ids"].long(), tensors["logprobs"])
    return SampledToken(tensors["logprobs"])


def _scaled(hidden: Tensor, wire: torch.dtype) -> dict[str, Tensor]:
    """Each row over its largest magnitude, so that float8's range is used whole; a row of zeros keeps the scale 1."""
    values = hidden.float()
    scale = values.abs().amax(-1) / torch.finfo(wire).max
    scale = torch.where(scale > 0, scale, 1.0)
    return {"hidden": (values / scale.unsqueeze(-1)).to(wire), "scale": scale}
