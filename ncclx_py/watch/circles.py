"""Circles in a directed graph, which are deadlocks where an edge means "waits for"."""

from __future__ import annotations

from collections.abc import Mapping


def circles(edges: Mapping[int, list[int]]) -> list[list[int]]:
    """A shortest circle out of each strongly connected part of a graph; Kosaraju's method, without recursion."""
    order: list[int] = []
    seen: set[int] = set()
    for start in edges:
        if start in seen:
            continue
        seen.add(start)
        stack = [(start, iter(edges[start]))]
        while stack:
            node, rest = stack[-1]
            fresh = next((one for one in rest if one not in seen), None)
            if fresh is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(fresh)
                stack.append((fresh, iter(edges[fresh])))
    back: dict[int, list[int]] = {node: [] for node in edges}
    for node, following in edges.items():
        for one in following:
            back[one].append(node)
    found: list[list[int]] = []
    assigned: set[int] = set()
    for root in reversed(order):
        if root in assigned:
            continue
        part = _reachable(root, back, assigned)
        assigned |= part
        if len(part) > 1:
            found.append(_shortest_circle(min(part), edges, part))
    return found


def _reachable(start: int, edges: Mapping[int, list[int]], without: set[int]) -> set[int]:
    part, todo = {start}, [start]
    while todo:
        fresh = {one for one in edges[todo.pop()] if one not in part and one not in without}
        part |= fresh
        todo.extend(fresh)
    return part


def _shortest_circle(start: int, edges: Mapping[int, list[int]], part: set[int]) -> list[int]:
    """From `start` back to it, breadth first, inside a strongly connected `part`."""
    before: dict[int, int] = {}
    todo = [start]
    for node in todo:
        for one in edges[node]:
            if one == start:
                ring = [node]
                while ring[-1] != start:
                    ring.append(before[ring[-1]])
                return ring[::-1]
            if one in part and one not in before:
                before[one] = node
                todo.append(one)
    raise AssertionError("not strongly connected")
