"""A model that scores and never learns: in evaluation mode, without gradients, its weights known by a fingerprint."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor, nn

from distill.data.batch import TokenBatch
from distill.errors import ModelError
from distill.models import causal_lm, target_hidden
from distill.teachers.signals import Head, Signal, head_of, signal_of


class FrozenModel:
    """A model, frozen; ``model`` may be a peft wrapper. ``who`` is its name in errors."""

    def __init__(self, model: nn.Module, who: str = "teacher") -> None:
        self.model, self.who = model.eval().requires_grad_(False), who

    @property
    def head(self) -> Head:
        """What reads its hidden states; the parameters themselves."""
        return head_of(causal_lm(self.model))

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Tensor:
        """Final hidden states ``[T, H]`` at the batch's supervised positions. Raises ModelError where somebody thawed the model."""
        self.check()
        return target_hidden(self.model, batch)

    def check(self) -> None:
        """Raises ModelError where somebody thawed the model."""
        if self.model.training or any(p.requires_grad for p in self.model.parameters()):
            state = "in training mode" if self.model.training else "given gradients"
            raise ModelError(
                f"the {self.who} was {state} after it had been frozen: its dropout or its weights would change what it says. "
                "Call eval() and requires_grad_(False) on it again, or give the run a model of its own"
            )

    def fingerprint(self) -> list[float]:
        """That of all its parameters as they are now."""
        return fingerprint(self.model)

    @torch.no_grad()
    def signal(self, batch: TokenBatch, kind: str, top_k: int) -> Signal:
        """The signal ``kind`` at the batch's supervised positions."""
        return signal_of(kind, self.head, self.hidden(batch), batch.target_ids, top_k)


def fingerprint(model: nn.Module, names: Iterable[str] | None = None) -> list[float]:
    """Two sums over the named parameters (None: all), fp64: different weights give different numbers, for practical purposes."""
    parameters = dict(model.named_parameters())
    values = [parameters[name].detach().double() for name in (parameters if names is None else names)]
    return [sum(float(v.sum()) for v in values), sum(float(v.abs().sum()) for v in values)]


def close(ours: list[float], theirs: list[float]) -> bool:
    """Whether two fingerprints agree to the rounding that another device may give them; those of NaN and infinity agree with
    each other, and are reported where they reach the loss."""
    if not all(map(isfinite, [*ours, *theirs])):
        return [isfinite(a) for a in ours] == [isfinite(b) for b in theirs]
    scale = max(ours[1], theirs[1], 1e-300)
    return all(abs(a - b) <= 1e-6 * scale for a, b in zip(ours, theirs, strict=True))
