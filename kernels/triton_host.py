"""Host-side helpers of the Triton path: units, values at single ids, the current device."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def log2_factor(scale: float, softcap: float, temperature: float) -> float:
    """From values (raw logits, or softcapped ones, which hold their scale already) to log2 units."""
    return (1.0 if softcap else scale) / (temperature * math.log(2.0))


def at_ids(
    logits: Tensor, ids: Tensor, valid: Tensor | None, norms: Tensor, scale: float, softcap: float, temperature: float
) -> Tensor:
    """Log-probabilities `[N, K]` of logits `[B, T, V]` at `ids` `[N, K]`; norms `[N, 2]` = (m, log2 z) as the kernels save.

    0 for negative ids and tokens that are not valid, −inf beyond the vocabulary.
    """
    steps, width = logits.shape[1:]
    raw = logits.gather(-1, ids.clamp(0, width - 1).view(-1, steps, ids.shape[1])).view(ids.shape).float()
    values = raw if not softcap else softcap * torch.tanh(raw * (scale / softcap))
    log_probs = ((values - norms[:, :1]) * log2_factor(scale, softcap, temperature) - norms[:, 1:]) * math.log(2.0)
    log_probs = log_probs.masked_fill(ids >= width, -torch.inf).masked_fill(ids < 0, 0.0)
    return log_probs if valid is None else log_probs.masked_fill(~valid.unsqueeze(1), 0.0)


def transform(values: Tensor, scale: float, softcap: float, temperature: float) -> Tensor:
    """fp32 logits after scale, softcap and temperature, any shape."""
    scaled = values * scale if not softcap else softcap * torch.tanh(values * (scale / softcap))
    return scaled / temperature


def on(device: torch.device) -> Any:
    """Triton launches on the current device: make it the tensors' one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
