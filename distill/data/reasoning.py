"""``data=chain_sum`` and ``data=gsm_symbolic``: tasks of reasoning-gym, with their verifiers.

reasoning-gym (``pip install ncclx-py[tasks]``) draws a problem from (seed, index). Here an example is a pure function
of (data.seed, split, index): candidates are drawn from a sequence of reasoning-gym datasets until one falls on this
split's side of the partition of all questions (``partition.py``), so that no question is in both splits, whatever
their seeds and sizes.

References end in ``#### answer``, so that a response to either task is read the way a GSM8K response is. A response
counts if reasoning-gym's ``score_answer`` gives full marks *and* the numbers are equal: reasoning-gym alone takes
``-20`` for ``20``.
"""

import hashlib
import importlib
from abc import ABC, abstractmethod
from typing import Any, Protocol

from distill.answers import Fallback, answers_match, extract_answer, number_before_unit, parse_number, strip_special
from distill.data.config import ChainSumConfig, GsmSymbolicConfig
from distill.data.example import Example, NoAnswer, Verdict, check_index
from distill.data.partition import Split, split_of
from distill.data.prompts import make_prompt

_ATTEMPTS = 2000


class MissingExtra(ImportError):
    """An optional dependency is not installed."""


class _Source(Protocol):
    """What is used of a reasoning-gym dataset."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float: ...


class _ReasoningTask(ABC):
    """One split of a reasoning-gym dataset. Implements :class:`distill.data.example.Task`."""

    def __init__(self, config: ChainSumConfig | GsmSymbolicConfig, split: Split) -> None:
        self.split: Split = split
        self.name = f"{config.name}/{split}"
        self._config = config
        self._size = config.train_size if split == "train" else config.test_size
        self._sources: list[_Source] = []
        self._fallback: Fallback = "none" if config.answer_fallback == "none" else "last_number"
        self._entry(0)  # a missing library, or a space too small, shows now and not in the middle of a run

    @abstractmethod
    def _source(self, seed: int) -> _Source:
        """The reasoning-gym dataset for this seed."""

    @abstractmethod
    def _reference(self, entry: dict[str, Any]) -> str:
        """A chain of thought for an entry, with its answer at the end."""

    @abstractmethod
    def _exact_chain(self, example: Example, response: str) -> bool | None:
        """Whether every step of a response is right; None where the task cannot tell."""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        entry = self._entry(check_index(index, self._size, self.name))
        prompt = make_prompt(self._config, entry["question"])
        return Example(f"{self.name}/{index}", prompt, self._reference(entry), entry["answer"], {**entry["metadata"]})

    def verify(self, example: Example, response: str) -> Verdict:
        """See the module's text. Numbers reach reasoning-gym in plain form: ``$1,000.00`` as ``1000``."""
        if example.answer is None:
            raise NoAnswer(example)
        found = number_before_unit(extract_answer(response, self._fallback) or "")
        number = parse_number(found)
        plain = found if number is None else str(number)
        entry = {"answer": example.answer, "metadata": example.metadata}
        full_marks = self._sources[0].score_answer(plain, entry) == 1.0
        correct = full_marks and answers_match(found, example.answer)
        return Verdict(correct, self._exact_chain(example, response) if correct else False)

    def _entry(self, index: int) -> dict[str, Any]:
        """Draw candidates, each from a dataset of its own seed, until one falls on this side of the partition."""
        for attempt in range(_ATTEMPTS):
            if attempt == len(self._sources):
                key = f"reasoning/{self.name}/{self._config.seed}/{attempt}".encode()
                self._sources.append(self._source(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")))
            entry = self._sources[attempt][index]
            if split_of(entry["question"]) == self.split:
                return entry
        raise ValueError(
            f"{self.name}: no {self.split} question found in {_ATTEMPTS} draws: "
            "the space of problems is too small; allow more terms or digits"
        )


class ChainSum(_ReasoningTask):
    """Sums like ``12 + 5 - 3``, with the running sums as the chain of thought: ``12 + 5 = 17``, ``17 - 3 = 14``."""

    _config: ChainSumConfig

    def _source(self, seed: int) -> _Source:
        config = self._config
        kind = _import("arithmetic.chain_sum")
        options = kind.ChainSumConfig(
            min_terms=config.min_terms,
            max_terms=config.max_terms,
            min_digits=config.min_digits,
            max_digits=config.max_digits,
            allow_negation=config.allow_negation,
            seed=seed,
            size=self._size,
        )
        source: _Source = kind.ChainSumDataset(options)
        return source

    def _reference(self, entry: dict[str, Any]) -> str:
        first, *rest = entry["metadata"]["expression"].split(" ")
        total, lines = int(first), []
        for sign, term in zip(rest[::2], rest[1::2]):
            result = total + int(term) if sign == "+" else total - int(term)
            lines.append(f"{total} {sign} {term} = {result}")
            total = result
        return "\n".join([*lines, f"#### {entry['answer']}"])

    def _exact_chain(self, example: Example, response: str) -> bool:
        return strip_special(response) == example.reference


class GsmSymbolic(_ReasoningTask):
    """Word problems from the GSM-Symbolic templates (Mirzadeh et al., 2024), with their worked solutions."""

    _config: GsmSymbolicConfig

    def _source(self, seed: int) -> _Source:
        kind = _import("arithmetic.gsm_symbolic.gsm_symbolic")
        source: _Source = kind.GSMSymbolicDataset(kind.GSMSymbolicDatasetConfig(seed=seed, size=self._size))
        return source

    def _reference(self, entry: dict[str, Any]) -> str:
        # The templates end in "#### 84.0" where the answer is 84.
        chain = entry["metadata"]["answer_cot"].rpartition("####")[0].strip()
        return f"{chain}\n#### {entry['answer']}"

    def _exact_chain(self, example: Example, response: str) -> None:
        return None


def _import(module: str) -> Any:
    try:
        return importlib.import_module(f"reasoning_gym.{module}")
    except ImportError as error:
        raise MissingExtra(
            f"this dataset comes from reasoning-gym, which cannot be imported ({error}): pip install ncclx-py[tasks]"
        ) from error
