"""The three types that every dataset speaks: an example, a verdict, and a task (a split with its verifier).

A trainer, a rollout engine and an evaluation need nothing else from a dataset, so a new one is a single file with a
class that satisfies :class:`Task` and one line in ``distill.data.build_task``.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, str]
Prompt = str | list[Message]


@dataclass(frozen=True, slots=True)
class ExactText:
    """Prompt and response as the token ids with which they were made, of one tokenizer.

    Attributes:
        ids: prompt and response.
        prompt_length: how many of them are the prompt, at least 1.
        supervised: which response tokens a loss looks at; None: all.
    """

    ids: list[int]
    prompt_length: int
    supervised: list[bool] | None


@dataclass(frozen=True, slots=True)
class Example:
    """One problem.

    Attributes:
        id: unique within its split; names the sample in errors and logs (``"gsm8k/train/17"`` or ``"FILE:LINE"``).
        prompt: plain text, or chat messages (``role``, ``content``) that end with the turn to be answered.
        reference: a reference response (chain of thought and final answer); None for prompt-only data.
        answer: the gold final answer; None where there is nothing to check a response against.
        metadata: whatever else the source says about the problem.
        exact: the reference as token ids, to be trained on instead of its text; None: there is only the text.
    """

    id: str
    prompt: Prompt
    reference: str | None
    answer: str | None
    metadata: dict[str, Any] = field(default_factory=dict)
    exact: ExactText | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says about one response.

    Attributes:
        correct: the final answer is right.
        exact_chain: every intermediate step is right as well; None where the task cannot tell.
    """

    correct: bool
    exact_chain: bool | None


class Task(Protocol):
    """A dataset split with its verifier: random access by index, so that the order of samples lives elsewhere."""

    @property
    def name(self) -> str:
        """``"<dataset>/<split>"``, for logs and errors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example at ``index`` (0 ≤ index < len): always the same one. Raises IndexError outside that range."""

    def verify(self, example: Example, response: str) -> Verdict:
        """Judge a response. Never raises on odd text; raises NoAnswer where ``example.answer`` is None."""


class NoAnswer(ValueError):
    """A response cannot be judged, because its example has no gold answer."""

    def __init__(self, example: Example) -> None:
        super().__init__(
            f"example {example.id} has no gold answer, so a response to it cannot be judged; add one to the data"
        )


def check_index(index: int, size: int, name: str) -> int:
    """``index`` itself, or IndexError that names the split and its size. Negative indices are refused."""
    if not 0 <= index < size:
        raise IndexError(f"{name} has {size} examples: no index {index}")
    return index
