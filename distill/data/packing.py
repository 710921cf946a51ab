"""Which sequences share a row of a packed batch, and whether a model keeps them apart.

A packed row holds several sequences one after another; their ``position_ids`` restart at 0 and no attention mask is
given. transformers' eager, sdpa and flex attention derive block-diagonal masks from that, for any number of rows; its
flash attention does so for a single row only, and models with convolutions or recurrent state may not do it at all.
``check_packing`` asks the model itself, so that a leak is an error on the first step and not a slightly worse model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of positions into ``lengths``, each row with at most ``capacity`` tokens.

    Needs at most 11/9 of the fewest rows possible, plus one (Johnson, 1973).

    Longest first, into the first row with room; equal lengths keep their order, so the result is deterministic.
    Raises ValueError where one length exceeds ``capacity``.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        if length > capacity:
            raise ValueError(f"sequence {position} has {length} tokens and does not fit into rows of {capacity}")
        row = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(position)
        room[row] -= length
    return rows


class PackingLeak(RuntimeError):
    """A model lets one sequence of a packed row see another."""


@torch.no_grad()
def check_packing(
    forward: Callable[[Tensor, Tensor], Tensor], vocab_size: int, device: torch.device | str, rows: int = 2
) -> None:
    """Feed two packed batches that differ only in sequences which must not be seen; the other logits must be equal.

    Args:
        forward: (input_ids, position_ids), both [rows, 12] int64 → logits [rows, 12, V]. Call the model as training
            does: no attention mask, ``use_cache=False``, dropout off. With ZeRO-3 all ranks must call together.
        vocab_size: tokens are drawn below it.
        rows: how many rows training packs (some attention kernels handle one row only).
    Raises:
        PackingLeak: the logits of an unchanged sequence moved.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (rows, 12), generator=generator)
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 1) % vocab_size
    positions = torch.tensor([*range(5), *range(4), *range(3)]).expand(rows, -1).to(device)
    before, after = (forward(tokens.to(device), positions)[:, 5:].float() for tokens in (ids, other))
    drift = (before - after).abs().max().item()
    if not drift <= 1e-3 * max(before.abs().max().item(), 1e-6):
        raise PackingLeak(
            f"in a packed batch of {rows} rows this model lets a sequence see its neighbours "
            f"(logits move by {drift:.3g}): turn packing off, or choose "
            "attn_implementation=sdpa; flash attention needs one row per micro-batch"
        )
