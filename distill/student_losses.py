"""The student as DeepSpeed runs it: a forward pass that ends in token losses instead of logits.

The loss is computed inside the forward pass because that is where the head is: under ZeRO-3 its weight exists as a whole only
around the module that owns or registers it, in the forward and in the backward pass. A method gets the student as full logits, as
hidden states and the head (``train.loss_path=fused``: no logits of more than a few tokens), or as hidden states and a
part of the head (``engine.vocab_parallel``).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from distill.data.batch import TokenBatch
from distill.loss_path import LossPath
from distill.methods.base import StudentSignal, TokenLosses
from distill.models import causal_lm, final_logits, target_hidden
from distill.teachers.signals import FullLogits, HiddenStates, head_of
from distill.vocabulary.divergence import SplitStates
from distill.vocabulary.modules import SplitStudent

Score = Callable[[StudentSignal], TokenLosses]


class StudentLosses(nn.Module):
    """A causal LM, or a peft model around one, whose forward pass returns the loss of every supervised token."""

    def __init__(self, model: nn.Module, path: LossPath, split: SplitStudent | None) -> None:
        super().__init__()
        self.model = model
        self.at_head = _AtHead(model, path.bytes, split) if path.fused else None

    def forward(self, batch: TokenBatch, score: Callable[[StudentSignal], Tensor]) -> Tensor:
        """Losses ``[T]`` of the supervised positions: what ``score``, which is called once, makes of the student's signal."""
        hidden = target_hidden(self.model, batch)
        if self.at_head is not None:
            return self.at_head(hidden, score)
        return score(FullLogits(final_logits(causal_lm(self.model), hidden)))

    def register_head(self) -> None:
        """ZeRO-3: have the head whole around the loss, forwards and backwards. Call it once the parameters are sharded."""
        from deepspeed.runtime.zero.partition_parameters import register_external_parameter

        if self.at_head is not None:
            for parameter in causal_lm(self.model).get_output_embeddings().parameters():
                register_external_parameter(self.at_head, parameter)


class _AtHead(nn.Module):
    """From hidden states to losses. A module of its own, with no parameters: ZeRO-3 gathers what it registers around its calls."""

    def __init__(self, model: nn.Module, budget: int, split: SplitStudent | None) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: its parameters must not be found here a second time
        self._budget, self._split = budget, split

    def forward(self, hidden: Tensor, score: Callable[[StudentSignal], Tensor]) -> Tensor:
        if self._split is not None:
            return score(SplitStates(hidden, self._split.head(), self._split.group, self._budget))
        return score(HiddenStates(hidden, head_of(causal_lm(self._model[0])), self._budget))
