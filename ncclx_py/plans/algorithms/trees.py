"""Shapes of trees over positions 0 to size − 1: binomial, and a pair of binary ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Node(NamedTuple):
    """The neighbours of one position; `parent` is None at the root."""

    parent: int | None
    children: tuple[int, ...]


def binomial(size: int, position: int) -> Node:
    """The binomial tree with root 0; children with the largest subtree come first."""
    low = position & -position if position else 1 << max(size - 1, 0).bit_length()
    children = []
    step = low >> 1
    while step:
        if position + step < size:
            children.append(position + step)
        step >>= 1
    return Node(position - low if position else None, tuple(children))


def double_binary_trees(size: int, position: int) -> tuple[Node, Node]:
    """Two binary trees: the second is the first mirrored (even size) or shifted by one (odd size), as in NCCL."""
    first = _binary(size, position)
    if size % 2 == 0:
        mirrored = _binary(size, size - 1 - position)
        return first, _renamed(mirrored, lambda other: size - 1 - other)
    shifted = _binary(size, (position - 1) % size)
    return first, _renamed(shifted, lambda other: (other + 1) % size)


def _binary(size: int, position: int) -> Node:
    """The tree in which position p, with lowest set bit b, is the parent of p − b/2 and p + b/2; the root is 0.

    Where p + b/2 is beyond the end, the next smaller power of two that is not takes its place.
    """
    if position == 0:
        top = 1 << max(size - 1, 0).bit_length() >> 1
        return Node(None, (top,) if size > 1 else ())
    low = position & -position
    parent = (position ^ low) | (low << 1)
    children = [position - (low >> 1)] if low > 1 else []
    step = low >> 1
    while step and position + step >= size:
        step >>= 1
    if step:
        children.append(position + step)
    return Node(parent if parent < size else position ^ low, tuple(children))


def _renamed(node: Node, name: Callable[[int], int]) -> Node:
    return Node(None if node.parent is None else name(node.parent), tuple(name(child) for child in node.children))
