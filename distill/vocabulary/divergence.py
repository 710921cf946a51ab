"""The divergence of a student whose head is split by vocabulary: losses and gradients of each rank's own tokens.

With h_i the hidden states of rank i's tokens and W_r rank r's rows of the head, every rank r of a group

    gathers h = (h_1 … h_P), student's and teacher's,      forms h·W_rᵀ, a few rows at a time (a byte budget),
    compares them over the group (`vocab_parallel_divergence`: ten numbers per token travel, never a logit),
    and keeps of the gradient  Σ_tokens ∂W_r  and its share of ∂h, which is summed to the owners of the tokens.

The gradient is formed in the forward pass, for the factors by which the trainer will multiply the losses; the backward pass only
scales it, and gathers what arrives at all ranks' losses to check that (a rank without tokens has a part of the head, too).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.kernels import LinearLogits, gemm, vocab_parallel_divergence
from distill.kernels.kinds import DivergenceOutput
from distill.kernels.linear import default_budget
from distill.teachers.signals import Head, HiddenStates, SignalError
from distill.vocabulary.group import Rows, VocabularyGroup


@dataclass(frozen=True, slots=True)
class SplitStates:
    """Final hidden states ``[T, H]`` of this rank's tokens, and its part of the head: what a split student gives a loss."""

    kind: ClassVar[str] = "hidden"
    hidden: Tensor
    head: Head
    group: VocabularyGroup
    budget: int | None = None  # bytes of fp32 logits alive at a time; None: the kernels' default

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self) -> Tensor:
        raise self._lack()

    def operand(self) -> tuple[Tensor | LinearLogits, dict[str, Any]]:
        raise self._lack()

    def _lack(self) -> SignalError:
        return SignalError(
            "the student's vocabulary is split over ranks (engine.vocab_parallel), so that no rank has its logits; use a method "
            "whose loss is a divergence, with teacher.signal=hidden, or engine.vocab_parallel=1"
        )


def split_divergence(
    student: SplitStates,
    teacher: HiddenStates,
    token_ids: Tensor,
    factors: Tensor | None,
    options: Mapping[str, Any],
) -> DivergenceOutput:
    """As `linear_divergence` with statistics, of this rank's tokens. A collective call of the group.

    Args:
        teacher: hidden states of the same tokens and the whole head.
        token_ids: ``[T]``.
        factors: ``[T]`` that the losses will be multiplied by, up to one number for all ranks; None: ones.
        options: kind, temperature, beta, alpha, path.
    """
    names: list[str] = []
    call = _Call(student, teacher, token_ids, factors, options, names)
    loss, stats = _SplitDivergence.apply(student.hidden, student.head.weight, call)
    return DivergenceOutput(loss, {name: stats[i] for i, name in enumerate(names)})


@dataclass(frozen=True, slots=True)
class _Call:
    student: SplitStates
    teacher: HiddenStates
    token_ids: Tensor
    factors: Tensor | None
    options: Mapping[str, Any]
    names: list[str]  # of the statistics, filled by the forward pass


class _Gathered:
    """What the tokens of a whole group are: padded to equal numbers per rank."""

    def __init__(self, call: _Call) -> None:
        student, teacher = call.student, call.teacher
        self.rows = Rows.agreed(student.group, len(student), student.hidden.device)
        self.hidden = self.rows.gather(student.hidden.detach())
        self.teacher_hidden = self.rows.gather(teacher.hidden.detach().to(teacher.head.weight.dtype))
        self.token_ids = self.rows.gather(call.token_ids)
        self.valid = self.rows.valid(student.hidden.device)
        mine = torch.ones(len(student), device=student.hidden.device) if call.factors is None else call.factors
        self.factors = self.rows.gather(mine.float())


class _SplitDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        all_rows = _Gathered(call)
        part = _Part(call, len(all_rows.token_ids), any(ctx.needs_input_grad))
        for rows in part.chunks():
            part.compare(rows, all_rows)
        own = all_rows.rows.own
        ctx.rows, ctx.factors, ctx.dtypes = all_rows.rows, all_rows.factors, (hidden.dtype, weight.dtype)
        if part.learns:
            ctx.save_for_backward(all_rows.rows.sum_to_owners(part.hidden_gradient), part.head_gradient)
        stats = torch.stack(part.stats)[:, own] if part.stats else part.loss.new_zeros(0, len(hidden))
        call.names.extend(part.names)
        ctx.mark_non_differentiable(stats)
        return part.loss[own].clone(), stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        factor = _common_factor(ctx.rows.gather(grad_loss), ctx.factors)
        hidden_gradient, head_gradient = ctx.saved_tensors
        return (hidden_gradient * factor).to(ctx.dtypes[0]), (head_gradient * factor).to(ctx.dtypes[1]), None


class _Part:
    """This rank's part of the vocabulary against all of the group's tokens, chunk after chunk."""

    def __init__(self, call: _Call, count: int, learns: bool) -> None:
        student, teacher = call.student, call.teacher
        group, self.learns = student.group, learns
        shared = min(group.vocabulary, len(teacher.head.weight))
        ids = slice(group.start, group.start + group.valid(shared))
        self.call, self.count, self.start = call, count, group.start
        self.weight = student.head.weight.detach()[: group.valid(shared)]
        self.teacher_weight = teacher.head.weight.detach()[ids]
        self.teacher_bias = None if teacher.head.bias is None else teacher.head.bias.detach()[ids]
        self.loss = self.weight.new_zeros(count, dtype=torch.float32)
        self.names: list[str] = []
        self.stats: list[Tensor] = []
        if learns:
            self.hidden_gradient = self.weight.new_zeros(count, self.weight.shape[1], dtype=torch.float32)
            self.head_gradient = torch.zeros(student.head.weight.shape, device=self.weight.device)

    def chunks(self) -> list[slice]:
        """As many rows at a time as the byte budget allows, the same on all ranks."""
        budget = self.call.student.budget or default_budget(self.weight.device)
        step = max(1, budget // (2 * self.call.student.group.rows * 4))
        return [slice(low, min(low + step, self.count)) for low in range(0, self.count, step)]

    def compare(self, rows: slice, tokens: _Gathered) -> None:
        """Losses, statistics and gradients of a chunk of the group's tokens."""
        student, teacher = self.call.student.head, self.call.teacher.head
        hidden = tokens.hidden[rows]
        ours = gemm.logits(hidden, self.weight, None, torch.float32).requires_grad_(self.learns)
        theirs = gemm.logits(tokens.teacher_hidden[rows], self.teacher_weight, self.teacher_bias, torch.float32)
        with torch.enable_grad():
            output = vocab_parallel_divergence(
                ours,
                theirs,
                weights=tokens.valid[rows],
                stats=True,
                group=self.call.student.group.ranks,
                vocab_start=self.start,
                token_ids=tokens.token_ids[rows],
                student_scale=student.scale,
                teacher_scale=teacher.scale,
                student_softcap=student.softcap,
                teacher_softcap=teacher.softcap,
                **self.call.options,
            )
        self.loss[rows] = output.loss.detach()
        if not self.stats:
            self.names = list(output.stats)
            self.stats = [self.loss.new_zeros(self.count) for _ in self.names]
        for total, values in zip(self.stats, output.stats.values(), strict=True):
            total[rows] = values
        if self.learns:
            (gradient,) = torch.autograd.grad(output.loss, ours, tokens.factors[rows])
            self.hidden_gradient[rows] = gemm.hidden_gradient(gradient, self.weight)
            gemm.add_head_gradient(self.head_gradient[: len(self.weight)], gradient, hidden)


def _common_factor(grad_loss: Tensor, factors: Tensor) -> Tensor:
    """c of grad_loss = c·factors, over all of the group's tokens. Raises ValueError where there is none."""
    if not len(factors):
        return factors.new_zeros(())
    largest = factors.abs().argmax()
    factor = torch.where(factors[largest] == 0, 0.0, grad_loss[largest] / factors[largest])
    expected = factor * factors
    if not bool(((grad_loss - expected).abs() <= 8 * torch.finfo(expected.dtype).eps * expected.abs()).all()):
        raise ValueError(
            "the gradient that arrives at the losses of a student with a split vocabulary is no multiple of the factors that it "
            "was formed for (Targets.scales): the method changes the loss of single tokens"
        )
    return factor
