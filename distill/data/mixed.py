"""``data=mixed``: several datasets in turn, each sample with the name of its own as metadata.

    data.parts: {sums: {name: running_sum, share: 2}, start: {name: missing_start}}

Shares are whole numbers: of every three samples here two are of ``sums``. Sample i is of the part whose turn it is and follows
from i alone; no sample of a part comes twice before the end, which the first part to run out decides.
``Example.metadata["part"]`` names the part (``teacher.route=part`` gives each a teacher of its own), and a part judges its own.
"""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from distill.data.config import DataConfigError, MixedConfig, data_config
from distill.data.example import Example, Task, Verdict, check_index
from distill.data.partition import Split

PART = "part"


class Mixed:
    """One split of the parts. Implements :class:`distill.data.example.Task`."""

    def __init__(self, config: MixedConfig, split: Split) -> None:
        from distill.data import build_task

        self.name = f"{config.name}/{split}"
        self.parts: dict[str, Task] = {
            name: build_task(data_config({key: value for key, value in part.items() if key != "share"}), split)
            for name, part in config.parts.items()
        }
        self._names = list(self.parts)
        self._shares = [int(config.parts[name].get("share", 1)) for name in self._names]
        self._ends = list(accumulate(self._shares))
        rounds = [len(self.parts[name]) // share for name, share in zip(self._names, self._shares) if share]
        self._size = min(rounds) * self._ends[-1]
        if not self._size:
            short = next(n for n, share in zip(self._names, self._shares) if share > len(self.parts[n]))
            held = len(self.parts[short])
            raise DataConfigError(
                f"parts.{short}.share", config.parts[short]["share"], f"the {split} split has {held} examples"
            )

    @property
    def alphabet(self) -> str | None:
        """Every character of all parts; None where one of them has no alphabet."""
        alphabets = [getattr(part, "alphabet", None) for part in self.parts.values()]
        return None if None in alphabets else "".join(dict.fromkeys("".join(map(str, alphabets))))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        round_, turn = divmod(check_index(index, self._size, self.name), self._ends[-1])
        number = bisect_right(self._ends, turn)
        share, name = self._shares[number], self._names[number]
        example = self.parts[name][round_ * share + turn - (self._ends[number] - share)]
        return replace(example, metadata={**example.metadata, PART: name})

    def verify(self, example: Example, response: str) -> Verdict:
        """As the part that the example is of."""
        return self.parts[example.metadata[PART]].verify(example, response)
