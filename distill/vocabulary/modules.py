"""The split embedding and head, and how a causal LM gets them.

A tied pair is split as one parameter. Untied, the embedding stays whole on every rank. Both keep the names that the
parameters have in the whole model; their weights are left out of ``state_dict``, as they differ between ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from distill.errors import ConfigError
from distill.models import scale_and_cap
from distill.teachers.signals import Head
from distill.vocabulary.group import Rows, VocabularyGroup


class _Split(nn.Module):
    """Holds this rank's part of a weight ``[V, H]``."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: rank 0 writes the state of all ranks. See ``training``."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing."""


class SplitHead(_Split):
    """The head; ``forward`` is not for it: logits of the whole vocabulary exist on no rank."""

    def __init__(self, weight: nn.Parameter, group: VocabularyGroup) -> None:
        super().__init__(weight)
        self.group = group

    def forward(self, hidden: Tensor) -> Tensor:
        raise RuntimeError("the head of this student is split over ranks (engine.vocab_parallel): use plain_student()")


class SplitEmbedding(_Split):
    """Token embeddings: each rank looks up its rows for the whole group, and the sum goes back to who asked."""

    def __init__(self, weight: nn.Parameter, group: VocabularyGroup, padding: int | None) -> None:
        super().__init__(weight)
        self.group, self.padding = group, padding

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[…, H]`` of ids ``[…]``. A collective call; the numbers of ids may differ between ranks."""
        flat = input_ids.reshape(-1)
        rows = Rows.agreed(self.group, len(flat), flat.device)
        found: Tensor = _LookUp.apply(self.weight, rows.gather(flat), rows, self.group.start, self.padding)
        return found.view(*input_ids.shape, -1)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, rows: Rows, start: int, padding: int | None) -> Tensor:
        local = ids - start
        mine = (local >= 0) & (local < len(weight))
        ctx.rows, ctx.shape = rows, weight.shape
        # The whole model's embedding gives its padding token no gradient.
        ctx.learns = mine if padding is None else mine & (ids != padding)
        ctx.local = local.clamp(0, len(weight) - 1)
        found = functional.embedding(ctx.local, weight).masked_fill_(~mine.unsqueeze(-1), 0.0)
        return rows.sum_to_owners(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        all_grads = ctx.rows.gather(grad).masked_fill_(~ctx.learns.unsqueeze(-1), 0.0)
        total = grad.new_zeros(ctx.shape).index_add_(0, ctx.local, all_grads)
        return total, None, None, None, None


class SplitStudent:
    """A causal LM after its vocabulary has been split, and how to have it whole again for a while."""

    def __init__(self, model: PreTrainedModel, group: VocabularyGroup) -> None:
        """Replaces the head of ``model``, and the embedding where it is tied to it. Raises ConfigError where it cannot."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head.weight is embedding.weight
        _check(head, embedding, tied)
        self.group = group
        # Everything but the vocabulary is shared with the model in training.
        shared = {id(p): p for p in model.parameters() if p is not head.weight}
        self._whole = copy.deepcopy(model, shared).eval()
        self._whole_weight = self._whole.get_output_embeddings().weight
        self._whole_weight.data = head.weight.new_empty(0)
        self.weight = nn.Parameter(group.part(head.weight.detach()), requires_grad=head.weight.requires_grad)
        # DeepSpeed then neither broadcasts it nor counts it into the norm of what all ranks share.
        self.weight.ds_optim_param = True  # type: ignore[attr-defined]
        self.weight.allreduce = False  # type: ignore[attr-defined]
        self._scale, self._softcap = scale_and_cap(model)
        model.set_output_embeddings(SplitHead(self.weight, group))
        if isinstance(embedding, nn.Embedding) and tied:
            model.set_input_embeddings(SplitEmbedding(self.weight, group, embedding.padding_idx))

    def head(self) -> Head:
        """This rank's part."""
        return Head(self.weight, None, self._scale, self._softcap)

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The student with its whole vocabulary, in evaluation mode. Every rank of the group at once."""
        self._whole_weight.data = self.group.whole(self.weight.detach())
        try:
            yield self._whole
        finally:
            self._whole_weight.data = self.weight.detach().new_empty(0)


def _check(head: nn.Module, embedding: nn.Module, tied: bool) -> None:
    wrong = None
    if type(head) is not nn.Linear or head.bias is not None:
        wrong = f"its head is {'a linear map with a bias' if isinstance(head, nn.Linear) else type(head).__name__}"
    elif tied and type(embedding) is not nn.Embedding:
        wrong = f"its tied embedding is {type(embedding).__name__}"
    if wrong is not None:
        raise ConfigError(
            f"engine.vocab_parallel splits plain heads and embeddings, and of this student {wrong}; set it to 1"
        )
