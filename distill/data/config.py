"""What a user may say about the data: one dataclass per dataset, checked when it is built.

``data_config`` turns the ``data`` group of the configuration (a flat mapping, see ``conf/data/*.yaml``) into one of
these. Every refusal names the key, the value and what is allowed; an unknown key names the nearest valid one.
Example::

    config = data_config({"name": "running_sum", "min_terms": 3, "max_terms": 5})
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

MISSING = "???"  # OmegaConf's mark for a mandatory value that nobody gave
MAX_SIZE = 2**62


class DataConfigError(ValueError):
    """A key of the ``data`` group has a value that cannot work."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"data.{key}={value!r} is not valid: {allowed}")


@dataclass(kw_only=True)
class DataConfig:
    """Keys that every dataset has.

    Attributes:
        name: which dataset.
        on_bad: a line that cannot be used is an ``error``, or is counted, reported and left out (``skip``).
        on_long: a sample over the length limit is an ``error``, has its response cut (``truncate``) or is left out
            (``skip``).
    """

    name: str
    on_bad: str = "error"
    on_long: str = "error"

    def __post_init__(self) -> None:
        self.check_types()
        self.one_of("on_bad", ("error", "skip"))
        self.one_of("on_long", ("error", "truncate", "skip"))

    def check_types(self) -> None:
        """Each field has the type it declares (an int is good enough for a float, a bool is never an int)."""
        for key, hint in get_type_hints(type(self)).items():
            value = getattr(self, key)
            kinds = get_args(hint) or (hint,)
            accepted = (*kinds, int) if float in kinds else kinds
            if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
                names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
                raise DataConfigError(key, value, f"expected {names}, got {type(value).__name__}")

    def one_of(self, key: str, allowed: tuple[str, ...]) -> None:
        """The value of ``key`` is one of ``allowed``."""
        if getattr(self, key) not in allowed:
            raise DataConfigError(key, getattr(self, key), f"choose one of {', '.join(allowed)}")

    def in_range(self, key: str, low: float, high: float) -> None:
        """The value of ``key`` lies in [low, high]."""
        if not low <= getattr(self, key) <= high:
            raise DataConfigError(key, getattr(self, key), f"allowed are {low} to {high}")

    def ordered(self, low: str, high: str, least: int, most: int) -> None:
        """``least`` ≤ low ≤ high ≤ ``most`` for two keys that bound one quantity."""
        self.in_range(low, least, most)
        self.in_range(high, least, most)
        if getattr(self, low) > getattr(self, high):
            raise DataConfigError(low, getattr(self, low), f"it exceeds data.{high}={getattr(self, high)}")

    def given(self, key: str, what: str) -> None:
        """``key`` has a value at all."""
        if getattr(self, key) in ("", MISSING, None):
            raise DataConfigError(key, getattr(self, key), f"data={self.name} needs it: {what}")


@dataclass(kw_only=True)
class GeneratedConfig(DataConfig):
    """Keys of datasets that are generated: any size, the same for equal seeds, no problem in both splits."""

    seed: int = 0
    train_size: int = 1_000_000
    test_size: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_range("seed", 0, MAX_SIZE)
        self.in_range("train_size", 1, MAX_SIZE)
        self.in_range("test_size", 1, MAX_SIZE)


@dataclass(kw_only=True)
class QuestionConfig(DataConfig):
    """Keys of question-answer datasets: how a question becomes a prompt, how an answer is found in a response.

    Attributes:
        template: the prompt; ``{question}`` is replaced by the question.
        chat: send the prompt as one chat message of the user (needs a chat template) instead of plain text.
        answer_fallback: with no ``####`` and no ``\\boxed{}`` in a response, take its ``last_number`` or count it
            wrong (``none``).
    """

    template: str = "{question}\n"
    chat: bool = False
    answer_fallback: str = "last_number"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("answer_fallback", ("last_number", "none"))
        if "{question}" not in self.template:
            raise DataConfigError("template", self.template, "it must contain {question}")


@dataclass(kw_only=True)
class FlawsConfig(GeneratedConfig):
    """Keys of generated tasks whose training references can show how a mistake is taken back, see ``flaws.py``.

    Attributes:
        flawed: share of the training references with a flawed span, the marker and the correction.
        min_carried, max_carried: lines that follow from the wrong one before the marker comes; the response ends it anyway.
        marker: the line that takes back.
    """

    flawed: float = 0.0
    min_carried: int = 0
    max_carried: int = 2
    marker: str = "!"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_range("flawed", 0.0, 1.0)
        self.ordered("min_carried", "max_carried", 0, 1000)
        if not self.marker or not self.marker.isprintable() or set(self.marker) & set("0123456789+-*=#|~ "):
            raise DataConfigError(
                "marker", self.marker, "printable characters that are no digit, operator, space or = # | ~"
            )


@dataclass(kw_only=True)
class ChainConfig(FlawsConfig):
    """Keys of chained arithmetic. ``modulus`` null: plain integers."""

    min_terms: int = 6
    max_terms: int = 6
    min_digits: int = 1
    max_digits: int = 1
    modulus: int | None = 10
    operators: str = "+-"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ordered("min_terms", "max_terms", 2, 1000)
        self.ordered("min_digits", "max_digits", 1, 18)
        if self.modulus is not None:
            self.in_range("modulus", 2, 10**18)
        elif "*" in self.operators and self.max_terms * self.max_digits > 1000:
            raise DataConfigError("modulus", None, "products of this many terms and digits need a modulus")
        if not self.operators or set(self.operators) - set("+-*") or len(set(self.operators)) < len(self.operators):
            raise DataConfigError("operators", self.operators, "one or more of + - *, each at most once")


@dataclass(kw_only=True)
class RunningSumConfig(ChainConfig):
    """``data=running_sum``: chained arithmetic, see ``running_sum.py``.

    Attributes:
        brief: share of the training problems that are marked with ``~``, to be answered briefly. Above 0, results are
            restated, each with the probability ``restated_brief`` behind a mark and ``restated`` without.
    """

    name: str = "running_sum"
    brief: float = 0.0
    restated: float = 1.0
    restated_brief: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("brief", "restated", "restated_brief"):
            self.in_range(key, 0.0, 1.0)
        if self.brief and self.flawed:
            raise DataConfigError("brief", self.brief, f"it cannot go together with data.flawed={self.flawed}")


@dataclass(kw_only=True)
class MissingStartConfig(ChainConfig):
    """``data=missing_start``: chained arithmetic from an unknown number, see ``missing_start.py``."""

    name: str = "missing_start"
    min_terms: int = 3
    max_terms: int = 3
    modulus: int | None = 5
    flawed: float = 0.3
    min_carried: int = 1
    max_carried: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modulus is None or self.modulus > 10:
            raise DataConfigError("modulus", self.modulus, "the unknown number is one digit: allowed are 2 to 10")
        if "*" in self.operators:
            raise DataConfigError("operators", self.operators, "a product may fit several numbers: one or both of + -")


@dataclass(kw_only=True)
class ChainSumConfig(QuestionConfig, GeneratedConfig):
    """``data=chain_sum`` (reasoning-gym): sums of integers, asked in words."""

    name: str = "chain_sum"
    train_size: int = 10_000
    min_terms: int = 2
    max_terms: int = 6
    min_digits: int = 1
    max_digits: int = 4
    allow_negation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ordered("min_terms", "max_terms", 1, 1000)
        self.ordered("min_digits", "max_digits", 1, 100)


@dataclass(kw_only=True)
class GsmSymbolicConfig(QuestionConfig, GeneratedConfig):
    """``data=gsm_symbolic`` (reasoning-gym): grade-school word problems from templates."""

    name: str = "gsm_symbolic"
    train_size: int = 10_000
    test_size: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_range("train_size", 1, 10**6)  # reasoning-gym lists which template each of them uses
        self.in_range("test_size", 1, 10**6)


@dataclass(kw_only=True)
class Gsm8kConfig(QuestionConfig):
    """``data=gsm8k``: the folder ``path`` holds ``train.jsonl`` and ``test.jsonl`` with ``question`` and ``answer``."""

    name: str = "gsm8k"
    path: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.given("path", "the folder that holds train.jsonl and test.jsonl")


@dataclass(kw_only=True)
class JsonlConfig(DataConfig):
    """``data=jsonl``: one JSON object per line, with a prompt and a response or with chat messages.

    Attributes:
        path: the file.
        test_path: a second file for the test split; null holds out ``test_fraction`` of the lines instead.
        prompt_key, response_key, answer_key, messages_key: what the keys are called in the file.
        ids_key: null trains on the text. A key (``ids`` in the records of ``distill rollout``) trains on the token ids that stand
            there, with ``prompt_length`` and ``supervised`` beside it: nothing is encoded again, and a mask is respected.
        answer_fallback: as in :class:`QuestionConfig`.
        max_line_bytes: a longer line is a bad line (it is never read into memory as a whole).
    """

    name: str = "jsonl"
    path: str = ""
    test_path: str | None = None
    test_fraction: float = 0.05
    prompt_key: str = "prompt"
    response_key: str = "response"
    answer_key: str = "answer"
    messages_key: str = "messages"
    ids_key: str | None = None
    answer_fallback: str = "last_number"
    max_line_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.given("path", "the file to read")
        self.one_of("answer_fallback", ("last_number", "none"))
        self.in_range("test_fraction", 0.0, 0.9)
        self.in_range("max_line_bytes", 2, 2**31)


@dataclass(kw_only=True)
class MixedConfig(DataConfig):
    """``data=mixed``: several datasets in turn, see ``mixed.py``.

    Attributes:
        parts: NAME → the keys of a dataset, ``name`` among them, and ``share``: how many samples of each round are of it.
    """

    name: str = "mixed"
    parts: dict = field(default_factory=dict)  # plain: `check_types` knows no other

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise DataConfigError("parts", self.parts, "data=mixed needs at least one: NAME: {name: DATASET, share: 1}")
        for name, part in self.parts.items():
            if not isinstance(part, dict):
                raise DataConfigError(f"parts.{name}", part, "expected the keys of a dataset, {name: DATASET, …}")
            share = part.get("share", 1)
            if type(share) is not int or not 0 <= share <= 1000:
                raise DataConfigError(f"parts.{name}.share", share, "a whole number from 0 to 1000")
            if part.get("name") == "mixed":
                raise DataConfigError(f"parts.{name}.name", "mixed", "a part is a dataset of its own")
            try:
                data_config({key: value for key, value in part.items() if key != "share"})
            except DataConfigError as error:
                raise DataConfigError(f"parts.{name}", "…", str(error)) from None
        if not any(part.get("share", 1) for part in self.parts.values()):
            raise DataConfigError("parts", list(self.parts), "every share is 0; give at least one part a share of 1")


CONFIGS: dict[str, type[DataConfig]] = {
    "mixed": MixedConfig,
    "running_sum": RunningSumConfig,
    "missing_start": MissingStartConfig,
    "chain_sum": ChainSumConfig,
    "gsm_symbolic": GsmSymbolicConfig,
    "gsm8k": Gsm8kConfig,
    "jsonl": JsonlConfig,
}


def data_config(mapping: Mapping[str, Any]) -> DataConfig:
    """Build and check the configuration of a dataset.

    Args:
        mapping: flat keys and plain values, ``name`` among them.
    Raises:
        DataConfigError: unknown dataset, unknown key, or a value that cannot work.
    """
    name = mapping.get("name")
    if name not in CONFIGS:
        raise DataConfigError("name", name, f"choose one of {', '.join(sorted(CONFIGS))}{_nearest(str(name), CONFIGS)}")
    kind = CONFIGS[str(name)]
    valid = {each.name: None for each in fields(kind)}
    for key in mapping:
        if key not in valid:
            allowed = f"data={name} has no such key{_nearest(str(key), valid)}; its keys are {', '.join(valid)}"
            raise DataConfigError(str(key), mapping[key], allowed)
    return kind(**{str(key): value for key, value in mapping.items()})


def _nearest(word: str, valid: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
