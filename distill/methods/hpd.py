"""Hybrid policy distillation (HPD, arXiv 2604.20244): a reweighted likelihood that needs two teacher log-probabilities a
token.

With y the token of the text and ŷ a second token of the student, s, t = log q(y), log p(y) and ŝ, t̂ = log q(ŷ), log p(ŷ):

    k  = (t − s)·e^s          A  = k + 1[k > 0]·e^t + 1[k > 0 and k̂ < 0]·e^t      pull towards y (push away where t < s)
    k̂ = (t̂ − ŝ)·e^ŝ          Â  = k̂·1[k̂ < 0]                                     push away from ŷ where the student overrates it
    L  = Σ_t −sg(A)·s − sg(Â)·ŝ·1[y ≠ ŷ]

A, Â are constants of the step (sg: no gradient). ``second=sampled`` draws ŷ ~ q, one per position, as the authors'
off-policy code does; ``second=greedy`` takes the student's most probable token, as their on-policy recipe does
(``text=student``). q and p are normalised over the vocabulary that both know; a token outside it has loss 0.

Evidence: formula, masks and both choices of ŷ exact, from the authors' code; the paper's text was not read. That code
sets masked log-probabilities to 0 in place after A is computed from them; masked positions never get here. Its on-policy
recipe passes A and Â through PPO's clipped loss over several epochs; here there is one update per rollout, where clipping
never acts. Options: ``conf/method/hpd.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import one_of
from distill.kernels import token_logprobs
from distill.methods.base import Method, Source, Targets, TokenLosses
from distill.methods.parts import AnyTextSpec, row_chunks, shared_vocabulary


@dataclass(kw_only=True)
class HpdConfig(AnyTextSpec):
    name: str = "hpd"
    second: str = "sampled"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method.second", self.second, ("sampled", "greedy"))


class Hpd(Method):
    Config = HpdConfig

    def __init__(self, config: HpdConfig) -> None:
        self.config = config
        self.draws = config.second == "sampled"

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source(self.config.text)

    def token_losses(self, targets: Targets) -> TokenLosses:
        student, teacher = targets.student_logits, targets.teacher_logits
        assert teacher is not None
        shared = shared_vocabulary(student, teacher)
        student = student[:, :shared]
        return hpd_losses(student, teacher[:, :shared], targets.token_ids, self._second(student, targets))

    def _second(self, student: Tensor, targets: Targets) -> Tensor:
        if self.config.second == "greedy":
            return student.detach().argmax(-1)
        assert targets.draws is not None
        return draw_tokens(student, targets.draws)


def hpd_losses(student: Tensor, teacher: Tensor, token_ids: Tensor, second: Tensor) -> TokenLosses:
    """The loss of every position, for logits ``[T, V]`` over one vocabulary, text ids and second ids ``[T]``."""
    known = token_ids < student.shape[-1]
    same = token_ids == second
    # Ids must differ within a token; where ŷ = y the second term is 0 in any case.
    ids = torch.stack((token_ids.where(known, -1), second.where(known & ~same, -1)), -1)
    s, s_hat = token_logprobs(student, ids)[0].unbind(-1)
    t, t_hat = token_logprobs(teacher, ids)[0].detach().unbind(-1)
    now, now_hat = s.detach(), s_hat.detach()
    gain = (t - now) * now.exp()
    loss_hat = torch.where(same, gain, (t_hat - now_hat) * now_hat.exp())
    up, down = gain > 0, loss_hat < 0
    pull = gain + t.exp() * (up.float() + (up & down).float())
    push = torch.where(down & ~same, loss_hat, 0.0)
    stats = {
        "hpd_second_differs": (known & ~same).float(),
        "hpd_pull_negative": (known & (pull < 0)).float(),
        "hpd_push_active": (known & down & ~same).float(),
        "hpd_both": (known & up & down).float(),
        "student_logprob": now,
        "teacher_logprob": t,
    }
    return TokenLosses(-pull * s - push * s_hat, stats)  # an unknown token has s = t = 0, without gradient


@torch.no_grad()
def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One id ``[T]`` per row of logits ``[T, V]``, drawn from its softmax by inversion of ``uniform`` ``[T]`` in [0, 1)."""
    drawn = [torch.empty(0, dtype=torch.int64, device=logits.device)]
    for rows in row_chunks(*logits.shape):
        cumulative = logits[rows].float().softmax(-1).cumsum(-1, dtype=torch.float64)
        # The first id whose cumulative share lies above u: never one of probability 0.
        point = uniform[rows, None] * cumulative[:, -1:]
        drawn.append(torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp_max_(logits.shape[-1] - 1))
    return torch.cat(drawn)
