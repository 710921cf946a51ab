"""The section ``teacher``: where the teacher runs, what it says about each token, and how that travels. See docs/teachers.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.config.checks import in_range, one_of
from distill.errors import ConfigError

PLACEMENTS = ("colocated", "separate", "server", "cache")
SIGNALS = ("logits", "hidden", "topk", "sampled")
WIRES = ("auto", "float32", "bfloat16", "float8")


@dataclass(kw_only=True)
class TeacherServerSpec:
    """An OpenAI-compatible endpoint that returns log-probabilities of prompts (vLLM does)."""

    url: list[str] = field(default_factory=list)  # http://HOST:PORT, https://HOST or unix:/PATH; several share the work
    model: str | None = None  # by the server's name for it; None: the only one it serves
    key_variable: str | None = (
        None  # environment variable that holds the server's API key; None: VLLM_API_KEY, where set
    )
    concurrency: int = 8  # requests under way at a time, per rank
    request_s: float = 120.0  # for one answer
    retry_s: float = 60.0  # longest pause between two tries
    pause_s: float = 3600.0  # where no server answers for so long, the run ends, saved

    def __post_init__(self) -> None:
        in_range("teacher.server.concurrency", self.concurrency, low=1)
        in_range("teacher.server.request_s", self.request_s, low=0.1)
        in_range("teacher.server.retry_s", self.retry_s, low=0.0)
        in_range("teacher.server.pause_s", self.pause_s, low=0.0)


@dataclass(kw_only=True)
class TeacherSource:
    """One of several teachers."""

    path: str | None = None  # folder or hub name
    weight: float = 1.0  # of its samples (mixture=route), or in the mean of probabilities
    tags: list[str] = field(default_factory=list)  # samples of these tags are its own; its name is always one
    url: list[str] = field(default_factory=list)  # placement=server: servers of its own; empty: teacher.server.url

    def __post_init__(self) -> None:
        in_range("teacher.many.NAME.weight", self.weight, low=0.0)


@dataclass(kw_only=True)
class AlignSpec:
    """Tokenizers of different families."""

    min_share: float = 0.9  # of the text's bytes (sampled) or of the teacher's mass (topk) that must find a counterpart

    def __post_init__(self) -> None:
        in_range("teacher.align.min_share", self.min_share, low=0.0, high=1.0)


@dataclass(kw_only=True)
class TeacherSection:
    placement: str = "colocated"
    signal: str = "logits"
    top_k: int = 64
    wire: str = "auto"  # dtype of hidden states and logits that travel or are kept; auto: the teacher's own
    ranks: int = 1  # separate: the last so many ranks of the job
    shard: str = "none"  # separate: over all teacher ranks
    queue: int = 2  # separate, server: micro-batches asked for ahead of the one in training
    on_loss: str = "stop"  # separate: of a teacher's rank
    cache: str | None = None  # folder
    server: TeacherServerSpec = field(default_factory=TeacherServerSpec)
    many: dict[str, TeacherSource] = field(default_factory=dict)
    mixture: str = "route"
    route: str = "teacher"  # key of Example.metadata
    align: AlignSpec = field(default_factory=AlignSpec)

    def __post_init__(self) -> None:
        one_of("teacher.placement", self.placement, PLACEMENTS)
        one_of("teacher.signal", self.signal, SIGNALS)
        one_of("teacher.wire", self.wire, WIRES)
        one_of("teacher.shard", self.shard, ("none", "tensor", "zero3"))
        one_of("teacher.on_loss", self.on_loss, ("stop", "continue"))
        one_of("teacher.mixture", self.mixture, ("route", "mean"))
        in_range("teacher.top_k", self.top_k, low=1)
        in_range("teacher.ranks", self.ranks, low=1)
        in_range("teacher.queue", self.queue, low=1)
        if self.placement == "server" and self.signal == "hidden":
            raise ConfigError(
                "teacher.signal=hidden does not come from a server, which returns log-probabilities; set teacher.signal=topk or "
                "teacher.signal=sampled (or logits, where the whole vocabulary fits into its --max-logprobs)"
            )
        if self.wire == "float8" and self.signal != "hidden":
            raise ConfigError(
                f"teacher.wire=float8 is for teacher.signal=hidden, not {self.signal}; set teacher.wire=auto"
            )
