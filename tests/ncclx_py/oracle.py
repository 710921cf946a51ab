"""Known inputs, and what each collective must make of them: computed on every rank from all ranks' seeds, with no
communication, in Python integers and double precision."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32]
OTHERS = [torch.bool, torch.float8_e4m3fn, torch.complex64]
DTYPES = FLOATS + INTEGERS + OTHERS

SHAPES = [(6, 4), (5,), (), (0,), (0, 3)]

SENTINEL = 77  # surrounds strided tensors; collectives must not touch it


def data(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: object = "") -> Tensor:
    """The input of `rank`: small integers (0 to 4, or -4 to 4 where the dtype is signed), exact in every dtype."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{rank} {shape} {salt}".encode()))
    signed = dtype.is_floating_point or dtype.is_complex or dtype.is_signed
    values = torch.randint(-4 if signed else 0, 5, shape, generator=generator)
    if dtype == torch.bool:
        return values > 1
    if dtype.is_complex:
        return torch.complex(values.float(), values.flip(0).float() if shape else values.float() + 1).to(dtype)
    return values.to(dtype)


def reduced(inputs: list[Tensor], op: str) -> Tensor:
    """`inputs` reduced element by element, in Python numbers, then put into the dtype."""
    dtype, shape = inputs[0].dtype, inputs[0].shape
    columns = zip(*[_numbers(tensor) for tensor in inputs])
    values = [_REDUCE[op](list(column)) for column in columns]
    if dtype == torch.bool:
        values = [bool(value) for value in values]
    elif not (dtype.is_floating_point or dtype.is_complex):
        bits = torch.iinfo(dtype).bits
        values = [_wrapped(value, bits, dtype.is_signed) for value in values]
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype
    return torch.tensor(values, dtype=wide).to(dtype).reshape(shape)


def supported(op: str, dtype: torch.dtype) -> bool:
    """Whether the reduction has a meaning that the backend promises on CPU tensors."""
    real_float = dtype.is_floating_point
    if op == "AVG":
        return real_float or dtype.is_complex
    if op in ("BAND", "BOR", "BXOR"):
        return not real_float and not dtype.is_complex
    if dtype.is_complex:
        return op == "SUM"
    return True


def laid_out(tensor: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(`tensor` with the same elements in another memory layout, the memory around it)."""
    if layout == "plain" or tensor.dim() == 0:
        copy = tensor.clone()
        return copy, copy
    around = torch.full(tuple(size * 2 + 1 for size in tensor.shape), SENTINEL).to(tensor.dtype)
    if layout == "transposed":
        around = around.permute(*reversed(range(around.dim()))).contiguous().permute(*reversed(range(around.dim())))
    view = around[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view, around


def untouched(view: Tensor, around: Tensor) -> bool:
    """Whether the elements of `around` that are not in `view` still hold the sentinel."""
    if view is around:
        return True
    rest = around.clone()
    rest[tuple(slice(1, None, 2) for _ in view.shape)] = torch.tensor(SENTINEL).to(rest.dtype)
    return bool((rest.to(torch.complex128) == torch.tensor(SENTINEL).to(rest.dtype).to(torch.complex128)).all())


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit; an AVG may differ by one rounding, see `close`."""
    return actual.dtype == expected.dtype and actual.shape == expected.shape and _bits(actual) == _bits(expected)


def close(actual: Tensor, expected: Tensor) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not (actual.dtype.is_floating_point or actual.dtype.is_complex):
        return same(actual, expected)
    wide = torch.complex128 if actual.dtype.is_complex else torch.float64
    epsilon = torch.finfo(actual.dtype).eps
    return bool(torch.allclose(actual.to(wide), expected.to(wide), rtol=2 * epsilon, atol=epsilon / 8))


def _bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def _numbers(tensor: Tensor) -> list[object]:
    wide = tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor
    return wide.reshape(-1).tolist()


def _wrapped(value: int, bits: int, signed: bool) -> int:
    value %= 1 << bits
    return value - (1 << bits) if signed and value >= 1 << (bits - 1) else value


def _fold(step: Callable[[int, int], int]) -> Callable[[list], int]:
    def run(values: list) -> int:
        result = int(values[0])
        for value in values[1:]:
            result = step(result, int(value))
        return result

    return run


_REDUCE: dict[str, Callable[[list], object]] = {
    "SUM": sum,
    "AVG": lambda values: sum(values) / len(values),
    "PRODUCT": math.prod,
    "MIN": min,
    "MAX": max,
    "BAND": _fold(lambda a, b: a & b),
    "BOR": _fold(lambda a, b: a | b),
    "BXOR": _fold(lambda a, b: a ^ b),
}
OPS = list(_REDUCE)
