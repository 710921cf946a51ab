"""The teacher's verdict on steps, with every token fed to it once.

A step's last token is appended but not fed: its logits are the distribution at which the *next* step begins. So the
one prefill of a tick yields the log-probability of every new token, and with the first of them the entropy of the state in
which the step began, for which released code makes a second call.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.rollouts.boundary import Floats, top_k_entropy
from distill.rollouts.cache import Ints
from distill.rollouts.session import Session

_NUMBERS = 1 << 27
"""Logits held at once: 512 MiB of fp32."""


class SharedSession(Session):
    """A session that draws only from the first ``vocabulary`` ids: what one model writes, the other must be able to read
    (checkpoints of one family pad their vocabularies to different sizes).
    """

    def __init__(self, model: PreTrainedModel, *, slots: int, context_length: int, vocabulary: int) -> None:
        super().__init__(model, slots=slots, context_length=context_length)
        self._vocabulary = vocabulary

    @torch.no_grad()
    def step(self, order: Ints) -> Tensor:
        return super().step(order)[:, : self._vocabulary]


def read_steps(
    session: Session, rows: Sequence[int], steps: Sequence[Sequence[int]], top_k: int, vocabulary: int
) -> tuple[Floats, Floats]:
    """Append ``steps[i]`` (at least one token each) to row ``i`` of the teacher's session.

    Returns the log-probability of each token, flat [Σ len(steps[i])], and the entropy [len(rows)] of the state before each
    step; nats. ``vocabulary`` is the teacher's and bounds the memory: what exceeds it comes in several prefills.

    Raises ``FloatingPointError`` where the teacher's logits are not numbers.
    """
    logprobs: list[Floats] = []
    entropy = np.zeros(len(rows))
    for batch in _batches([len(step) for step in steps], max(_NUMBERS // vocabulary, 1)):
        chosen = [rows[i] for i, _, _ in batch]
        new = [steps[i][start:end] for i, start, end in batch]
        logits = session.score(chosen, [ids[:-1] for ids in new])
        session.append(chosen, [ids[-1:] for ids in new])
        begun = [n for n, (_, start, _) in enumerate(batch) if start == 0]
        if begun:
            entropy[[batch[n][0] for n in begun]] = top_k_entropy(torch.stack([logits[n][0] for n in begun]), top_k)
        logprobs.append(_token_logprobs(torch.cat(logits), [token for ids in new for token in ids]))
    found = np.concatenate(logprobs)
    if np.isnan(found).any() or np.isnan(entropy).any():
        raise FloatingPointError("the teacher's logits are not finite; its weights or inputs hold NaN or infinity")
    return found, entropy


def _token_logprobs(logits: Tensor, tokens: list[int]) -> Floats:
    logits = logits.float()
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    return (chosen - logits.logsumexp(-1)).double().cpu().numpy()


def _batches(counts: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces (row, start, end) in order, at most ``most`` tokens per batch; a long row goes on in the next batch."""
    batch: list[tuple[int, int, int]] = []
    room = most
    for row, count in enumerate(counts):
        start = 0
        while start < count:
            end = min(count, start + room)
            batch.append((row, start, end))
            room -= end - start
            start = end
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch
