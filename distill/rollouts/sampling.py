"""Sampling parameters, counter-based randomness and the draw of one token per row.

A draw is a pure function of (logits, seed, position): the uniform number for the token at absolute position ``p``
of a row with seed ``s`` is a hash of ``(s, p)``, and the token is found by inverting the cumulative distribution.
Hence a sample does not depend on the batch it was drawn in, on the order of the rows or on the number of ranks, and
a resumed run needs no generator state. One limit remains: matrix products of another shape may round the last bit
of a logit differently, so a draw within about 1e-6 of a boundary between two tokens can land on the other side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_NUCLEUS = 64
"""Most likely tokens looked at before the whole vocabulary is sorted for top-p."""
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a response ends.

    The order is temperature, then ``top_k``, then ``top_p`` (on the renormalised top-k), as in Hugging Face. Exactly
    ``top_k`` tokens are kept even if several tie for the last place.

    Raises ``ValueError`` for a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 takes the most likely token (greedy); ``top_p`` and ``top_k`` then have no effect."""
    top_p: float = 1.0
    """Smallest set of most likely tokens with at least this probability; 1 keeps all."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Strings that end a response and stay in its text."""

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0.0 <= self.temperature < float("inf"), "0 (greedy) or a positive finite number"),
            "top_p": (0.0 < self.top_p <= 1.0, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (off) or positive"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a sequence of non-empty strings"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise ValueError(f"sampling: {name} must be {wanted}, not {getattr(self, name)!r}")
        object.__setattr__(self, "stop", tuple(self.stop))


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits with full avalanche."""
    bits = (bits ^ (bits >> _SHIFTS[0])) * _MIX[0]
    bits = (bits ^ (bits >> _SHIFTS[1])) * _MIX[1]
    return bits ^ (bits >> _SHIFTS[2])


def seed_keys(seeds: Sequence[int]) -> NDArray[np.uint64]:
    """Spread seeds (any Python ints, taken modulo 2^64) over 64 bits so that neighbouring seeds do not overlap."""
    return _mix(_mix(np.array([(seed + _GOLDEN) & _MASK64 for seed in seeds], dtype=np.uint64)))


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 52 random bits, a function of (key, position) alone; arguments broadcast.

    52 bits, not 53: then ``u * total < total`` holds after rounding, for every total.
    """
    counters = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mix(keys ^ _mix(counters)) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _invert(weights: Tensor, uniform: Tensor, mass: float | None = None) -> Tensor:
    """Column drawn per row from unnormalised ``weights`` [n, m].

    With ``mass``, the columns are descending probabilities and the draw is limited to the first ones that reach it.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if mass is not None:
        last = torch.searchsorted(cumulative, torch.full_like(total, mass)).clamp_max_(weights.shape[-1] - 1)
        total = cumulative.gather(1, last)
    # `right`: the first column whose sum exceeds the target, so a column of weight 0 is never drawn.
    column = torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True)
    return column.clamp_max_(weights.shape[-1] - 1)  # only NaN logits get this far; the caller reports them


def _nucleus(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Draw from the most likely tokens that reach ``top_p``; sorts the vocabulary only for rows with a wide nucleus."""
    kept, ids = probabilities.topk(min(_NUCLEUS, probabilities.shape[-1]), dim=-1)
    tokens = ids.gather(1, _invert(kept, uniform, top_p))
    wide = kept.sum(-1, dtype=torch.float64) < top_p
    if kept.shape[-1] < probabilities.shape[-1] and bool(wide.any()):
        rows = wide.nonzero().squeeze(1)
        kept, ids = probabilities[rows].sort(dim=-1, descending=True, stable=True)
        tokens[rows] = ids.gather(1, _invert(kept, uniform[rows], top_p))
    return tokens


def _sample(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    if params.temperature != 1.0:
        logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kept, ids = logits.topk(params.top_k, dim=-1)
        mass = params.top_p if params.top_p < 1.0 else None
        return ids.gather(1, _invert(kept.softmax(-1), uniform, mass))
    if params.top_p < 1.0:
        return _nucleus(logits.softmax(-1), uniform, params.top_p)
    return _invert(logits.softmax(-1), uniform)


def draw(logits: Tensor, params: SamplingParams, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per row of ``logits`` [n, V] (any float dtype) and its untempered log-probability.

    ``uniform`` [n] float64 in [0, 1) on the same device; not needed (``None``) when ``params.temperature`` is 0.
    Returns ``tokens`` [n] int64 and ``logprobs`` [n] float32.
    """
    logits = logits.float()
    if params.temperature == 0.0:
        tokens = logits.argmax(-1, keepdim=True)
    elif uniform is None:
        raise ValueError(f"sampling at temperature {params.temperature} needs one uniform number per row")
    else:
        tokens = _sample(logits, params, uniform)
    return tokens.squeeze(1), logits.log_softmax(-1).gather(1, tokens).squeeze(1)
