"""The training engine: DeepSpeed around the student, with what the trainer needs and nothing else.

    engine = TrainEngine(student, config.engine, config.train, path)
    losses = engine.token_losses(batch, lambda student: method.token_losses(Targets(student, …)))
    engine.backward(losses.loss.sum() * scale); engine.step()

ZeRO stages 0–3, fp32 and bf16 (fp32 master weights), AdamW, a learning-rate schedule from transformers. The student's weights
for rollouts, evaluation and export come from ``plain_student`` on every stage: the module itself where each rank holds all
parameters, a synchronised copy under ZeRO-3, and one that shares all but the vocabulary where that is split over ranks.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

if not torch.cuda.is_available():  # DeepSpeed chooses its accelerator when it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

from distill.config import EngineConfig, TrainSection
from distill.data.batch import TokenBatch
from distill.distributed import device, world_size
from distill.errors import ConfigError
from distill.loss_path import LOGITS, LossPath
from distill.methods.base import StudentSignal, TokenLosses
from distill.models import causal_lm, count_parameters
from distill.muon import Muon
from distill.student_losses import Score, StudentLosses
from distill.vocabulary.group import make_group
from distill.vocabulary.modules import SplitStudent
from distill.vocabulary.training import SplitTraining, check_split

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that torch 2.13 calls old; nothing a user could do about it.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
# DeepSpeed would compile a C++ all-reduce for inference at start-up on CPU; training never calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed imports its own Muon in the first step of every run, and with it the whole of torch's compiler: 2 s on each rank.
deepspeed.runtime.compiler.compile = lambda: lambda function: function

NO_CLIP = 1e30  # a threshold that is never reached: the norm is still measured
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TrainEngine:
    """A student in training on all ranks of the process group, which must exist already."""

    def __init__(self, student: nn.Module, config: EngineConfig, train: TrainSection, path: LossPath = LOGITS) -> None:
        self.config = config
        # Replicas come and go: the number of micro-batches is the trainer's to say, each time (`announce`).
        self.replicated = config.replicas.enabled
        self.accumulation = 1 if self.replicated else accumulation_steps(train, world_size())
        self._last = True
        if config.activation_checkpointing:
            causal_lm(student).gradient_checkpointing_enable()
        self.parameters = count_parameters(student)
        # A pristine structure for rollouts must be taken before ZeRO-3 replaces every parameter by its shard.
        self._blueprint = copy.deepcopy(student).eval() if config.zero_stage == 3 else None
        self._split = _split_vocabulary(student, config)
        optimizer = make_optimizer(student, config)
        scheduler = schedule(optimizer, config, train.steps)
        self.deepspeed: DeepSpeedEngine
        self.deepspeed, *_ = deepspeed.initialize(
            model=StudentLosses(student, path, self._split),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(config, train, self.accumulation, self.parameters),
            dist_init_required=False,
        )
        if config.dtype == "bfloat16" and config.zero_stage == 0:
            _undo_trial_step(self.deepspeed.optimizer, optimizer)
        if config.zero_stage == 3:
            self.deepspeed.module.register_head()
        self._split_training: SplitTraining | None = None
        if self._split is not None:
            self._split_training = SplitTraining(self._split, self.deepspeed, optimizer)
        self._unsharded_norm = 0.0
        # A helper script beside every checkpoint, written without any check for a full disk; `final/` makes it needless.
        self.deepspeed._copy_recovery_script = lambda _: None
        self.deepspeed.clip_fp32_gradients = self._clip_unsharded

    def _clip_unsharded(self) -> None:
        """What DeepSpeed does for ZeRO-0 in fp32, except that the norm is kept for the log."""
        if self._split_training is not None:
            self._unsharded_norm = self._split_training.clip(self.deepspeed.gradient_clipping())
            return
        norm = nn.utils.clip_grad_norm_(self.deepspeed.module.parameters(), self.deepspeed.gradient_clipping())
        self._unsharded_norm = float(norm)

    @property
    def student(self) -> nn.Module:
        """The Hugging Face (or peft) model inside; its parameters may be shards."""
        return self.deepspeed.module.model

    def token_losses(self, batch: TokenBatch, score: Score) -> TokenLosses:
        """What ``score`` makes of the student's signal at the batch's supervised positions, with gradient.

        ``score`` is called once, after the student's layers and where its head is at hand; see ``distill.student_losses``.
        """
        made: list[TokenLosses] = []

        def losses(student: StudentSignal) -> Tensor:
            made.append(score(student))
            return made[0].loss

        self.deepspeed.train()
        loss = self.deepspeed(batch, losses)
        return replace(made[0], loss=loss)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, one rank's share of the global sum, to this step's gradient.

        DeepSpeed averages over ranks and accumulation steps; the trainer has already normalised by the global token
        count, so both averages are undone here.
        """
        self.deepspeed.backward(loss * (world_size() * self.accumulation))

    def step(self) -> None:
        """Call once after every backward; the optimizer moves on the last of an accumulation cycle."""
        if self._last:
            self.deepspeed.step()

    def announce(self, last: bool) -> None:
        """Replicas: call before every forward; ``last`` says that the step's gradient is complete after its backward."""
        if self.replicated:
            self._last = last
            self.deepspeed.set_gradient_accumulation_boundary(last)

    def gradients(self) -> list[Tensor]:
        """This rank's part of the step's gradient, summed over the job's ranks: between the last backward and `step`.

        Whole under ZeRO-0, this rank's partitions else; ranks of the same number in jobs of the same size have the same
        part. What is written into the tensors is what the optimizer will see.
        """
        averaged = getattr(self.deepspeed.optimizer, "averaged_gradients", None)
        if averaged is None:
            return [p.grad for p in self.student.parameters() if p.grad is not None]
        return [gradient for group in sorted(averaged) for gradient in averaged[group]]

    def discard(self) -> None:
        """Forget the gradient of a step that will not be taken."""
        # The next pass is a step's first again.
        self.deepspeed.micro_steps -= self.deepspeed.micro_steps % self.accumulation
        self.deepspeed.module.zero_grad()
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "averaged_gradients"):
            optimizer.zero_grad()
            optimizer.micro_step_id = 0 if self.config.zero_stage == 3 else INITIAL_MICRO_STEP_ID
            for gathered in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
                for group in gathered:
                    gathered[group] = None

    @property
    def part(self) -> int | None:
        """Which part of the vocabulary this rank holds; None where it is not split."""
        return None if self._split is None else self._split.group.place

    def part_state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold of this rank's part of a split vocabulary; None where another rank says it, or nobody."""
        return None if self._split_training is None else self._split_training.state()

    def restore_part(self, state: dict[str, Any] | None) -> None:
        """Put back what `part_state` returned on the rank with this part. Raises CheckpointError for None and for another part."""
        assert self._split_training is not None
        self._split_training.restore(state)

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last optimizer step, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return self._unsharded_norm if norm is None else float(norm)

    @property
    def lr(self) -> float:
        return float(self.deepspeed.get_lr()[0])

    @contextmanager
    def plain_student(self) -> Iterator[PreTrainedModel]:
        """The student as an ordinary causal LM in evaluation mode, for ``no_grad`` use by every rank at once."""
        with self.whole_student() as student:
            yield causal_lm(student)

    @contextmanager
    def whole_student(self) -> Iterator[nn.Module]:
        """The student, peft wrapper included, with all its parameters on this rank and in evaluation mode."""
        if self._split is not None:
            with self._split.whole() as whole:
                yield whole
            return
        model = self.student if self._blueprint is None else self._synchronised_copy()
        training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(training)
            if self._blueprint is not None:
                self._blueprint.to("cpu")  # a whole model beside the shards, on the device only while it is used

    def _synchronised_copy(self) -> nn.Module:
        """Gather each sharded parameter in turn into a full copy; peak extra memory is one parameter."""
        assert self._blueprint is not None
        target = dict(self._blueprint.to(device()).named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in self.student.named_parameters(remove_duplicate=False):
                with deepspeed.zero.GatheredParameters([parameter]):
                    target[name].copy_(parameter)
        return self._blueprint


def _split_vocabulary(student: nn.Module, config: EngineConfig) -> SplitStudent | None:
    """Splits the student's vocabulary in place where ``engine.vocab_parallel`` asks for it. Raises ConfigError."""
    if config.vocab_parallel == 1:
        return None
    model = causal_lm(student)
    check_split(config, adapters=model is not student)
    return SplitStudent(model, make_group(config.vocab_parallel, len(model.get_output_embeddings().weight)))


def _undo_trial_step(wrapper: Any, optimizer: torch.optim.Optimizer) -> None:
    """Forget the optimizer step on zero gradients by which DeepSpeed's unsharded bf16 wrapper allocates its states.

    It would count as Adam's first (bias correction) and has already applied weight decay to the fp32 masters.
    """
    optimizer.state.clear()
    with torch.no_grad():
        for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def accumulation_steps(train: TrainSection, ranks: int) -> int:
    """Micro-batches per rank and optimizer step. Raises ConfigError where the batch cannot be divided."""
    per_step = ranks * train.micro_batch_size
    if train.batch_size % per_step:
        fitting = [m for m in range(1, train.batch_size + 1) if train.batch_size % (ranks * m) == 0]
        remedy = (
            f"set train.micro_batch_size to one of {fitting}"
            if fitting
            else f"make train.batch_size a multiple of {ranks}"
        )
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not divisible by {ranks} ranks × "
            f"train.micro_batch_size={train.micro_batch_size}; {remedy}"
        )
    return train.batch_size // per_step


def make_optimizer(model: nn.Module, config: EngineConfig) -> torch.optim.Optimizer:
    """The optimizer of ``engine.optimizer`` over the trainable parameters; weight decay on matrices only."""
    first, second = config.betas
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "muon":
        return Muon(groups, config.lr, (first, second), config.eps, config.muon_ratio)
    for group in groups:
        del group["matrix"]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as hidden matrices (``matrix=True``), embeddings and heads, and vectors (no decay)."""
    causal = causal_lm(model)
    ends = {id(causal.get_input_embeddings().weight), id(causal.get_output_embeddings().weight)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trainable if p.ndim == 2 and id(p) not in ends]
    outer = [p for p in trainable if p.ndim >= 2 and (p.ndim > 2 or id(p) in ends)]
    groups = [
        {"params": hidden, "weight_decay": weight_decay, "matrix": True},
        {"params": outer, "weight_decay": weight_decay, "matrix": False},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0, "matrix": False},
    ]
    return [group for group in groups if group["params"]]


def schedule(optimizer: torch.optim.Optimizer, config: EngineConfig, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule by its transformers name, over ``steps`` optimizer steps."""
    specific = {"min_lr_rate": config.min_lr} if config.schedule == "cosine_with_min_lr" else None
    return get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=round(config.warmup * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=specific,
    )


def deepspeed_config(config: EngineConfig, train: TrainSection, accumulation: int, parameters: int) -> dict[str, Any]:
    """What DeepSpeed is told. Buckets follow the model: its defaults would reserve 2 GiB for any model."""
    bucket = max(min(parameters, 50_000_000), 1024)
    return {
        "train_batch_size": train.batch_size
        if not config.replicas.enabled
        else train.micro_batch_size * accumulation * world_size(),
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip or NO_CLIP,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
