"""When a teacher steps in, and how far back: the formulas of MOTAB (arXiv 2605.19433, Eq. 5 to 9) on arrays.

    value     V_t = exp(1/L Σ_i log p_T(y_i | s_{t-1}, y_<i))          what the teacher thinks of step t        (Eq. 5)
    entropy   H(s) = −Σ_{i≤k} p̃_i log p̃_i, p̃ the renormalised top k   how open the next token is to the teacher  (Eq. 6)
    boundary  ε(s) = ε0 · exp(−θ · H(s))                                open states are judged more leniently     (Eq. 7)
    breach    V_t < ε(s_{t-1})
    drop      δ_k = V_k − V_{k−1};  t* = argmin δ_k where V_{k−1} ≥ ε_{k−1}                                       (Eq. 8, 9)

Steps of many trajectories come as one flat array of token log-probabilities and a count per step. Log-probabilities and
entropies are in nats. Everything is fp64, so that a verdict does not depend on the order of a sum.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

VALUES = ("geometric_mean", "minimum", "student_ratio")


def step_values(kind: str, teacher: Floats, student: Floats, counts: Ints) -> Floats:
    """What the teacher thinks of each step, [n]; a step without tokens has nothing to object to: 1.

    ``teacher`` and ``student`` [Σ counts] are the log-probabilities that either model gives to the steps' tokens.

    - ``geometric_mean``: of the teacher's token probabilities (Eq. 5), in [0, 1];
    - ``minimum``: the teacher's least likely token, in [0, 1]: one bad token in a long step is not averaged away;
    - ``student_ratio``: mean teacher probability over mean student probability (arithmetic means), in [0, ∞): the test of
      step-level speculative distillation (SKD).
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    some = np.maximum(counts, 1)
    if kind == "geometric_mean":
        return np.exp(np.bincount(owner, teacher, len(counts)) / some)
    if kind == "minimum":
        least = np.zeros(len(counts))
        np.minimum.at(least, owner, teacher)
        return np.exp(least)
    ours, theirs = (np.bincount(owner, np.exp(each), len(counts)) for each in (student, teacher))
    return np.divide(theirs, ours, out=np.ones(len(counts)), where=ours > 0)


def top_k_entropy(logits: Tensor, k: int) -> Floats:
    """Entropy [n] in nats of the ``k`` most likely tokens of ``logits`` [n, V], renormalised (Eq. 6); at most log k."""
    kept = logits.float().topk(min(k, logits.shape[-1]), dim=-1).values.double()
    logprobs = kept.log_softmax(-1)
    return -torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(-1).cpu().numpy()


def boundaries(entropy: Floats, epsilon: float, theta: float) -> Floats:
    """ε0 · exp(−θ · H) (Eq. 7)."""
    return epsilon * np.exp(-theta * entropy)


def breaches(kind: str, values: Floats, limits: Floats) -> NDArray[np.bool_]:
    """Which steps the teacher does not accept: V < ε, or V ≤ ε under ``student_ratio`` (SKD accepts only what lies above)."""
    return values <= limits if kind == "student_ratio" else values < limits


def steepest_drop(values: Floats, limits: Floats) -> int:
    """The step (from 0) to go back to, among those of one trajectory up to the breach (Eq. 9).

    A step is a candidate where the one before it was acceptable. While a student explores, all but the last were, so
    this is the steepest fall of V; records judged again with another boundary may have no candidate, and then it is the
    step of the lowest V. The earliest of equal ones. One step, or none: 0.
    """
    if len(values) <= 1:
        return 0
    drops = np.where(values[:-1] >= limits[:-1], np.diff(values), np.inf)
    return int(drops.argmin()) + 1 if np.isfinite(drops).any() else int(values.argmin())
