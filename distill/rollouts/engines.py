"""Who makes a run's rollouts: models in this process, or servers (``rollout.name``).

    with closing(open_engine(config, parts, teacher, folder)) as engine:
        engine.refresh(student)                                            # all ranks, before the first use and after every change
        engine.generator("student", student).generate(prompts, params, seeds)
        engine.writer(student).generate(prompts, seeds)                    # monitored trajectories

``student`` and ``teacher`` are models of this process; where servers write, only what their configuration says is used of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RunConfig
from distill.rollouts.generator import Generator
from distill.rollouts.rollout import Rollout
from distill.rollouts.sampling import SamplingParams

if TYPE_CHECKING:
    from distill.methods.base import Method, Writer

Who = Literal["student", "teacher"]


class Generates(Protocol):
    """Prompts to rollouts; see `Generator.generate`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]: ...


class Engine(Protocol):
    """What a run asks for its rollouts."""

    def refresh(self, student: nn.Module | None) -> None:
        """Write with the student (peft wrapper included) as it is now; None for a method without text of its own student's.

        All ranks call it together.
        """

    def serve(self) -> None:
        """Write with the models as they are in their folders, for a run that changes none. All ranks call it."""

    def generator(self, who: Who, model: PreTrainedModel) -> Generates:
        """Plain rollouts of the student or the teacher."""

    def writer(self, student: PreTrainedModel) -> Writer:
        """Monitored trajectories of the run's method."""

    def close(self) -> None:
        """End what the engine started."""


class BuiltinEngine:
    """The models of this process, used as they are at each call."""

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, method: Method, teacher: PreTrainedModel | None
    ) -> None:
        self._config, self._tokenizer, self._method, self._teacher = config, tokenizer, method, teacher
        self._generators: dict[int, Generator] = {}
        self._writers: dict[int, Writer] = {}

    def refresh(self, student: nn.Module | None) -> None:
        """Nothing to do."""

    def serve(self) -> None:
        """Nothing to do."""

    def generator(self, who: Who, model: PreTrainedModel) -> Generator:
        """One generator per model, kept for its cache."""
        if id(model) not in self._generators:
            self._generators[id(model)] = Generator(
                model, self._tokenizer, slots=self._config.rollout.slots, context_length=self._config.train.max_length
            )
        return self._generators[id(model)]

    def writer(self, student: PreTrainedModel) -> Writer:
        assert self._teacher is not None
        if id(student) not in self._writers:
            self._writers[id(student)] = self._method.writer(student, self._teacher, self._tokenizer, self._config)
        return self._writers[id(student)]

    def close(self) -> None:
        """Nothing to do."""


def open_engine(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    student: nn.Module,
    teacher: PreTrainedModel | None,
    folder: Path,
) -> Engine:
    """The engine of ``rollout.name``; ``folder`` is the run's. All ranks call it. Raises ConfigError for what it cannot do."""
    if config.rollout.name == "builtin":
        return BuiltinEngine(config, tokenizer, method, teacher)
    # Here, not above: most runs have no server.
    from distill.rollouts.vllm.engine import VllmEngine

    return VllmEngine(config, tokenizer, method, student, teacher, folder)
