"""Configuration: Hydra composes YAML from ``conf/``, dataclasses here check every key, type and range.

Why both: Hydra gives groups and ``key=value`` overrides; the dataclasses are what the code reads, so that a wrong key or
value stops the run before anything is loaded, with the nearest valid name in the message.

    config = load_config("config", ["method=on_policy", "train.steps=50"])
    config.train.steps  # 50
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.data import DataConfig, DataConfigError, data_config
from distill.errors import ConfigError

T = TypeVar("T")

DTYPES = ("float32", "bfloat16")
MAX_BRACKETS = 200  # in one override
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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "max_length", "log_every"):
            in_range(f"train.{name}", getattr(self, name), low=1)
        if self.token_budget is not None:
            in_range("train.token_budget", self.token_budget, low=1)


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

    def __post_init__(self) -> None:
        in_range("monitor.smoothing", self.smoothing, low=0.0, high=0.999999)
        in_range("monitor.baseline_steps", self.baseline_steps, low=1)
        in_range("monitor.density_drop", self.density_drop, low=0.0, high=1.0)
        in_range("monitor.accuracy_drop", self.accuracy_drop, low=0.0, high=1.0)
        in_range("monitor.entropy_share", self.entropy_share, low=0.0)
        in_range("monitor.length_growth", self.length_growth, low=1.0)


@dataclass(kw_only=True)
class RunConfig:
    """One training or evaluation run, complete and checked."""

    seed: int
    model: ModelConfig
    data: DataConfig
    method: dict[str, Any]  # checked by distill.methods.build_method
    engine: EngineConfig
    comm: CommConfig
    rollout: RolloutConfig
    train: TrainSection
    eval: EvalSection
    monitor: MonitorSection
    checkpoint: CheckpointSection
    run: RunSection
    resolved: dict[str, Any]  # the plain mapping all of this came from


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "engine": EngineConfig,
    "comm": CommConfig,
    "rollout": RolloutConfig,
    "train": TrainSection,
    "eval": EvalSection,
    "monitor": MonitorSection,
    "checkpoint": CheckpointSection,
    "run": RunSection,
}


def one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{key}={value} is not valid; choose one of: {', '.join(map(str, allowed))}")


def in_range(key: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raise ConfigError unless ``low <= value <= high`` (a bound of None is open)."""
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{key}={value} is out of range; it must be {bounds}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that points from a wrong name to the right one."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names: {', '.join(names)}"


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make dataclass ``cls`` from a mapping; unknown keys and wrong types raise ConfigError naming ``where.key``."""
    check_keys(cls, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(values)))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None


def check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the first key of ``values`` that dataclass ``cls`` (or one nested in it) lacks."""
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key '{where}.{key}'; {nearest(key, known)}")
        nested = known[key].default_factory
        if isinstance(value, Mapping) and isinstance(nested, type) and is_dataclass(nested):
            check_keys(nested, value, f"{where}.{key}")


def load_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """Compose ``conf/<name>.yaml`` with ``key=value`` overrides and check all of it.

    Raises ConfigError for an unknown key, group or value (with the nearest valid one), or a value out of range.
    """
    return check_config(compose_config(name, overrides))


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Hydra's composition with errors a person can read."""
    for override in overrides:
        if sum(map(override.count, "[{(")) > MAX_BRACKETS:  # Hydra's parser would take minutes, or run out of stack
            raise ConfigError(
                f"'{override[:40]}…' has more than {MAX_BRACKETS} brackets; write such a value into a file"
            )
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        try:
            return compose(config_name=name, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(error, name, overrides)) from None
        except (ValueError, OSError) as error:  # Hydra's, of a group that is no name, or longer than a file's may be
            raise ConfigError(f"{str(error)[:200]}; check {', '.join(each[:40] for each in overrides)}") from None


def check_config(composed: DictConfig) -> RunConfig:
    """Turn a composed mapping into the checked RunConfig."""
    try:
        resolved = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"'{error.full_key}' has no value; set {error.full_key}=…") from None
    assert isinstance(resolved, dict)
    plain = {str(key): value for key, value in resolved.items()}
    known = ("seed", "data", "method", *SECTIONS)
    for key in plain:
        if key not in known:
            raise ConfigError(
                f"unknown section '{key}'; {nearest(key, known)}; experiments with `compare` and `entries` are for "
                "`distill compare`"
            )
    for key in known:
        if key not in plain:
            raise ConfigError(f"the section '{key}' is missing; do not delete it")
        if key != "seed" and not isinstance(plain[key], dict):
            raise ConfigError(f"{key}={plain[key]} is not a section; set its keys one by one, as {key}.KEY=VALUE")
    if type(plain["seed"]) is not int:
        raise ConfigError(f"seed={plain['seed']} is not a whole number")
    sections: dict[str, Any] = {key: build(cls, plain[key], key) for key, cls in SECTIONS.items()}
    try:
        data = data_config(plain["data"])
    except DataConfigError as error:
        raise ConfigError(str(error)) from None
    return RunConfig(seed=int(plain["seed"]), data=data, method=plain["method"], resolved=plain, **sections)


def conf_folder() -> Path:
    """The folder of YAML groups: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(path for path in (package / "conf", package.parent / "conf") if (path / "config.yaml").is_file())


def _explain(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """Name the override that failed and the nearest valid key or group choice."""
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in conf_folder().iterdir() if p.is_dir()}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in groups and value not in (*groups[key], "null"):
            return f"{key}={value}: no such choice in conf/{key}; {nearest(value, groups[key])}"
    good = [o for o in overrides if o.partition("=")[0] in groups]
    try:
        valid = set(_flat_keys(compose(config_name=name, overrides=good))) | set(groups)
    except (HydraException, OmegaConfBaseException):
        return str(error).splitlines()[0]
    for override in overrides:
        key, separator, _ = override.lstrip("+~").partition("=")
        if not separator:
            return f"'{override}' is not of the form key=value"
        if key not in valid:
            return f"unknown key '{key}'; {nearest(key, valid)}"
    return str(error).splitlines()[0]


def _flat_keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in map(str, config):
        full = f"{prefix}{key}"
        yield full
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            yield from _flat_keys(config[key], f"{full}.")
