"""What an optimizer step and a checkpoint need to know about a parameter that differs between ranks.

DeepSpeed takes every parameter for one that all ranks share. Of the split one (``SplitStudent.weight``) the engine says
otherwise: its gradient is summed over the ranks with the same part only, its norm over the parts counts into the global one, and
each part's weights and optimizer state have a file of their own in a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from distill.config import EngineConfig
from distill.errors import CheckpointError, ConfigError
from distill.vocabulary.modules import SplitStudent


def check_split(config: EngineConfig, adapters: bool) -> None:
    """Raises ConfigError for what a split vocabulary does not work with."""
    wrong = None
    if config.zero_stage != 0:
        wrong = f"engine.zero_stage={config.zero_stage}; set engine.zero_stage=0"
    elif config.replicas.enabled:
        wrong = "engine.replicas.enabled=true; run one job"
    elif config.optimizer != "adamw":
        wrong = f"engine.optimizer={config.optimizer}; set engine.optimizer=adamw"
    elif adapters:
        wrong = "model.lora.enabled=true, whose head is frozen and needs no splitting; set engine.vocab_parallel=1"
    if wrong is not None:
        raise ConfigError(f"engine.vocab_parallel={config.vocab_parallel} does not work with {wrong}")


class SplitTraining:
    """Teaches a DeepSpeed engine (ZeRO-0) about the split parameter of its module."""

    def __init__(self, student: SplitStudent, engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> None:
        self.student, self.engine, self.optimizer = student, engine, optimizer
        self.group = student.group
        engine.buffered_allreduce_fallback = self._reduce
        wrapper = engine.optimizer
        self._master: Tensor = student.weight
        if hasattr(wrapper, "fp32_groups"):  # bf16: DeepSpeed's wrapper with fp32 masters
            self._master = _master(wrapper, student.weight)
            self._adopt(wrapper)

    def _adopt(self, wrapper: Any) -> None:
        check, clip = wrapper.overflow_checker.check, wrapper.unscale_and_clip_grads
        wrapper.overflow_checker.has_moe_params = False

        def overflow_anywhere() -> bool:
            flag = torch.tensor([float(check())], device=self._master.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            return bool(flag)

        def clip_by_global_norm(norm: float, apply_scale: bool = True) -> float:
            wrapper._global_grad_norm = (norm**2 + float(self.squared_norm())) ** 0.5
            return float(clip(wrapper._global_grad_norm, apply_scale))

        wrapper.overflow_checker.check = overflow_anywhere
        wrapper.unscale_and_clip_grads = clip_by_global_norm

    def _reduce(self, grads: None = None, elements_per_buffer: int = 500_000_000) -> None:
        """In place of DeepSpeed's: means over all ranks, of the split parameter over those with the same part."""
        shared = []
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if parameter is not self.student.weight:
                    shared.append(parameter.grad.data)
        self.engine._reduce_non_expert_gradients(shared, elements_per_buffer)
        gradient = self.student.weight.grad
        assert gradient is not None
        gradient /= dist.get_world_size()
        if self.group.alike is not None:
            dist.all_reduce(gradient, group=self.group.alike)

    def squared_norm(self) -> Tensor:
        """Of the split parameter's whole gradient, after the reduction; the same on all ranks."""
        assert self.student.weight.grad is not None
        square = self.student.weight.grad.float().square().sum()
        dist.all_reduce(square, group=self.group.ranks)
        return square

    def clip(self, most: float) -> float:
        """Clips all gradients by their global norm, and returns that: fp32 under ZeRO-0, where DeepSpeed leaves it to us."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        shared = nn.utils.get_total_norm([p.grad for p in parameters if p is not self.student.weight])
        norm = (shared.square() + self.squared_norm()).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return float(norm)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold of this rank's part; None on ranks whose part another one saves."""
        if dist.get_rank() >= self.group.size:
            return None
        moments = dict(self.optimizer.state.get(self._master, {}))
        return {
            "place": self.group.place,
            "size": self.group.size,
            "vocabulary": self.group.vocabulary,
            "weight": self.student.weight.detach(),
            "master": self._master.detach(),
            "optimizer": moments,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Puts back what `state` returned on the rank with this part. Raises CheckpointError for another part, and for none."""
        needed = (self.group.place, self.group.size, self.group.vocabulary)
        found = None if state is None else (state["place"], state["size"], state["vocabulary"])
        if state is None or found != needed:
            raise CheckpointError(
                "this rank needs part {} of {} of a vocabulary of {} tokens, and the checkpoint holds {}; use the "
                "engine.vocab_parallel that it was written with".format(*needed, "none" if found is None else found)
            )
        with torch.no_grad():
            self._master.copy_(state["master"])
            self.student.weight.copy_(state["weight"])
        moments = self.optimizer.state[self._master]
        for name, value in state["optimizer"].items():
            moments[name] = value.to(moments[name].device) if name in moments else value


def _master(wrapper: Any, weight: nn.Parameter) -> Tensor:
    """The fp32 tensor that the optimizer moves for a bf16 parameter."""
    for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for master, candidate in zip(masters, weights, strict=True):
            if candidate is weight:
                return master
    raise AssertionError("the split parameter is not in the optimizer")
