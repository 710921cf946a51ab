"""Distilling the Essence (arXiv 2512.21002): supervise the part of a sequence that teaches most.

A sequence is  prompt | thought | answer.  Of the chosen sections the first (``side=left``), middle or last share x of the
tokens counts:

    L = Σ_{t in kept} ρ·D(p_t, q_t) + (1 − ρ)·(−log q(y_t)),      |kept| = max(1, ⌊x·n⌋)

Findings: the thought alone is enough, and the first half keeps some 91 to 94 % of the gain at half of the cost. The half
of the cost is saved here too: what follows the last kept token cannot influence it and is cut off before the forward
pass.

The answer starts at ``answer_start`` where that is set, else behind ``thought_end`` (which is part of the thought); a
response without the mark is all thought. The share of responses that have it is logged as ``sample/essence_marked``.

Evidence: sections, x, sides and ρ = 0.5 with forward KL exact, from the authors' code. Two departures: n counts the
tokens of the chosen sections (``of=sections``; the authors' count is that of the whole sequence, ``of=sequence``),
because a short response behind a long prompt would otherwise keep nothing; and the middle and the end are learned in
their context, which the authors' code cuts away. Options: ``conf/method/essence.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from distill.config import in_range, one_of
from distill.data.tokenize import TokenSequence
from distill.errors import ConfigError
from distill.methods.base import DivergenceSpec, Method, Source, Targets, TokenLosses
from distill.methods.parts import AnyTextSpec

SECTIONS = ("prompt", "thought", "answer")


@dataclass(kw_only=True)
class EssenceConfig(AnyTextSpec):
    name: str = "essence"
    sections: list[str] = field(default_factory=lambda: ["thought", "answer"])
    fraction: float = 0.5
    side: str = "left"
    of: str = "sections"
    thought_end: str = "</think>"
    answer_start: str | None = None
    distill_ratio: float = 0.5
    divergence: DivergenceSpec = field(default_factory=DivergenceSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        for section in self.sections:
            one_of("method.sections", section, SECTIONS)
        if not self.sections or not (self.answer_start or self.thought_end):
            raise ConfigError("method.sections must name a section, and one of the marks between them must be set")
        in_range("method.fraction", self.fraction, low=1e-6, high=1.0)
        one_of("method.side", self.side, ("left", "middle", "right"))
        one_of("method.of", self.of, ("sections", "sequence"))
        in_range("method.distill_ratio", self.distill_ratio, low=0.0, high=1.0)


class Essence(Method):
    Config = EssenceConfig

    def __init__(self, config: EssenceConfig) -> None:
        self.config = config
        self.needs = frozenset({"teacher"} if config.distill_ratio > 0 else ())
        parts = {"divergence": config.distill_ratio > 0, "tokens": config.distill_ratio < 1}
        self.reads = frozenset(part for part, counts in parts.items() if counts)

    def source(self, sample: int, seed: int, progress: float = 0.0) -> Source:
        return Source(self.config.text)

    def supervise(self, sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
        options = self.config
        response = sequence.response_ids
        split, marked = answer_begins(tokenizer, response, options.answer_start, options.thought_end)
        lengths = {"prompt": sequence.prompt_length, "thought": split, "answer": len(response) - split}
        chosen = [section in options.sections for section, length in lengths.items() for _ in range(length)]
        kept = share_of(chosen, options.fraction, options.side, options.of == "sequence")
        notes = {**sequence.notes, "essence_marked": float(marked), "essence_kept": sum(kept) / max(len(kept), 1)}
        # A supervised prompt is one of which only the first token, which nothing predicts, is given.
        start = min(1, len(kept)) if "prompt" in options.sections else sequence.prompt_length
        end = max((i + 1 for i, keep in enumerate(kept) if keep), default=start)
        end = max(end, start)
        logprobs = sequence.logprobs if start == sequence.prompt_length else None
        return replace(
            sequence,
            ids=sequence.ids[:end],
            prompt_length=start,
            supervised=kept[start:end],
            logprobs=None if logprobs is None else logprobs[: end - start],
            notes=notes,
        )

    @property
    def signals(self) -> frozenset[str]:
        return self.config.divergence.signals

    def token_losses(self, targets: Targets) -> TokenLosses:
        ratio = self.config.distill_ratio
        if ratio == 1.0:
            return self.config.divergence(targets)
        likelihood = targets.nll(stats=ratio == 0.0)
        if ratio == 0.0:
            return TokenLosses(likelihood.loss, dict(likelihood.stats))
        distilled = self.config.divergence(targets)
        return TokenLosses(ratio * distilled.loss + (1.0 - ratio) * likelihood.loss, distilled.stats)


def share_of(chosen: Sequence[bool], fraction: float, side: str, of_all: bool) -> list[bool]:
    """The tokens that count: a window of max(1, ⌊fraction·n⌋) of the n chosen ones (n of all tokens: the window is of all).

    ``side`` says where the window lies. Nothing chosen keeps nothing.
    """
    candidates = range(len(chosen)) if of_all else [i for i, wanted in enumerate(chosen) if wanted]
    count = max(1, int(len(candidates) * fraction))
    first = {"left": 0, "middle": (len(candidates) - count) // 2, "right": len(candidates) - count}[side]
    window = set(candidates[max(first, 0) : max(first, 0) + count])
    return [wanted and i in window for i, wanted in enumerate(chosen)]


def answer_begins(
    tokenizer: PreTrainedTokenizerBase, response: Sequence[int], answer_start: str | None, thought_end: str
) -> tuple[int, bool]:
    """(number of response tokens before the answer, whether the mark was found).

    A token that holds the end of the thought and the start of the answer counts as thought behind ``thought_end`` and
    as answer at ``answer_start``.
    """
    mark = answer_start or thought_end
    place = _text(tokenizer, response).find(mark)
    if place < 0:
        return len(response), False
    if answer_start:
        return _tokens_within(tokenizer, response, place), True
    return _tokens_within(tokenizer, response, place + len(mark) - 1) + 1, True


def _tokens_within(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], characters: int) -> int:
    """The largest number of leading tokens whose text has at most so many characters."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(_text(tokenizer, ids[:middle])) <= characters:
            low = middle
        else:
            high = middle - 1
    return low


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
