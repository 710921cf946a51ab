"""Chakra execution traces (MLCommons) as a workload: the JSON of their nodes → a `Job` for `workload.replay`.

    job = read_chakra(Path("traces"), per_host=8)

A folder holds a file per rank, ``NAME.<rank>.json``, as ``chakra_jsonizer`` writes it from ``NAME.<rank>.et``: one JSON object
after another, or a list of nodes, or an object with a list ``nodes``. Nodes of ``type`` COMM_COLL_NODE count, with the
attributes ``comm_type``, ``comm_size`` (bytes of the rank's input, as the converters write it) and ``pg_name``. Which
ranks a ``pg_name`` has is said by ``comm_group.json`` beside the files ({"pg": [0, 1]}, ASTRA-sim's form), or else taken from the
ranks whose files name it. Chakra does not say which ranks share a host: they are taken to be numbered host by host, `per_host`
on each.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ncclx_py.watch.model import COLUMNS, COMPLETED, Asked, Group, Job, RankTrace

GROUPS = "comm_group.json"
_NAME = re.compile(r"(?:.*[^0-9])?(\d{1,7})\.(json|et)")
_SPACE = re.compile(r"\s+")
_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "all_gather",
    "gather",
    "scatter",
    "broadcast",
    "all_to_all",
    "reduce_scatter",
    "reduce_scatter",  # REDUCE_SCATTER_BLOCK
    "barrier",
)  # by CollectiveCommType of et_def.proto
_NAMED = {name.upper(): name for name in _COLLECTIVES} | {"REDUCE_SCATTER_BLOCK": "reduce_scatter"}
_TYPES = {5: "COMM_SEND_NODE", 6: "COMM_RECV_NODE", 7: "COMM_COLL_NODE"}
_MESSAGES = {"COMM_SEND_NODE": "send", "COMM_RECV_NODE": "recv"}
_JSONIZE = "chakra_jsonizer --input_filename FILE.et --output_filename FILE.json (pip install of mlcommons/chakra)"
_MOST = 1 << 20  # ranks
_DIGITS = 15  # of a number of bytes, or of microseconds
_EVERYONE = ""  # the group of nodes that name none

_Call = tuple[str, Asked, int, int]  # group, what was asked for, start and end in ns


def is_chakra(folder: Path) -> bool:
    """Whether the folder holds files that are named like Chakra's, per rank."""
    return folder.is_dir() and any(_NAME.fullmatch(entry.name) for entry in folder.iterdir())


def read_chakra(folder: Path, per_host: int) -> Job:
    """Raises ValueError, which names file, place and remedy, for what cannot be read."""
    files: dict[int, Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _NAME.fullmatch(entry.name)
        if match is None:
            continue
        rank = int(match[1])
        if match[2] == "et":
            if not entry.with_suffix(".json").exists():
                raise ValueError(
                    f"{entry} is Chakra's protobuf form, which is not read here. Make JSON of it: {_JSONIZE}."
                )
            continue
        if rank in files:
            raise ValueError(f"{entry} and {files[rank]} are both of rank {rank}: keep one file per rank.")
        files[rank] = entry
    calls = {rank: _calls(file) for rank, file in files.items()}
    members = _members(folder, calls)
    world = max((*files, *(rank for ranks in members.values() for rank in ranks))) + 1
    if world == 1:
        raise ValueError(
            f"{folder}: one file of rank 0 does not say how many ranks the job had: add the files of the others, or {GROUPS}."
        )
    if world > _MOST:
        raise ValueError(f"{folder}: a rank is {world - 1}: at most {_MOST - 1} can be.")
    groups = [Group(name or "all", ranks) for name, ranks in {**members, _EVERYONE: tuple(range(world))}.items()]
    places = {name: number for number, name in enumerate((*members, _EVERYONE))}
    asked = list(dict.fromkeys(one for found in calls.values() for _, one, _, _ in found))
    kinds = {one: number for number, one in enumerate(asked)}
    ranks = {
        rank: _trace(rank, world, per_host, files[rank], found, groups, places, kinds) for rank, found in calls.items()
    }
    return Job(ranks, world, asked, [""], groups, [])


def _trace(
    rank: int,
    world: int,
    per_host: int,
    file: Path,
    calls: list[_Call],
    groups: list[Group],
    places: Mapping[str, int],
    kinds: Mapping[Asked, int],
) -> RankTrace:
    mine = tuple(group for group in groups if rank in group.ranks)
    table = {name: np.zeros(len(calls), np.int64) for name in COLUMNS}
    table["group"][:] = [places[name] for name, _, _, _ in calls]
    table["asked"][:] = [kinds[one] for _, one, _, _ in calls]
    table["seq"][:] = range(1, len(calls) + 1)
    table["state"][:] = COMPLETED
    table["started"][:] = [start for _, _, start, _ in calls]
    table["finished"][:] = [end for _, _, _, end in calls]
    host = f"host{rank // per_host}"
    return RankTrace(rank, world, host, 0, "chakra", "", 0, None, True, mine, {}, {}, {}, (), str(file), table=table)


def _members(folder: Path, calls: Mapping[int, list[_Call]]) -> dict[str, tuple[int, ...]]:
    """The ranks of each named group."""
    naming: defaultdict[str, set[int]] = defaultdict(set)
    for rank, found in calls.items():
        for name, _, _, _ in found:
            naming[name].add(rank)
    naming.pop(_EVERYONE, None)
    stated: dict[str, tuple[int, ...]] = {}
    if (path := folder / GROUPS).exists():
        table = _json(path)[0]
        try:
            stated = {str(name): tuple(sorted(_whole(rank) for rank in ranks)) for name, ranks in table.items()}
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f'{path}: write {{"group": [ranks, …], …}} ({error}).') from error
        if unknown := sorted(naming.keys() - stated.keys()):
            raise ValueError(f"{path} says nothing of the group {unknown[0]!r}, which the traces name: add its ranks.")
    found_ranks = {name: stated.get(name) or tuple(sorted(ranks)) for name, ranks in naming.items()}
    return {**stated, **found_ranks}


def _calls(file: Path) -> list[_Call]:
    """What a rank sent and received, in the order of the file."""
    found: list[_Call] = []
    for node in _nodes(file):
        where = f"{file}: node {node.get('id', '?')}"
        kind = node.get("type")
        kind = _TYPES.get(kind, "") if isinstance(kind, int) else kind
        if kind not in _TYPES.values():
            continue
        attributes = _attributes(node, where)
        op = _MESSAGES.get(str(kind)) or _collective(attributes.get("comm_type"), where)
        try:
            size = _whole(attributes.get("comm_size", 0))
            start = 1000 * _whole(_either(node, "start_time_micros", "startTimeMicros")) + 1
            length = 1000 * _whole(_either(node, "duration_micros", "durationMicros"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
        size = size or (4 if op == "barrier" else 0)
        group = str(attributes.get("pg_name", _EVERYONE))
        found.append((group, Asked(op, bytes=size), start, start + length))
    return found


def _nodes(file: Path) -> list[dict[str, Any]]:
    objects = _json(file)
    nodes: list[Any] = []
    for one in objects:
        if isinstance(one, list):
            nodes += one
        elif isinstance(one, dict) and isinstance(one.get("nodes"), list):
            if any(isinstance(node, dict) and "attrs" in node for node in one["nodes"]):
                raise ValueError(
                    f"{file} is PyTorch's own execution trace, before it is Chakra's: link and convert it "
                    f"(chakra_trace_link, chakra_converter PyTorch), then {_JSONIZE}."
                )
            nodes += one["nodes"]
        elif isinstance(one, dict):
            nodes.append(one)
    if not nodes or not all(isinstance(node, dict) for node in nodes):
        raise ValueError(f"{file}: no nodes of a Chakra trace in it. Make it with {_JSONIZE}.")
    return nodes


def _json(file: Path) -> list[Any]:
    """The JSON values that stand in a file one after another."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not text: if it is Chakra's protobuf form, make JSON of it: {_JSONIZE}."
        ) from error
    decoder, found, at = json.JSONDecoder(), [], _after_space(text, 0)
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            found.append(value)
            at = _after_space(text, at)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not found:
        raise ValueError(f"{file} is empty.")
    return found


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _attributes(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Name to value; protobuf's JSON has the value under a key that says its type (``int64_val`` or ``int64Val``)."""
    found: dict[str, Any] = {}
    attributes = node.get("attr", [])
    if not isinstance(attributes, list):
        raise ValueError(f"{where}: attr = {attributes!r}: it is a list of objects with name and value.")
    for one in attributes:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise ValueError(f"{where}: attr holds {one!r}: give an object with a name and a value.")
        values = [value for key, value in one.items() if key.endswith(("_val", "Val"))]
        if values:
            found[one["name"]] = values[0]
    return found


def _collective(value: Any, where: str) -> str:
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]
    # proto3's JSON leaves out what is zero: no comm_type is ALL_REDUCE.
    try:
        return _COLLECTIVES[_whole(0 if value is None else value)]
    except (ValueError, IndexError):
        known = ", ".join(_NAMED)
        raise ValueError(
            f"{where}: comm_type = {value!r}: known are 0 to {len(_COLLECTIVES) - 1}, or {known}."
        ) from None


def _either(node: Mapping[str, Any], *names: str) -> Any:
    return next((node[name] for name in names if name in node), 0)


def _whole(value: Any) -> int:
    """A whole number, which protobuf's JSON may write as text. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).isdecimal():
        raise ValueError(f"{value!r} is no whole number")
    if len(str(value)) > _DIGITS:
        raise ValueError(f"{str(value)[:40]!r} is too large")
    return int(value)
