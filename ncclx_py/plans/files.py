"""Plans as JSON files: written for people and other programs, read with every field checked.

    write_plan(plan, "plan.json")
    plan = read_plan("plan.json", size=8)      # well-formed, for 8 ranks, and verified; else PlanFileError

Fields that have their default are left out; a span is ``[buffer, start, stop]``. A field that is unknown, missing or of
another type is an error that names the place, e.g. ``plan.json: ranks[3].steps[12].src: …``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from ncclx_py.plans.errors import PlanError, PlanFileError
from ncclx_py.plans.plan import Collective, Op, Plan, Problem, RankPlan, Span, Step
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.verify import verify

SCHEMA = "ncclx plan 1"

T = TypeVar("T")


def write_plan(plan: Plan, path: str | Path) -> None:
    """Writes `plan` to a file."""
    Path(path).write_text(plan_to_json(plan) + "\n", encoding="utf-8")


def read_plan(path: str | Path, size: int) -> Plan:
    """The plan in a file, verified. Raises `PlanFileError` when it cannot be read, is for other than `size` ranks or is wrong."""
    plan = load_plan(path)
    check_plan(plan, path, size)
    return plan


def load_plan(path: str | Path) -> Plan:
    """The plan in a file, well-formed. Raises `PlanFileError` when it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanFileError(f"{path} cannot be read: {error}") from error
    return plan_from_json(text, str(path))


def check_plan(plan: Plan, path: str | Path, size: int, topology: Topology | None = None) -> None:
    """Raises `PlanFileError` unless the plan of a file is for `size` ranks and right; with `topology` for these hosts, too."""
    if plan.problem.size != size:
        raise PlanFileError(f"{path}: the plan is for {plan.problem.size} ranks; this group has {size}")
    try:
        verify(plan, topology)
    except PlanError as error:
        raise PlanFileError(f"{path}: the plan is wrong: {error}") from error


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON, one step a line."""
    head = {
        "schema": SCHEMA,
        "algorithm": plan.algorithm,
        "parameters": plan.parameters,
        "problem": _without_defaults(plan.problem),
    }
    ranks = [_rank_to_json(rank_plan) for rank_plan in plan.ranks]
    return f'{json.dumps(head, indent=1)[:-2]},\n "ranks": [\n' + ",\n".join(ranks) + "\n ]\n}"


def _rank_to_json(rank_plan: RankPlan) -> str:
    steps = ",\n".join(f"   {json.dumps(_without_defaults(step))}" for step in rank_plan.steps)
    return f'  {{"rank": {rank_plan.rank}, "scratch": {rank_plan.scratch}, "steps": [\n{steps}\n  ]}}'


def _without_defaults(record: Problem | Step) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {field.name: values[field.name] for field in fields(record) if values[field.name] != field.default}


def plan_from_json(text: str, name: str = "plan") -> Plan:
    """The plan in `text`; `name` is what errors call it.

    Raises `PlanFileError` for a malformed plan. Whether it is right is another question: see `verify`.
    """
    try:
        found = json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # no JSON, a number of thousands of digits, brackets nested too deeply
        raise PlanFileError(f"{name}: is not JSON: {error}") from error
    record = _Record(found, name, "", ("schema", "algorithm", "parameters", "problem", "ranks"))
    if record.get("schema", _string, "") != SCHEMA:
        raise PlanFileError(f"{name}: schema: is {found.get('schema')!r}; this version reads {SCHEMA!r}")
    problem = _problem(record.sub("problem", Problem))
    return Plan(
        problem,
        record.get("algorithm", _string),
        tuple(
            _rank_plan(_Record(entry, name, f"ranks[{index}]", ("rank", "scratch", "steps")))
            for index, entry in enumerate(record.get("ranks", _list))
        ),
        record.get("parameters", _parameters, {}),
    )


def _problem(record: _Record) -> Problem:
    return Problem(
        cast(Collective, record.get("collective", _string)),
        record.get("size", _integer),
        record.get("count", _integer, 0),
        record.get("root", _integer, 0),
        record.get("counts", _integers, ()),
        record.get("matrix", _matrix, ()),
    )


def _rank_plan(record: _Record) -> RankPlan:
    place = f"{record.place}.steps"
    names = [field.name for field in fields(Step)]
    steps = tuple(
        _step(_Record(entry, record.file, f"{place}[{index}]", names))
        for index, entry in enumerate(record.get("steps", _list))
    )
    return RankPlan(record.get("rank", _integer), steps, record.get("scratch", _integer, 0))


def _step(record: _Record) -> Step:
    return Step(
        cast(Op, record.get("op", _string)),
        record.get("lane", _integer, 0),
        record.get("peer", _integer, None),
        record.get("src", _span, None),
        record.get("dst", _span, None),
        record.get("deps", _integers, ()),
        record.get("chunk", _integer, 0),
        record.get("level", _string, "intra"),
        record.get("native", _string, ""),
        record.get("group", _integers, ()),
    )


_MISSING: Any = object()


class _Record:
    """One JSON object, of which the file and the place in it are known."""

    def __init__(self, found: Any, file: str, place: str, names: Sequence[str]) -> None:
        self.file, self.place = file, place
        if not isinstance(found, Mapping):
            raise self._error("", f"must be an object, not {_shown(found)}")
        for name in found:
            if name not in names:
                raise self._error(name, f"is not a known field; known are {', '.join(names)}")
        self._found = found

    def get(self, name: str, read: Callable[[Any], T], default: T = _MISSING) -> T:
        """A field, as `read` returns it. `read` raises `ValueError` with what it should have been."""
        if name not in self._found:
            if default is _MISSING:
                raise self._error(name, "is missing")
            return default
        try:
            return read(self._found[name])
        except ValueError as error:
            raise self._error(name, f"must be {error}, not {_shown(self._found[name])}") from None

    def sub(self, name: str, kind: type[Problem]) -> _Record:
        place = f"{self.place}.{name}" if self.place else name
        return _Record(self.get(name, lambda found: found), self.file, place, [field.name for field in fields(kind)])

    def _error(self, name: str, fault: str) -> PlanFileError:
        place = ".".join(part for part in (self.place, name) if part)
        return PlanFileError(f"{self.file}: {place}: {fault}" if place else f"{self.file}: {fault}")


def _shown(found: Any) -> str:
    text = json.dumps(found)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _integer(found: Any) -> int:
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError("an integer")
    return found


def _string(found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError("a string")
    return found


def _list(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError("a list")
    return found


def _integers(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or any(not isinstance(item, int) or isinstance(item, bool) for item in found):
        raise ValueError("a list of integers")
    return tuple(found)


def _matrix(found: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(found, list):
        raise ValueError("a list of lists of integers")
    return tuple(_integers(row) for row in found)


def _span(found: Any) -> Span:
    if not isinstance(found, list) or len(found) != 3 or not isinstance(found[0], str):
        raise ValueError("a span [buffer, start, stop]")
    return Span(found[0], *_integers(found[1:]))


def _parameters(found: Any) -> dict[str, int]:
    if not isinstance(found, Mapping):
        raise ValueError("an object of integers")
    return {name: _integer(value) for name, value in found.items()}
