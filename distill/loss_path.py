"""Which way a run takes from the student's hidden states to token losses: ``train.loss_path``.

    logits   all logits of a micro-batch exist at once: T·V numbers, several times over. Any method can use them.
    fused    the loss is computed from hidden states and heads, a few tokens at a time (`distill.kernels`: `linear_divergence`,
             `LinearLogits`): what it takes follows from ``train.loss_bytes`` and the size of the head, not from T·V. For methods
             that compute divergences or log-probabilities of tokens (``Method.reads``), and any teacher but one of whole logits.
    auto     fused where that can be and the logits would be larger than ``train.loss_bytes``.

The choice follows from the configuration and the vocabulary alone, so that all ranks make the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from distill.config import RunConfig
from distill.distributed import device
from distill.errors import ConfigError
from distill.kernels.linear import default_budget
from distill.methods.base import Method
from distill.models import causal_lm


@dataclass(frozen=True, slots=True)
class LossPath:
    """``bytes`` of fp32 logits may be alive at a time on the fused path; ``why`` is for the run's first line."""

    fused: bool
    bytes: int
    why: str

    def __str__(self) -> str:
        return f"{'hidden states' if self.fused else 'logits'} ({self.why})"


LOGITS = LossPath(False, 0, "asked for")


def choose_loss_path(config: RunConfig, method: Method, student: nn.Module) -> LossPath:
    """The path of this run. Raises ConfigError where what is asked for cannot be, with what to do about it."""
    train, parts = config.train, config.engine.vocab_parallel
    allowed = train.loss_bytes or default_budget(device())
    if train.loss_path == "logits" and parts == 1:
        return LossPath(False, allowed, "asked for")
    obstacle = _obstacle(config, method, student) or (_obstacle_to_parts(config, method) if parts > 1 else None)
    if train.loss_path != "auto" or parts > 1:
        asked = f"engine.vocab_parallel={parts}" if parts > 1 else "train.loss_path=fused"
        if obstacle is not None:
            raise ConfigError(f"{asked} computes the loss from hidden states, and {obstacle}")
        return LossPath(True, allowed, asked)
    tokens = train.micro_batch_size * train.max_length
    size = 4 * tokens * len(causal_lm(student).get_output_embeddings().weight)
    why = f"up to {size / 2**20:,.3g} MiB of logits a micro-batch, train.loss_bytes {allowed / 2**20:,.3g} MiB"
    if size <= allowed or obstacle is None:
        return LossPath(size > allowed, allowed, why)
    return LossPath(False, allowed, f"{why}, but {obstacle}")


def _obstacle(config: RunConfig, method: Method, student: nn.Module) -> str | None:
    """Why this run's loss cannot be computed from hidden states, and what would change that."""
    head = causal_lm(student).get_output_embeddings()
    if "logits" in method.reads:
        return (
            f"method={config.method['name']} with these options reads the student's logits; choose train.loss_path=logits, or "
            "another method"
        )
    if method.needs and config.teacher.signal == "logits":
        return "teacher.signal=logits gives whole logits; set teacher.signal=hidden"
    if config.teacher.many and config.teacher.mixture == "mean" and config.teacher.signal == "hidden":
        return "the mean of several teachers is made of whole logits; set teacher.mixture=route"
    if type(head) is not nn.Linear:
        return (
            f"the student's head is no plain linear map ({type(head).__module__}.{type(head).__name__}); leave it out of "
            "model.lora.target_modules, or set train.loss_path=logits"
        )
    return None


def _obstacle_to_parts(config: RunConfig, method: Method) -> str | None:
    """The same for a head in parts, which only divergences of whole distributions are computed from."""
    if method.reads != {"divergence"} or "reference" in method.needs:
        return (
            f"method={config.method['name']} with these options needs more of the student than a divergence; choose another "
            "method, or engine.vocab_parallel=1"
        )
    if config.teacher.signal != "hidden":
        return f"teacher.signal={config.teacher.signal} says too little for that; set teacher.signal=hidden"
    if config.train.loss_path == "logits":
        return "train.loss_path=logits asks for logits that no rank has; set train.loss_path=auto"
    if config.teacher.many:  # a group's ranks would meet as often as each has teachers in its batch
        return "ranks of a group may have several teachers each; set one model.teacher.path in place of teacher.many"
    specs = [value for value in config.method.values() if isinstance(value, dict)]
    if any(spec.get("top_k") for spec in specs):
        return "top-k statistics are not computed across parts; set top_k=0 in the method's divergence"
    return None
