"""``data=running_sum``: chained arithmetic whose chain of thought is the running result, one per line.

A problem of six single-digit numbers modulo 10 reads::

    9-9+8+7+7-2=          the prompt, with the newline after it
    0                     9 - 9
    8                     0 + 8
    5                     8 + 7 = 15, modulo 10
    2
    0
    #0                    the answer

Operations apply from left to right, ``*`` included. With ``data.flawed`` above 0 some training references take back a
mistake (``flaws.py``); with ``data.brief`` above 0 results are restated (``8``, ``=8``), less often behind a mark that
asks for a brief answer. Models of a few ten thousand parameters learn it in seconds, every step can be checked, and
there are 32 million such problems. An example is a pure function of (seed, split, index); train and test share no
problem because the text of a problem decides its side (``partition.py``). Sizes are virtual: nothing is stored.
"""

import hashlib
import re

from distill.answers import strip_special
from distill.data.config import ChainConfig, RunningSumConfig
from distill.data.example import Example, NoAnswer, Verdict, check_index
from distill.data.flaws import Flaws, standing
from distill.data.partition import Split, split_of, unit_hash

_ATTEMPTS = 10_000
_ANSWER = re.compile(r"#(-?[0-9]+)")


class RunningSum:
    """One split of the task. Implements :class:`distill.data.example.Task`."""

    def __init__(self, config: ChainConfig, split: Split) -> None:
        self.config = config
        self.split: Split = split
        self.name = f"{config.name}/{split}"
        self._size = config.train_size if split == "train" else config.test_size
        self._brief = config if isinstance(config, RunningSumConfig) and config.brief else None
        self._flaws = Flaws(config) if config.flawed and split == "train" else None
        self._problem(0)  # a space too small to have problems on this side fails here, not in the middle of a run

    @property
    def alphabet(self) -> str:
        """Every character a problem or its solution may contain, for ``char_tokenizer``."""
        return (
            "0123456789"
            + self.config.operators
            + "=\n#"
            + (self.config.marker if self.config.flawed else "")
            + "~" * (self._brief is not None)
        )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        numbers, operators = self._problem(check_index(index, self._size, self.name))
        lines = self.solution(numbers, operators)
        reference, mark = lines, ""
        if self._flaws is not None:
            reference = self._flaws.reference(
                index, lines, self.places(numbers), lambda place, draw: self.mistaken(numbers, operators, place, draw)
            )
        elif self._brief is not None:
            mark, reference = self._spoken(self._brief, index, lines)
        return Example(
            id=f"{self.name}/{index}",
            prompt=f"{mark}{self.question(numbers, operators)}\n",
            reference="\n".join(reference),
            answer=lines[-1].removeprefix("#"),
            metadata={"terms": len(numbers), "lines": lines},
        )

    def question(self, numbers: list[int], operators: list[str]) -> str:
        """The text of a problem; it also decides the problem's split."""
        return problem_text(numbers, operators)

    def solution(self, numbers: list[int], operators: list[str]) -> list[str]:
        """The lines of the right response, answer included."""
        return _with_answer(running_results(numbers, operators, self.config.modulus), -1)

    def places(self, numbers: list[int]) -> range:
        """The lines that a flaw may start at."""
        return range(len(numbers) - 1)

    def mistaken(self, numbers: list[int], operators: list[str], place: int, draw: int) -> list[str]:
        """The lines from ``place`` on that follow from a wrong result there."""
        result = running_results(numbers, operators, self.config.modulus)[place]
        wrong = wrong_value(result, draw, self.config.modulus)
        rest = running_results([wrong, *numbers[place + 2 :]], operators[place + 1 :], self.config.modulus)
        return _with_answer([wrong, *rest], -1)

    def verify(self, example: Example, response: str) -> Verdict:
        """The answer must be the only one that stands, on the last line; the chain needs every standing line before it too."""
        if example.answer is None or example.reference is None:
            raise NoAnswer(example)
        lines = strip_special(response).split("\n")
        if self.config.flawed:
            lines = standing(lines, self.config.marker, example.metadata["lines"])
        stated = _ANSWER.fullmatch(lines[-1]) if lines else None
        only = sum(line.count("#") for line in lines) == 1
        correct = stated is not None and only and _same_integer(stated[1], example.answer)
        right = example.metadata["lines"][:-1]
        chain = lines[:-1] if self._brief is None else once(lines[:-1])
        return Verdict(correct, correct and chain == right)

    def _spoken(self, config: RunningSumConfig, index: int, lines: list[str]) -> tuple[str, list[str]]:
        """The mark of a problem, and its lines with some of them restated; the test split has no marks."""

        def draw(what: str) -> float:
            return unit_hash(f"{what}/{config.seed}/{index}")

        marked = self.split == "train" and draw("brief") < config.brief
        share = config.restated_brief if marked else config.restated
        spoken = []
        for place, line in enumerate(lines[:-1]):
            spoken += [line, f"={line}"] if draw(f"restated/{place}") < share else [line]
        return "~" * marked, spoken + lines[-1:]

    def _problem(self, index: int) -> tuple[list[int], list[str]]:
        """Draw candidates until one falls on this side of the partition."""
        for attempt in range(_ATTEMPTS):
            numbers, operators = self._candidate(index, attempt)
            if split_of(self.question(numbers, operators)) == self.split:
                return numbers, operators
        config = self.config
        raise ValueError(
            f"{self.name}: no {self.split} problem found in {_ATTEMPTS} draws with data.max_terms={config.max_terms}, "
            f"data.max_digits={config.max_digits}, data.operators={config.operators!r}: "
            "the space of problems is too small; allow more terms or digits"
        )

    def _candidate(self, index: int, attempt: int) -> tuple[list[int], list[str]]:
        """Numbers and operators drawn from a hash of the arguments: no generator state, equal on every platform."""
        config = self.config
        key = f"{config.name}/{config.seed}/{self.split}/{index}/{attempt}".encode()
        # Each draw below uses up its range; 16 spare bytes keep the bias of every draw under 2^-120.
        pool = int.from_bytes(hashlib.shake_256(key).digest(16 + 9 * config.max_terms), "big")
        pool, extra = divmod(pool, config.max_terms - config.min_terms + 1)
        numbers, operators = [], []
        for _ in range(config.min_terms + extra):
            pool, more = divmod(pool, config.max_digits - config.min_digits + 1)
            low, high = _range_of(config.min_digits + more)
            pool, value = divmod(pool, high - low)
            pool, sign = divmod(pool, len(config.operators))
            numbers.append(low + value)
            operators.append(config.operators[sign])
        return numbers, operators[1:]


def problem_text(numbers: list[int], operators: list[str]) -> str:
    """``[9, 9, 8]``, ``["-", "+"]`` → ``"9-9+8="``."""
    return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(operators, numbers[1:])) + "="


def running_results(numbers: list[int], operators: list[str], modulus: int | None) -> list[int]:
    """The result after each operation, from left to right, reduced to [0, modulus) where there is a modulus."""
    results, total = [], numbers[0]
    for sign, number in zip(operators, numbers[1:]):
        total = total * number if sign == "*" else total + number if sign == "+" else total - number
        total = total if modulus is None else total % modulus
        results.append(total)
    return results


def wrong_value(right: int, draw: int, modulus: int | None) -> int:
    """A value other than ``right``, chosen by ``draw`` ≥ 0: any other residue, or a near integer where there is no modulus."""
    if modulus is not None:
        return (right + 1 + draw % (modulus - 1)) % modulus
    return right + (-1) ** (draw % 2) * (1 + draw // 2 % 9)


def once(lines: list[str]) -> list[str]:
    """The lines without those that restate the one before."""
    return [line for before, line in zip(["", *lines], lines) if line != f"={before}"]


def _with_answer(values: list[int], place: int) -> list[str]:
    """One value per line, and the one at ``place`` as the answer."""
    return [*map(str, values), f"#{values[place]}"]


def _range_of(digits: int) -> tuple[int, int]:
    """[low, high) of the numbers with this many digits; one digit includes 0."""
    return (0 if digits == 1 else 10 ** (digits - 1)), 10**digits


def _same_integer(stated: str, gold: str) -> bool:
    """Compare as text without leading zeros: a model may write more digits than int() accepts."""
    return re.sub(r"\A(-?)0+(?=[0-9])", r"\1", stated) == gold
