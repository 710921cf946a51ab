"""Turns any strided tensor of any dtype into the flat buffer that a library can move or reduce, and back.

Plans and NCCL want contiguous memory and know a dozen dtypes. So every tensor passes through here. A contiguous tensor
of a known dtype costs nothing (its buffer is a view); anything else is copied once in each direction, which also makes
ranks with different strides agree. A reduction's `Recipe` is applied on the way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ncclx_py.runtime.reduction import Recipe

AS_IT_IS = Recipe(None)
_PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}


class Staging:
    """The buffers of one collective, and what must follow it (`finish`).

    `wire` are the dtypes that the library takes; complex numbers travel as their two parts, all others as bytes. All
    buffers are one-dimensional.
    """

    def __init__(self, wire: frozenset[torch.dtype]) -> None:
        self._wire = wire
        self._after: list[Callable[[], None]] = []

    @property
    def finish(self) -> Callable[[], None] | None:
        """Divides and copies back in the order they were asked for; None when there is nothing to do."""
        return self._run if self._after else None

    def source(self, tensor: Tensor, recipe: Recipe = AS_IT_IS) -> Tensor:
        """The elements of `tensor`, to be read by the library."""
        return self._as_wire(_prepared(plain(tensor), recipe))

    def scratch(self, tensor: Tensor, recipe: Recipe = AS_IT_IS) -> Tensor:
        """Like `source`, but the library may overwrite the buffer: `tensor` is left alone."""
        buffer = self.source(tensor, recipe)
        return buffer.clone() if buffer.data_ptr() == tensor.data_ptr() else buffer

    def target(self, tensor: Tensor, recipe: Recipe = AS_IT_IS) -> Tensor:
        """A buffer for the library to fill; the elements end up in `tensor`."""
        if is_plain(tensor) and recipe.carrier is None:
            buffer = plain(tensor)
        else:
            dtype = recipe.carrier or tensor.dtype
            buffer = torch.empty(tensor.numel(), dtype=dtype, device=tensor.device)
        return self._returning(buffer, [tensor], recipe)

    def both(self, tensor: Tensor, recipe: Recipe = AS_IT_IS) -> Tensor:
        """A buffer with the elements of `tensor`, read and then overwritten by the library."""
        return self._returning(_prepared(plain(tensor), recipe), [tensor], recipe)

    def packed(self, tensors: list[Tensor], recipe: Recipe = AS_IT_IS) -> Tensor:
        """Like `both`, with the elements of all `tensors`, which have one dtype, end to end."""
        joined = torch.cat([plain(tensor) for tensor in tensors])
        return self._returning(_prepared(joined, recipe), tensors, recipe)

    def landing(self, tensors: list[Tensor]) -> Tensor:
        """Like `target`, for the elements of all `tensors`, which have one dtype, end to end."""
        length = sum(tensor.numel() for tensor in tensors)
        buffer = torch.empty(length, dtype=tensors[0].dtype, device=tensors[0].device)
        return self._returning(buffer, tensors, AS_IT_IS)

    def _returning(self, buffer: Tensor, tensors: list[Tensor], recipe: Recipe) -> Tensor:
        """Registers what brings `buffer` back into `tensors`: the division first, then the copies that are needed."""
        divisor = recipe.divisor
        if divisor is not None:
            self._after.append(lambda: _divide(buffer, divisor))
        parts = [buffer] if len(tensors) == 1 else buffer.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            if part.data_ptr() != tensor.data_ptr():
                self._after.append(lambda tensor=tensor, part=part: _write(tensor, part))  # type: ignore[misc]
        return self._as_wire(buffer)

    def _run(self) -> None:
        for action in self._after:
            action()

    def _as_wire(self, flat: Tensor) -> Tensor:
        if flat.dtype in self._wire:
            return flat
        return flat.view(_PARTS.get(flat.dtype, torch.uint8))


def is_plain(tensor: Tensor) -> bool:
    """Whether the memory of `tensor` holds its elements in order, with no pending conjugation or sign."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def plain(tensor: Tensor) -> Tensor:
    """The elements of `tensor` in order, one-dimensional; a view where possible, else a copy."""
    flat = tensor.detach()
    if not flat.numel():  # may have strides that no dtype view accepts
        return torch.empty(0, dtype=flat.dtype, device=flat.device)
    if not is_plain(flat):
        flat = flat.resolve_conj().resolve_neg().contiguous()
    if flat.numel() == 1:  # is contiguous whatever its stride, which no dtype view accepts
        return flat.as_strided((1,), (1,))
    return flat.view(-1)


def _prepared(flat: Tensor, recipe: Recipe) -> Tensor:
    """`flat` in the dtype that travels, multiplied by the recipe's factor; itself where there is nothing to do."""
    if recipe.carrier is not None:
        flat = flat.to(recipe.carrier)
    return flat if recipe.factor is None else flat * recipe.factor


def _divide(buffer: Tensor, divisor: int) -> None:
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        buffer.div_(divisor)
    _hold(buffer)


def _write(tensor: Tensor, part: Tensor) -> None:
    """Copies and casts; grad and inference modes are per thread, and this may be any thread."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(part.view(tensor.shape))
    _hold(part)
    _hold(tensor)


def _hold(tensor: Tensor) -> None:
    """On CUDA this runs on a side stream: the memory may not be reused before that stream is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
