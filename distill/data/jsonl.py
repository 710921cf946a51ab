"""``data=jsonl data.path=FILE``: your own data, one JSON object per line.

A line has either a prompt (text, or chat messages) and usually a response, or a whole conversation::

    {"prompt": "What is 6 times 7?", "response": "6 * 7 = 42\\n#### 42", "answer": "42"}
    {"messages": [{"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "42"}]}

With ``data.ids_key=ids`` the records of ``distill rollout`` are trained on token by token as they were made, flawed
spans masked where ``method.mask_flawed`` said so. The last message of the assistant is the response. ``answer`` is
optional; without it the answer is what the response marks with ``####`` or ``\\boxed{}``, and where it marks nothing
responses cannot be verified. The file is indexed once and never loaded (``lines.py``). The test split is another file,
or a fraction of the lines chosen by a hash of their text, so that equal lines are on the same side.
"""

import json
from typing import Any

from distill.answers import Fallback, answers_match, extract_answer, marked_answer
from distill.data.config import DataConfigError, JsonlConfig
from distill.data.example import ExactText, Example, Message, NoAnswer, Prompt, Verdict, check_index
from distill.data.lines import BadLine, LineFile, Unusable, parse_object, text_of
from distill.data.partition import Split, split_of


class Jsonl:
    """One split of a file. Implements :class:`distill.data.example.Task`.

    Attributes:
        skipped: the first bad lines, where ``data.on_bad=skip``.
        skipped_count: how many there were in all.
    """

    def __init__(self, config: JsonlConfig, split: Split) -> None:
        if split == "test" and config.test_path is None and config.test_fraction == 0:
            raise DataConfigError(
                "test_fraction",
                config.test_fraction,
                "nothing is held out for the test split; set it or data.test_path",
            )
        held_out = config.test_path is None and config.test_fraction > 0
        self.config = config
        self.name = f"jsonl/{split}"
        self.lines = LineFile(
            config.test_path if split == "test" and config.test_path is not None else config.path,
            self._parse,
            keep=(lambda line: split_of(line, config.test_fraction) == split) if held_out else None,
            on_bad=config.on_bad,
            max_line_bytes=config.max_line_bytes,
            remedy=f" for the {split} split: change data.test_fraction, or set data.test_path" if held_out else "",
        )
        self._fallback: Fallback = "none" if config.answer_fallback == "none" else "last_number"

    @property
    def skipped(self) -> list[BadLine]:
        return self.lines.skipped

    @property
    def skipped_count(self) -> int:
        return self.lines.skipped_count

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Example:
        position = check_index(index, len(self), self.name)
        name = f"{self.lines.path}:{self.lines.number(position)}"
        return Example(name, *self._parse(self.lines.read(position)))

    def verify(self, example: Example, response: str) -> Verdict:
        """The response's final answer against the gold one, as numbers, text or LaTeX (see ``distill.answers``)."""
        if example.answer is None:
            raise NoAnswer(example)
        return Verdict(answers_match(extract_answer(response, self._fallback), example.answer), None)

    def _parse(self, line: bytes) -> tuple[Prompt, str | None, str | None, dict[str, Any], ExactText | None]:
        config, record = self.config, parse_object(line)
        prompt: Prompt
        reference: str | None = None
        if config.messages_key in record:
            prompt, reference = _conversation(record.pop(config.messages_key), config.messages_key)
        elif config.prompt_key in record:
            prompt = _prompt(record.pop(config.prompt_key), config.prompt_key)
        else:
            keys = ", ".join(map(repr, record)) or "none"
            raise Unusable(f"no key {config.prompt_key!r} or {config.messages_key!r}; the keys are {keys}")
        response = record.pop(config.response_key, None)
        if response is not None and reference is not None:
            raise Unusable(f"two responses: {config.response_key!r} and the last of {config.messages_key!r}")
        reference = reference if response is None else text_of(response, config.response_key)
        answer = _answer(record.pop(config.answer_key, None), config.answer_key)
        exact = None if config.ids_key is None else _exact(record, config.ids_key)
        return prompt, reference, answer or (marked_answer(reference) if reference else None), record, exact


def _exact(record: dict[str, Any], key: str) -> ExactText:
    """The token ids under ``key``, taken out of the record with what belongs to them."""
    ids, length, flags = record.pop(key, None), record.pop("prompt_length", None), record.pop("supervised", None)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise Unusable(f"{key} must be a list of token ids (data.ids_key={key})")
    if type(length) is not int or not 0 < length < len(ids):
        raise Unusable(f"prompt_length={length!r} must lie between 0 and the {len(ids)} tokens of {key}")
    if flags is not None and (
        not isinstance(flags, list) or len(flags) != len(ids) - length or not {0, 1}.issuperset(flags)
    ):
        raise Unusable(f"supervised must hold a 0 or 1 for each of the {len(ids) - length} response tokens, or be null")
    return ExactText(ids, length, None if flags is None else list(map(bool, flags)))


def _prompt(value: object, key: str) -> Prompt:
    if not isinstance(value, list):
        return text_of(value, key)
    prompt, reference = _conversation(value, key)
    if reference is not None:
        raise Unusable(f"{key} ends with a message of the assistant: nothing is left to answer")
    return prompt


def _conversation(value: object, key: str) -> tuple[list[Message], str | None]:
    """The messages up to the turn to be answered, and the assistant's answer to it where there is one."""
    if not isinstance(value, list) or not value:
        raise Unusable(f"{key} must be a list of messages, got {type(value).__name__ if value else 'an empty list'}")
    messages = [_message(item, f"{key}[{number}]") for number, item in enumerate(value)]
    reference = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise Unusable(f"{key} has no turn of the user before the assistant's answer")
    return messages, reference


def _message(item: object, what: str) -> Message:
    if not isinstance(item, dict):
        raise Unusable(f"{what} must be an object with role and content, got {type(item).__name__}")
    return {key: text_of(item.get(key), f"{what}.{key}") for key in ("role", "content")}


def _answer(value: object, key: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    return text_of(value, key)
