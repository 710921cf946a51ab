"""The sections of a run's configuration: every key with its type, default and range. ``conf/`` explains them to a user."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.config.checks import in_range, one_of
from distill.config.teacher import TeacherSection
from distill.data import DataConfig
from distill.errors import ConfigError

DTYPES = ("float32", "bfloat16")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr")


@dataclass(kw_only=True)
class ModelSpec:
    """Where one model comes from: a folder or hub name (``path``), or an architecture to build (``init``)."""

    path: str | None = None
    init: dict[str, Any] | None = None
    tokenizer: str | None = None  # None: the one beside the model; "task": built from the data; or a path
    vocab_size: int = 1024  # of a tokenizer built from the data (byte-level BPE)
    attention: str = "sdpa"


@dataclass(kw_only=True)
class LoraSpec:
    """Low-rank adapters (peft) instead of full fine-tuning."""

    enabled: bool = False
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"


@dataclass(kw_only=True)
class ModelConfig:
    student: ModelSpec = field(default_factory=ModelSpec)
    teacher: ModelSpec = field(default_factory=ModelSpec)
    reference: ModelSpec = field(default_factory=ModelSpec)  # of methods that ask for one; no path: the initial student
    lora: LoraSpec = field(default_factory=LoraSpec)
    teacher_dtype: str = "float32"

    def __post_init__(self) -> None:
        one_of("model.teacher_dtype", self.teacher_dtype, DTYPES)


@dataclass(kw_only=True)
class ReplicasSpec:
    """Several jobs that train one model and may die: see ``distill.replicas`` and docs/elastic.md."""

    enabled: bool = False
    id: int = 0  # of this job, 0 … count−1
    count: int = 2  # jobs that are waited for at the start
    min: int = 1  # with fewer live replicas the run pauses
    store: str = "127.0.0.1:29400"  # HOST:PORT of `python -m ncclx_py.elastic.store`
    deadline_s: float = 30.0  # a replica that is silent, or keeps the others waiting, for so long is dropped
    gather_s: float = 300.0  # at the start, fewer than count (but at least min) begin after so long
    patience_s: float = 120.0  # for which the store may be away
    backend: str = "ncclx"  # between replicas
    schedule: str | None = None  # a store's journal: let those contribute to a step who did then (to check a run)

    def __post_init__(self) -> None:
        one_of("engine.replicas.backend", self.backend, ("ncclx", "gloo", "nccl"))
        in_range("engine.replicas.count", self.count, low=1)
        in_range("engine.replicas.id", self.id, low=0, high=self.count - 1)
        in_range("engine.replicas.min", self.min, low=1, high=self.count)
        in_range("engine.replicas.deadline_s", self.deadline_s, low=1.0)
        in_range("engine.replicas.gather_s", self.gather_s, low=0.0)
        in_range("engine.replicas.patience_s", self.patience_s, low=1.0)


@dataclass(kw_only=True)
class EngineConfig:
    """DeepSpeed and the optimizer."""

    zero_stage: int = 0
    dtype: str = "float32"
    optimizer: str = "adamw"
    muon_ratio: float = 10.0  # learning rate of hidden matrices over that of the rest, under muon
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: str = "cosine_with_min_lr"
    warmup: float = 0.05  # share of the steps
    min_lr: float = 0.1  # share of lr at the end of cosine_with_min_lr
    activation_checkpointing: bool = False
    vocab_parallel: int = 1  # ranks that share the student's head, each with a part of the vocabulary
    replicas: ReplicasSpec = field(default_factory=ReplicasSpec)

    def __post_init__(self) -> None:
        one_of("engine.zero_stage", self.zero_stage, (0, 1, 2, 3))
        one_of("engine.dtype", self.dtype, DTYPES)
        one_of("engine.schedule", self.schedule, SCHEDULES)
        one_of("engine.optimizer", self.optimizer, ("adamw", "muon"))
        if self.optimizer == "muon" and (self.zero_stage, self.dtype) != (0, "float32"):
            raise ConfigError(
                f"engine.optimizer=muon needs whole fp32 matrices on every rank, not engine.zero_stage={self.zero_stage} with "
                f"engine.dtype={self.dtype}; set engine.zero_stage=0 engine.dtype=float32, or engine.optimizer=adamw"
            )
        in_range("engine.lr", self.lr, low=0.0)
        in_range("engine.warmup", self.warmup, low=0.0, high=1.0)
        in_range("engine.min_lr", self.min_lr, low=0.0, high=1.0)
        in_range("engine.clip", self.clip, low=0.0)
        in_range("engine.vocab_parallel", self.vocab_parallel, low=1)


@dataclass(kw_only=True)
class CommConfig:
    backend: str = "ncclx"
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        one_of("comm.backend", self.backend, ("ncclx", "gloo", "nccl"))
        in_range("comm.timeout_s", self.timeout_s, low=1.0)


@dataclass(kw_only=True)
class ServerSpec:
    """One model's vLLM server: where it is, or how this run starts it."""

    url: str | None = None  # http://HOST:PORT of a server that runs already; None: the run starts one on this host
    arguments: list[str] = field(default_factory=list)  # further ones of a server that the run starts
    environment: list[str] = field(default_factory=list)  # variables of the same, as NAME=VALUE

    def __post_init__(self) -> None:
        for entry in self.environment:
            if "=" not in entry[1:]:
                raise ConfigError(f"rollout.vllm: '{entry}' in environment is not of the form NAME=VALUE")


@dataclass(kw_only=True)
class VllmSpec:
    """Servers of ``rollout=vllm``; see ``distill.rollouts.vllm``."""

    python: str | None = None  # interpreter of an environment with vLLM; None: this one
    start_s: float = 500.0  # for a server to be ready
    request_s: float = 600.0  # for one answer
    retry_s: float = 60.0  # for a server that does not answer to come back
    cached_scoring: bool = True  # see ``distill.rollouts.vllm.client``
    weights: str | None = None  # folder through which the student's weights reach its server; None: in run.dir
    student: ServerSpec = field(default_factory=ServerSpec)
    teacher: ServerSpec = field(default_factory=ServerSpec)

    def __post_init__(self) -> None:
        in_range("rollout.vllm.start_s", self.start_s, low=1.0)
        in_range("rollout.vllm.request_s", self.request_s, low=0.1)
        in_range("rollout.vllm.retry_s", self.retry_s, low=0.0)


@dataclass(kw_only=True)
class RolloutConfig:
    name: str = "builtin"
    slots: int = 64
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    vllm: VllmSpec = field(default_factory=VllmSpec)
    schedule: str = "plain"  # of training; see ``distill.rollouts.pool`` for what follows
    oversubscribe: float = 4.0
    unfinished: str = "partial"
    max_staleness: int = 4

    def __post_init__(self) -> None:
        one_of("rollout.name", self.name, ("builtin", "vllm"))
        in_range("rollout.slots", self.slots, low=1)
        in_range("rollout.max_new_tokens", self.max_new_tokens, low=1)
        in_range("rollout.temperature", self.temperature, low=0.0)
        in_range("rollout.top_p", self.top_p, low=1e-6, high=1.0)
        in_range("rollout.top_k", self.top_k, low=0)
        one_of("rollout.schedule", self.schedule, ("plain", "sorted"))
        in_range("rollout.oversubscribe", self.oversubscribe, low=1.0, high=1e6)
        one_of("rollout.unfinished", self.unfinished, ("drop", "partial"))
        in_range("rollout.max_staleness", self.max_staleness, low=0)
        if self.schedule == "sorted" and self.name != "builtin":
            raise ConfigError(
                f"rollout.schedule=sorted runs on rollout=builtin, not on rollout={self.name}; set rollout.schedule=plain"
            )
        if self.schedule == "sorted" and self.unfinished == "partial" and self.max_staleness == 0:
            raise ConfigError(
                "rollout.unfinished=partial keeps tokens for later updates and rollout.max_staleness=0 allows none; set "
                "rollout.max_staleness=1 or more, or rollout.unfinished=drop"
            )


@dataclass(kw_only=True)
class AggregationSpec:
    """How the token losses of a step become one number; see ``distill.aggregation``."""

    kind: str = "token_mean"
    alpha: float = 1.0  # delta_l: exponent of the length, 0 to 1
    constant: float | None = None  # constant, delta_l: tokens that a sequence counts for; None: rollout.max_new_tokens

    def __post_init__(self) -> None:
        one_of("train.aggregation.kind", self.kind, ("token_mean", "sequence_mean", "constant", "delta_l"))
        in_range("train.aggregation.alpha", self.alpha, low=0.0)
        if self.constant is not None:
            in_range("train.aggregation.constant", self.constant, low=1.0)


@dataclass(kw_only=True)
class TrainSection:
    """Steps and batches. ``batch_size`` counts sequences per optimizer step over all ranks."""

    steps: int = 200
    batch_size: int = 64
    micro_batch_size: int = 16
    max_length: int = 512  # tokens of prompt + response
    pack: bool = True
    log_every: int = 10
    stop_at: float | None = None  # end early once the in-training pass@1 reaches this
    token_budget: int | None = None  # end early once this many tokens are spent, see ``distill.token_counts``
    aggregation: AggregationSpec = field(default_factory=AggregationSpec)
    loss_path: str = "auto"  # see ``distill.loss_path``
    loss_bytes: int | None = None  # None: 2 GiB on a GPU, 256 MiB on CPU

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "max_length", "log_every"):
            in_range(f"train.{name}", getattr(self, name), low=1)
        if self.token_budget is not None:
            in_range("train.token_budget", self.token_budget, low=1)
        one_of("train.loss_path", self.loss_path, ("auto", "fused", "logits"))
        if self.loss_bytes is not None:
            in_range("train.loss_bytes", self.loss_bytes, low=1)


@dataclass(kw_only=True)
class EvalSection:
    """What is measured: ``examples`` test problems, greedy, and ``samples`` times at ``temperature``."""

    every: int = 0  # in training: every so many steps, and at the end (0: never)
    examples: int = 128
    samples: int = 0  # sampled responses per problem; 0: greedy only
    k: list[int] = field(default_factory=lambda: [1])
    temperature: float = 1.0
    top_p: float = 1.0
    kl_examples: int = 64  # held-out references for the KL to the teacher (0: skip)
    max_new_tokens: int | None = None  # None: rollout.max_new_tokens

    def __post_init__(self) -> None:
        in_range("eval.every", self.every, low=0)
        in_range("eval.examples", self.examples, low=1)
        in_range("eval.samples", self.samples, low=0)
        if self.samples and max(self.k, default=1) > self.samples:
            raise ConfigError(f"eval.k={self.k} needs at least {max(self.k)} samples; set eval.samples={max(self.k)}")


@dataclass(kw_only=True)
class CheckpointSection:
    every: int = 100  # steps; the last step is always saved
    keep: int = 2

    def __post_init__(self) -> None:
        in_range("checkpoint.every", self.every, low=1)
        in_range("checkpoint.keep", self.keep, low=1)


@dataclass(kw_only=True)
class RunSection:
    """Where the run lives and what to do with what is there already."""

    dir: str = "outputs/train"
    resume: str = "auto"  # auto: continue if there is something; never: refuse; must: refuse if there is not
    tensorboard: bool = True
    wandb: str | None = None  # project name

    def __post_init__(self) -> None:
        one_of("run.resume", self.resume, ("auto", "never", "must"))


@dataclass(kw_only=True)
class MonitorSection:
    """What is watched during training, and from where on it is alarming; see ``distill.monitors``."""

    epistemic_words: list[str] = field(default_factory=list)
    smoothing: float = 0.9  # of moving averages over steps
    baseline_steps: int = 20  # first steps whose mean is the baseline
    density_drop: float = 0.5  # share of the epistemic density lost …
    accuracy_drop: float = 0.02  # … while held-out pass@1 is this far below its best
    entropy_share: float = 0.1  # student entropy over the teacher's (without a teacher: over its baseline)
    length_growth: float = 2.0  # mean length of rollouts over its baseline
    same_divergence: float = 1e-6  # nats per token below which the teacher is taken for the student itself

    def __post_init__(self) -> None:
        in_range("monitor.smoothing", self.smoothing, low=0.0, high=0.999999)
        in_range("monitor.baseline_steps", self.baseline_steps, low=1)
        in_range("monitor.density_drop", self.density_drop, low=0.0, high=1.0)
        in_range("monitor.accuracy_drop", self.accuracy_drop, low=0.0, high=1.0)
        in_range("monitor.entropy_share", self.entropy_share, low=0.0)
        in_range("monitor.length_growth", self.length_growth, low=1.0)
        in_range("monitor.same_divergence", self.same_divergence, low=0.0)


@dataclass(kw_only=True)
class RunConfig:
    """One training or evaluation run, complete and checked."""

    seed: int
    model: ModelConfig
    data: DataConfig
    method: dict[str, Any]  # checked by distill.methods.build_method
    teacher: TeacherSection
    engine: EngineConfig
    comm: CommConfig
    rollout: RolloutConfig
    train: TrainSection
    eval: EvalSection
    monitor: MonitorSection
    checkpoint: CheckpointSection
    run: RunSection
    resolved: dict[str, Any]  # the plain mapping all of this came from
    origin: tuple[str, tuple[str, ...]] = ("config", ())  # the YAML file and the overrides that were composed


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "teacher": TeacherSection,
    "engine": EngineConfig,
    "comm": CommConfig,
    "rollout": RolloutConfig,
    "train": TrainSection,
    "eval": EvalSection,
    "monitor": MonitorSection,
    "checkpoint": CheckpointSection,
    "run": RunSection,
}
