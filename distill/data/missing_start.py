"""``data=missing_start``: which of two numbers does the chain start from? A wrong choice shows only at the end of its chain.

A problem of four single-digit numbers modulo 10, with two candidates for the first of them, reads::

    3|9+7-3-8=5           the prompt, with the newline after it
    =5                    what the chain has to end in
    9                     the choice
    6                     9 + 7 = 16, modulo 10
    3                     6 - 3
    5                     3 - 8 = -5, modulo 10: as wanted
    #9                    the answer

The choice takes all operations at once, which a small model does badly; every other line is one operation, which it does
well. So a wrong choice looks as good as a right one until its chain has been written and ends elsewhere; and then the place to
go back to is not the last line but the second. Training references show that (``data.flawed``, ``flaws.py``): the other
candidate, its chain up to the last or the last but one line, the marker, the right lines.
"""

from distill.data.config import MissingStartConfig
from distill.data.partition import Split, unit_hash
from distill.data.running_sum import RunningSum, running_results, wrong_value


class MissingStart(RunningSum):
    """One split of the task. Problems are drawn, split and judged as those of ``running_sum``."""

    def __init__(self, config: MissingStartConfig, split: Split) -> None:
        assert config.modulus is not None
        self.modulus = config.modulus
        super().__init__(config, split)

    @property
    def alphabet(self) -> str:
        return super().alphabet + "|"

    def question(self, numbers: list[int], operators: list[str]) -> str:
        start, end = numbers[0] % self.modulus, self._values(numbers, operators)[-1]
        low, high = sorted((start, self.other(numbers, operators)))
        chain = "".join(f"{sign}{number}" for sign, number in zip(operators, numbers[1:]))
        return f"{low}|{high}{chain}={end}"

    def solution(self, numbers: list[int], operators: list[str]) -> list[str]:
        values = self._values(numbers, operators)
        return [f"={values[-1]}", *map(str, values), f"#{values[0]}"]

    def places(self, numbers: list[int]) -> range:
        return range(1, 2)

    def mistaken(self, numbers: list[int], operators: list[str], place: int, draw: int) -> list[str]:
        return [str(value) for value in self._values([self.other(numbers, operators), *numbers[1:]], operators)]

    def other(self, numbers: list[int], operators: list[str]) -> int:
        """The wrong candidate: any other residue, all equally likely."""
        share = unit_hash(f"{numbers} {operators}")
        return wrong_value(numbers[0] % self.modulus, int(share * (self.modulus - 1)), self.modulus)

    def _values(self, numbers: list[int], operators: list[str]) -> list[int]:
        """The start and the result of each operation."""
        start = numbers[0] % self.modulus
        return [start, *running_results([start, *numbers[1:]], operators, self.modulus)]
