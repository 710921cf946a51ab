"""``data=gsm8k data.path=DIR``: grade-school word problems (Cobbe et al., 2021) from ``train.jsonl``, ``test.jsonl``.

Each line has a ``question`` and an ``answer``: a chain of thought with calculator marks, ``48/2 = <<48/2=24>>24``,
that ends in ``#### 72``. The marks are removed, so that a student learns to write what it can compute itself.
"""

import re
from pathlib import Path

from distill.answers import Fallback, answers_match, extract_answer, number_before_unit, parse_number
from distill.data.config import Gsm8kConfig
from distill.data.example import Example, NoAnswer, Verdict, check_index
from distill.data.lines import LineFile, Unusable, parse_object, text_of
from distill.data.partition import Split
from distill.data.prompts import make_prompt

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Gsm8k:
    """One split of GSM8K. Implements :class:`distill.data.example.Task`."""

    def __init__(self, config: Gsm8kConfig, split: Split) -> None:
        folder = Path(config.path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data.path={config.path!r} is not a folder: it must hold train.jsonl and test.jsonl"
            )
        self.config = config
        self.name = f"gsm8k/{split}"
        self.lines = LineFile(folder / f"{split}.jsonl", _parse, on_bad=config.on_bad)
        self._fallback: Fallback = "none" if config.answer_fallback == "none" else "last_number"

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Example:
        position = check_index(index, len(self), self.name)
        question, chain, answer = _parse(self.lines.read(position))
        number = self.lines.number(position)
        return Example(
            id=f"{self.name}/{number}",
            prompt=make_prompt(self.config, question),
            reference=f"{chain}\n#### {answer}",
            answer=answer,
            metadata={"line": number},
        )

    def verify(self, example: Example, response: str) -> Verdict:
        """The answer found as ``distill.answers`` describes, a unit after it allowed, compared as a number."""
        if example.answer is None:
            raise NoAnswer(example)
        found = extract_answer(response, self._fallback)
        return Verdict(found is not None and answers_match(number_before_unit(found), example.answer), None)


def _parse(line: bytes) -> tuple[str, str, str]:
    """Question, chain of thought without marks, and answer (digits without commas). Raises Unusable."""
    record = parse_object(line)
    missing = [key for key in ("question", "answer") if key not in record]
    if missing:
        raise Unusable(f"no key {missing[0]!r}; the keys are {', '.join(map(repr, record)) or 'none'}")
    question = text_of(record["question"], "question").strip()
    chain, marker, answer = text_of(record["answer"], "answer").rpartition("####")
    answer = answer.strip().replace(",", "").lstrip("$")
    if not marker or parse_number(answer) is None:
        raise Unusable("the answer does not end in '#### ' and a number")
    return question, _CALCULATOR.sub("", chain).strip(), answer
