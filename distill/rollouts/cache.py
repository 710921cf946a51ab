"""Key-value storage with a length per row: the memory behind decoding, rewinding and teacher prefill.

Each layer owns one key and one value buffer ``[slots, heads, capacity, head_dim]``, allocated once and grown in
blocks. New keys and values are written in place, attention reads a view of the first rows and columns, so nothing is
concatenated or copied per token. A row is rewound by lowering its length: what lies beyond is masked, then overwritten.

Attention wants its rows side by side. A *place* is a physical row; `move` and `swap` let the owner of the cache
keep the rows in use at the front, so that the batch shrinks as rows finish.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens for some rows: row ``i`` gets ``counts[i]`` tokens after its first ``starts[i]`` ones.

    The tokens are packed (no padding), in row order: ``ids``, ``positions`` (absolute) and ``place`` (which row of the
    cache) are int64 tensors [N] on the model's device. ``padded`` [N] maps packed tokens into a right-padded
    [rows, width] grid; it is ``None`` when the grid has no holes.
    """

    ids: Tensor
    positions: Tensor
    place: Tensor
    padded: Tensor | None
    places: Ints
    starts: Ints
    width: int
    extent: int
    """Columns of the cache that the longest row needs, new tokens included."""
    adjoining: bool
    """The places are consecutive, so the cache can be read without a copy."""
    _targets: dict[int, Tensor] = field(default_factory=dict)

    def targets(self, heads: int, capacity: int) -> Tensor:
        """Where each (token, head) goes in a buffer [slots, heads, capacity, size], counted in vectors: [N * heads]."""
        found = self._targets.get(heads)
        if found is None:
            head = torch.arange(heads, device=self.place.device)
            found = ((self.place.unsqueeze(1) * heads + head) * capacity + self.positions.unsqueeze(1)).view(-1)
            self._targets[heads] = found
        return found

    @property
    def rows(self) -> int:
        return len(self.places)

    @property
    def fresh(self) -> bool:
        """No row has a past, so attention needs nothing but the chunk itself."""
        return self.width > 1 and not self.starts.any()

    def pad(self, packed: Tensor) -> Tensor:
        """[N, ...] → [rows, width, ...], zeros in the holes."""
        if self.padded is None:
            return packed.view(self.rows, self.width, *packed.shape[1:])
        grid = packed.new_zeros(self.rows * self.width, *packed.shape[1:])
        return grid.index_copy_(0, self.padded, packed).view(self.rows, self.width, *packed.shape[1:])

    def pack(self, grid: Tensor) -> Tensor:
        """[rows, width, ...] → [N, ...], the inverse of `pad`."""
        flat = grid.reshape(self.rows * self.width, *grid.shape[2:])
        return flat if self.padded is None else flat.index_select(0, self.padded)

    def mask(self, dtype: torch.dtype, blocked: float) -> Tensor:
        """Additive causal mask [rows, 1, width, extent]: 0 where a query may look, ``blocked`` elsewhere.

        Queries in holes look at their row's past as well, so that no row of the mask is fully blocked.
        """
        device = self.ids.device
        if self.width == 1:
            queries = self.positions.unsqueeze(1)
        else:
            first = torch.from_numpy(self.starts).to(device)
            queries = first.unsqueeze(1) + torch.arange(self.width, device=device)
        hidden = torch.arange(self.extent, device=device) > queries.unsqueeze(-1)
        return torch.where(hidden, torch.tensor(blocked, dtype=dtype, device=device), 0.0).unsqueeze(1)


class KVCache:
    """Keys and values of up to ``slots`` rows of at most ``limit`` tokens, for ``layers`` layers.

    Buffers take dtype, head count and head size from the first write, so one class serves MHA, GQA and models whose
    keys and values differ in size. ``lengths[place]`` is the number of valid tokens of a place.
    """

    def __init__(self, layers: int, slots: int, limit: int, *, block: int = 128) -> None:
        self.slots, self.limit, self.block = slots, limit, block
        self.capacity = 0
        self.lengths: Ints = np.zeros(slots, dtype=np.int64)
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def reserve(self, length: int) -> None:
        """Make room for rows of ``length`` tokens, in blocks and by at least half the present capacity.

        Raises ``ValueError`` when ``length`` exceeds the limit.
        """
        if length > self.limit:
            raise ValueError(f"a row of {length} tokens does not fit the key-value cache: its limit is {self.limit}")
        if length <= self.capacity:
            return
        wanted = max(length, self.capacity + self.capacity // 2)
        self.capacity = min(self.limit, -(-wanted // self.block) * self.block)
        used = int(self.lengths.max())
        for layer, pair in enumerate(self._buffers):
            if pair is not None:
                self._buffers[layer] = (self._grown(pair[0], used), self._grown(pair[1], used))

    def _grown(self, old: Tensor, used: int) -> Tensor:
        # Zeros, never uninitialised memory: masked columns get weight 0, and 0 * NaN would still be NaN.
        with torch.inference_mode(False), torch.no_grad():
            new = old.new_zeros(self.slots, old.shape[1], self.capacity, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
        return new

    def rewind(self, place: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a place; costs nothing and recomputes nothing."""
        if not 0 <= length <= self.lengths[place]:
            raise ValueError(f"cannot rewind place {place} to {length} tokens: it holds {self.lengths[place]}")
        self.lengths[place] = length

    def write(self, layer: int, chunk: Chunk, keys: Tensor, values: Tensor) -> None:
        """Store the chunk's packed ``keys`` and ``values`` [N, heads, head_dim] of one layer, in place."""
        pair = self._buffers[layer]
        if pair is None:
            pair = self._buffers[layer] = (self._empty(keys), self._empty(values))
        for buffer, new in zip(pair, (keys, values)):
            heads, size = new.shape[1:]
            buffer.view(-1, size).index_copy_(0, chunk.targets(heads, self.capacity), new.reshape(-1, size))

    def _empty(self, new: Tensor) -> Tensor:
        # Ordinary tensors even when first written in inference mode, so that later writes may come from outside it.
        with torch.inference_mode(False):
            return torch.zeros(
                (self.slots, new.shape[1], self.capacity, new.shape[2]), dtype=new.dtype, device=new.device
            )

    def read(self, layer: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, extent, head_dim] of the chunk's rows: views where the places adjoin."""
        pair = self._buffers[layer]
        assert pair is not None, "read before write"
        if chunk.adjoining:
            first, end = int(chunk.places[0]), int(chunk.places[0]) + chunk.rows
            return pair[0][first:end, :, : chunk.extent], pair[1][first:end, :, : chunk.extent]
        where = torch.from_numpy(chunk.places).to(pair[0].device)
        return pair[0][:, :, : chunk.extent].index_select(0, where), pair[1][:, :, : chunk.extent].index_select(
            0, where
        )

    def move(self, source: int | Ints, target: int | Ints) -> None:
        """Copy rows onto other places, whose content is lost; the sources keep their own. One place each, or several pairs."""
        self._copy(np.atleast_1d(source), np.atleast_1d(target))

    def swap(self, one: int | Ints, other: int | Ints) -> None:
        """Exchange rows: two, or several pairs at the cost of one call per buffer."""
        ones, others = np.atleast_1d(one), np.atleast_1d(other)
        self._copy(np.concatenate([others, ones]), np.concatenate([ones, others]))

    def _copy(self, sources: Ints, targets: Ints) -> None:
        """All sources are read before any target is written."""
        length = int(self.lengths[sources].max())
        self.lengths[targets] = self.lengths[sources]
        for pair in self._buffers:
            for buffer in pair or ():
                read, write = (torch.from_numpy(each).to(buffer.device) for each in (sources, targets))
                used = buffer[:, :, :length]
                used.index_copy_(0, write, used.index_select(0, read))

    def chunk(self, places: Ints, tokens: list[Ints], device: torch.device) -> Chunk:
        """Describe ``tokens[i]`` as the continuation of ``places[i]`` and make room for it (lengths do not change)."""
        starts = self.lengths[places]
        if all(len(new) == 1 for new in tokens):
            return self.single(places, np.concatenate(tokens), device)
        counts = np.array([len(new) for new in tokens], dtype=np.int64)
        width, extent = int(counts.max()), int((starts + counts).max())
        self.reserve(extent)
        row = np.repeat(np.arange(len(places)), counts)
        column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = starts[row] + column
        packed = np.stack([np.concatenate(tokens), positions, places[row]])
        ids, where, place = torch.from_numpy(packed).to(device)
        holes = len(row) != len(places) * width
        padded = torch.from_numpy(row * width + column).to(device) if holes else None
        return Chunk(ids, where, place, padded, places, starts, width, extent, _adjoin(places))

    def single(self, places: Ints, ids: Ints, device: torch.device) -> Chunk:
        """`chunk` for exactly one token per row: the decode step, kept free of per-row Python work."""
        starts = self.lengths[places]
        extent = int(starts.max()) + 1
        self.reserve(extent)
        token, position, place = torch.from_numpy(np.stack([ids, starts, places])).to(device)
        return Chunk(token, position, place, None, places, starts, 1, extent, _adjoin(places))


def _adjoin(places: Ints) -> bool:
    return bool(places[-1] - places[0] == len(places) - 1 and (places[1:] > places[:-1]).all())
