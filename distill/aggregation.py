"""How the token losses of a step become one number: orthogonal to the method, always with statistics of the global batch.

    loss = Σ_i c_i · w_i · Σ_t ℓ_it        over the sequences i of all ranks and micro-batches, tokens t of each

w_i is the method's weight, L_i the number of supervised tokens, M the number of sequences with L_i > 0, C a constant:

| kind            | c_i                                | what it does                                                           |
|-----------------|------------------------------------|------------------------------------------------------------------------|
| `token_mean`    | 1 / Σ_j L_j                        | every token counts the same (DAPO); the default                        |
| `sequence_mean` | 1 / (M·L_i)                        | every sequence counts the same (GRPO)                                  |
| `constant`      | 1 / (M·C)                          | unbiased in length (Dr.GRPO, arXiv 2503.20783)                         |
| `delta_l`       | L_i^(−α) / Σ_j L_j^(−α) / C        | unbiased too: Σ_i c_i = 1/C as in `constant`, which is α = 0. With α = 1 |
|                 |                                    | it has the least variance if Var(g_i) ∝ L_i (ΔL, arXiv 2509.07558)     |

The paper uses α = 0.75 for mathematics and 1 for CountDown. Its scale M is read as a constant, not as a number of samples.
Means are not taken per rank and then averaged: that would weigh a token by how full its rank happens to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.config import AggregationSpec, RunConfig


@dataclass(frozen=True, slots=True)
class Scales:
    """``c_i = relative[i] / denominator``: apart, because a sum of losses is more exact than a sum of tiny shares."""

    relative: list[float]  # one per sequence of the global batch; 0 for a sequence without supervised tokens
    denominator: float  # 1.0 where there is no supervised token at all


def aggregation_scales(spec: AggregationSpec, lengths: Sequence[int], constant: float) -> Scales:
    """c_i for sequences of the global batch with ``lengths`` supervised tokens; ``constant`` is C in tokens."""
    count = sum(length > 0 for length in lengths)
    if not count:
        return Scales([0.0] * len(lengths), 1.0)
    if spec.kind == "token_mean":
        return Scales([float(length > 0) for length in lengths], float(sum(lengths)))
    if spec.kind == "sequence_mean":
        return Scales([1.0 / length if length else 0.0 for length in lengths], float(count))
    alpha = spec.alpha if spec.kind == "delta_l" else 0.0
    mean = sum(lengths) / count
    powers = [(length / mean) ** -alpha if length else 0.0 for length in lengths]  # of L/L̄: no overflow at long lengths
    average = sum(powers) / count
    return Scales([power / average for power in powers], count * constant)


def tokens_per_sequence(config: RunConfig) -> float:
    """C: ``train.aggregation.constant``, else the longest response that may be generated (as in Dr.GRPO)."""
    return config.train.aggregation.constant or float(config.rollout.max_new_tokens)
