"""Finding stop strings in text that arrives as tokens.

A stop string may begin and end inside tokens, and a character may be spread over several tokens, so it has to be
looked for in decoded text. Decoding every row at every step would cost more than a small model's forward, hence
three sieves: (1) a table over the vocabulary says which tokens can complete a stop string at all, (2) for those, the
last few tokens are decoded, (3) a hit is confirmed on the whole response, so that what ends a row is always true of
its final text.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

_MARGIN = 8
"""Characters decoded before the earliest place where a stop string can start: the first ones of a window may be broken
(part of a character) or short of a space."""
_BROKEN = "\ufffd"


class StopMatcher:
    """Looks for ``stop`` in the decoded responses of one tokenizer (special tokens count with their text)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer, self.stop = tokenizer, tuple(stop)
        self._longest = max(len(text) for text in self.stop)
        self._completes = self._completing(len(tokenizer))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _completing(self, known: int) -> NDArray[np.bool_]:
        """Per token id: could its text hold the last character of a stop string? Unsure counts as yes.

        The last entry stands for ids past the tokenizer's end (padded vocabularies): they have no text.
        """
        last = {text[-1] for text in self.stop}
        anchor, anchor_text = self._anchor(known)
        # Decoded after an anchor, as some decoders drop the space of a first token.
        pairs = [[*anchor, token] for token in range(known)]
        texts = self._tokenizer.batch_decode(pairs, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        suspects = np.zeros(known + 1, dtype=bool)
        for token, text in enumerate(texts):
            piece = text[len(anchor_text) :]
            unsure = not text.startswith(anchor_text) or not piece or _BROKEN in piece
            suspects[token] = unsure or any(character in last for character in piece)
        return suspects

    def _anchor(self, known: int) -> tuple[list[int], str]:
        """A token with plain text of its own, for context."""
        for token in range(known):
            text = self._decode([token])
            if text.isalnum() and text.isascii() and self._decode([token, token]) in (text * 2, f"{text} {text}"):
                return [token], text
        return [], ""

    def suspects(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these token ids could complete a stop string."""
        return self._completes[np.minimum(tokens, len(self._completes) - 1)]

    def find(self, response: Sequence[int]) -> str | None:
        """The stop string that the last token of ``response`` completed (the one that starts first), or ``None``.

        Call it for every token that `suspects`; earlier tokens are taken to have been checked.
        """
        # A short response is its own window.
        if len(response) > self._longest + 2 * _MARGIN and not self._in_tail(response):
            return None
        text = self._decode(response)
        found = [(text.find(stop), stop) for stop in self.stop if stop in text]
        return min(found)[1] if found else None

    def _in_tail(self, response: Sequence[int]) -> bool:
        """Whether a stop string that the last token completed shows in a window of the last tokens.

        The window grows until it has room for the longest stop string before the last token's own text.
        """
        enough = len(self._decode(response[-1:])) + self._longest + _MARGIN
        window = enough
        while True:
            text = self._decode(response[-window:])
            if any(stop in text for stop in self.stop):
                return True
            if window >= len(response) or len(text) >= enough:
                return False
            window *= 2
