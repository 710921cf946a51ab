"""``teacher.shard``: one teacher over all teacher ranks, for a model larger than one device.

tensor   transformers' tensor parallelism: each rank holds a slice of every matrix and computes with it
zero3    DeepSpeed's ZeRO-3: each rank holds a part of every parameter, and all compute with it once it is gathered

All ranks read the same rows at the same time, in the default group of the teachers; the first of them is the one that students
ask, and it makes the signal. Under ``tensor`` a rank never holds more than its slices (and the head, whole); under ``zero3`` each
first has the whole model in host memory.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.assembly import frozen_model
from distill.config import ModelSpec, RunConfig
from distill.data.batch import TokenBatch
from distill.distributed import device, rank, world_size
from distill.engine import TORCH_DTYPES
from distill.errors import ModelError
from distill.models import causal_lm, freeze, load_model, load_outline, target_hidden
from distill.teachers.frozen import FrozenModel
from distill.teachers.signals import Head, head_of


def load_served(config: RunConfig, spec: ModelSpec, who: str) -> FrozenModel:
    """The model that this teacher rank serves, whole or as its part. Raises ModelError."""
    shard = config.teacher.shard
    if shard == "none":
        return FrozenModel(frozen_model(config, spec, who), who)
    if shard == "zero3":
        return Zero3Model(frozen_model(config, spec, who), who)
    from transformers.distributed import DistributedConfig

    _check_heads(spec, who)
    options = {"distributed_config": DistributedConfig(tp_size=world_size(), tp_plan="auto")}
    return ShardedModel(freeze(load_model(spec, who, TORCH_DTYPES[config.model.teacher_dtype], options)), who)


def _check_heads(spec: ModelSpec, who: str) -> None:
    outline = load_outline(spec, who).config.get_text_config()
    heads = getattr(outline, "num_key_value_heads", None) or outline.num_attention_heads
    if heads % world_size():
        raise ModelError(
            f"teacher.shard=tensor over {world_size()} ranks cannot divide the {heads} key-value heads of {spec.path}; set "
            "teacher.ranks to one of their divisors, or teacher.shard=zero3"
        )


class ShardedModel(FrozenModel):
    """A model of which this rank holds a part. Every teacher rank makes each call, with the same batch."""

    def __init__(self, model: nn.Module, who: str) -> None:
        super().__init__(model, who)
        own = head_of(causal_lm(model))
        bias = None if own.bias is None else self.whole(own.bias)
        self._head = Head(self.whole(own.weight), bias, own.scale, own.softcap)

    @property
    def head(self) -> Head:
        return self._head

    @torch.no_grad()
    def whole(self, part: Tensor) -> Tensor:
        """A parameter in full."""
        return part.full_tensor() if isinstance(part, DTensor) else part.detach()

    def fingerprint(self) -> list[float]:
        """As ``frozen.fingerprint`` of the whole model."""
        sums = [0.0, 0.0]
        for parameter in self.model.parameters():
            value = self.whole(parameter).double()
            sums = [sums[0] + float(value.sum()), sums[1] + float(value.abs().sum())]
        return sums

    def share(self, words: Tensor) -> Tensor:
        """The first teacher rank's ``words`` on all of them."""
        length = torch.tensor([len(words)], device=device())
        dist.broadcast(length, 0)
        shared = words.to(device()) if rank() == 0 else torch.empty(int(length), dtype=words.dtype, device=device())
        dist.broadcast(shared, 0)
        return shared


class Zero3Model(ShardedModel):
    """Parameters in parts, gathered by DeepSpeed around each layer."""

    def __init__(self, model: nn.Module, who: str) -> None:
        import deepspeed

        size = max(p.numel() for p in model.parameters())
        options = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": size}
        self._engine, *_ = deepspeed.initialize(
            model=_Body(model),
            config={
                "train_batch_size": world_size(),
                "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
                "zero_optimization": options,
                "steps_per_print": 1 << 60,
            },
            dist_init_required=False,
        )
        super().__init__(model, who)
        self._engine.eval()

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Tensor:
        self.check()
        return self._engine(batch)

    def whole(self, part: Tensor) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([part]):
            return part.detach().clone()


class _Body(nn.Module):
    """What ZeRO-3 sees as one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        return target_hidden(self.model, batch)
