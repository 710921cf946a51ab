"""The verdict on a job: one word, the ranks that are to blame, where they are, why, and what to do.

    verdict = judge(job)                 # of `read_job`
    verdict.word, verdict.ranks, verdict.remedy

The words are those of NCCLX's analyser where it has one; `cause` says more exactly what was found. A cause is judged
before its consequences: ranks that contradict each other, then those that died, then deadlocks, then ranks that did not
come, then what is stuck though all have come; only where nothing is stuck, what is merely slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ncclx_py.watch import wording
from ncclx_py.watch.graph import PATIENCE, Behind, Findings, Inside, Waits, is_meeting, own_frame
from ncclx_py.watch.grid import Grid
from ncclx_py.watch.inside import locate
from ncclx_py.watch.mismatch import Mismatch, find_mismatch, find_slip
from ncclx_py.watch.model import CONNECTING, Asked, Group, Job, Open, Place, plural
from ncclx_py.watch.order import find_departure
from ncclx_py.watch.peers import Fate, common_cause, crashed, fate, left
from ncclx_py.watch.slow import find_slow_links, find_slow_rank

ALL_GOOD = "ALL_GOOD"
STUCK_OUTSIDE = "JOB_STUCK_OUTSIDE_NCCL"
NOT_JOINED = "RANK_NOT_JOIN"
CRASHED = "RANK_CRASHED"
MISMATCH = "JOB_CONTAINS_COLL_METADATA_MISMATCH"
DEADLOCK = "JOB_CONTAINS_COLL_DEADLOCK"
STUCK_INSIDE = "JOB_STUCK_IN_NCCL_COLLECTIVE"
STUCK_AT_START = "JOB_STUCK_IN_NCCL_INITIALIZATION"
NAN = "NAN_IN_DATA"
SLOW_RANK = "SOME_RANKS_FISHY"
SLOW_LINK = "NETWORK_PERF_SLOWNESS"


@dataclass(slots=True)
class Verdict:
    """`ranks` are those to look at; `collective` and `call_site` are "" where none is concerned."""

    word: str
    cause: str
    summary: str
    remedy: str
    ranks: list[int] = field(default_factory=list)
    collective: str = ""
    call_site: str = ""
    evidence: list[str] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # ranks that suffer, and are not to blame
    place: Place | None = None

    @property
    def healthy(self) -> bool:
        return self.word == ALL_GOOD

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.word,
            "cause": self.cause,
            "ranks": self.ranks,
            "collective": self.collective,
            "group": self.place.group.name if self.place else "",
            "sequence": self.place.seq if self.place else None,
            "call_site": self.call_site,
            "summary": self.summary,
            "remedy": self.remedy,
            "evidence": self.evidence,
            "waiting": self.waiting,
        }


def judge(job: Job, patience: float = PATIENCE) -> Verdict:
    """`patience`: seconds that a call may be open in a dump that was asked for, before it counts as stuck."""
    waits = Waits(job, patience)
    grids = [grid for group in job.groups if (grid := Grid.of(job, group)) is not None]
    verdict = _data(job, True) or _fault(waits, grids) or _data(job, False) or _slowness(job, grids) or _good(job)
    verdict.evidence += [f"not judged in full: {complaint}" for complaint in job.complaints]
    if job.missing and not set(job.missing) <= set(verdict.ranks):
        verdict.evidence.append(f"no dump of {plural(job.missing)} of {job.world_size}")
    return verdict


def _fault(waits: Waits, grids: list[Grid]) -> Verdict | None:
    job, found = waits.job, waits.find()
    wrong = find_mismatch(job, grids) if found.stalled else None
    if wrong is not None:
        return _mismatch(waits, wrong, found)
    dead = crashed(job)
    if dead:
        return _crash(waits, dead, found)
    if found.circles:
        return _disorder(waits, found) or _deadlock(waits, found)
    if found.behind:
        return _behind(waits, grids, found)
    if found.inside:
        return _inside(waits, found)
    return _before_any_group(job)


def _mismatch(waits: Waits, wrong: Mismatch, found: Findings) -> Verdict:
    right = next((rank for rank in sorted(wrong.asked) if rank not in wrong.odd), None)
    evidence = wording.calls_side_by_side(wrong)
    odd = wrong.odd[0]
    reference = wrong.asked[right] if right is not None else None
    return Verdict(
        MISMATCH,
        wrong.cause,
        wording.mismatch(wrong, reference),
        wording.MISMATCH[wrong.cause] + (wording.TIE if wrong.tie else ""),
        wrong.odd,
        str(wrong.asked[odd] if reference is None else reference),
        wrong.sites.get(odd, ""),
        evidence,
        [rank for rank in found.victims if rank not in wrong.odd],
        wrong.place,
    )


def _crash(waits: Waits, dead: list[Fate], found: Findings) -> Verdict:
    ranks = sorted({one.rank for one in dead})
    place, asked, site = _where_needed(waits, ranks, found)
    traces = [waits.job.ranks[rank] for rank in ranks if rank in waits.job.ranks]
    return Verdict(
        CRASHED,
        "crashed",
        wording.crash(ranks, asked, [trace.detail for trace in traces]),
        wording.RAISED if traces else wording.CRASHED,
        ranks,
        str(asked or ""),
        traces[0].site if traces else site,
        [f"rank {one.rank}: {one.why}" for one in dead[:8]] + wording.waiting_there(waits, place),
        [rank for rank in found.victims if rank not in ranks],
        place,
    )


def _deadlock(waits: Waits, found: Findings) -> Verdict:
    steps = found.circles[0].steps
    odd = waits.minority(found.circles[0])
    call = next(call for rank, call in steps if rank in odd)
    return Verdict(
        DEADLOCK,
        "cycle",
        f"Deadlock: {wording.circle(steps)}.",
        wording.DEADLOCK,
        odd,
        str(call.asked),
        call.site,
        wording.circle_steps(waits, steps),
        [one for one in found.victims if one not in odd],
        call.place,
    )


def _disorder(waits: Waits, found: Findings) -> Verdict | None:
    """A deadlock of which it is known who left the common order of calls."""
    departure = find_departure(waits.job)
    steps = found.circles[0].steps
    if departure is None:
        return None
    culprit = departure.ranks[0]
    mine = next(iter(waits.blocking(culprit)), None)
    others = {rank: call for rank, call in found.stalled if culprit in waits.awaited(call, rank) and rank != culprit}
    if mine is None or not others:
        return None
    call = min(others.values(), key=lambda one: one.since)
    return Verdict(
        DEADLOCK,
        departure.cause,
        wording.disorder(departure, call, mine),
        wording.MISMATCH[departure.cause],
        departure.ranks,
        str(call.asked),
        mine.site,
        [f"a circle of groups: {wording.circle(steps)}", *wording.circle_steps(waits, steps)],
        [rank for rank in found.victims if rank not in departure.ranks],
        call.place,
    )


def _behind(waits: Waits, grids: list[Grid], found: Findings) -> Verdict:
    """Ranks that did not come: they are in the user's program, gone, stopped, or one call short."""
    root = _worst(waits, found.behind)
    job, present = waits.job, [rank for rank in root.ranks if rank in waits.job.ranks]
    absent = [fate(job, rank) for rank in root.ranks if rank not in job.ranks]
    if root.place.is_start:
        return _not_connected(waits, root, absent, found)
    if absent:
        needed = _needed(waits, root, absent)
        if needed and (not present or any(one.what != "silent" for one in needed)):
            return _absent(waits, root, needed, present, found)
        if not present:
            calls = {rank: call for rank in root.waiting for call in waits.blocking(rank) if call.place == root.place}
            found.inside = [*found.inside, Inside(root.place, calls)]
            return _inside(waits, found)
    grid = next((grid for grid in grids if grid.group == root.place.group and not root.place.ends), None)
    slip = find_slip(job, grid, present) if grid and not any(left(job.ranks[rank]) for rank in present) else None
    if slip is not None:
        return _mismatch(waits, slip, found)
    gone = [rank for rank in present if left(job.ranks[rank])]
    blamed = gone or present
    return Verdict(
        NOT_JOINED if gone else STUCK_OUTSIDE,
        "left" if gone else "outside",
        wording.behind(waits, root, blamed, bool(gone)),
        wording.LEFT if gone else wording.outside(waits, root),
        blamed,
        str(_asked_at(waits, root) or ""),
        own_frame(job.ranks[blamed[0]]),
        wording.stacks(job, blamed) + wording.waiting_there(waits, root.place) + wording.cascades(waits, root, found),
        [rank for rank in found.victims if rank not in blamed],
        root.place,
    )


def _absent(waits: Waits, root: Behind, fates: list[Fate], present: list[int], found: Findings) -> Verdict:
    """Ranks without a dump that others wait for; those that are `present` have not come either."""
    ranks = [one.rank for one in fates]
    cause = common_cause(fates)
    asked = _asked_at(waits, root)
    return Verdict(
        CRASHED if cause == "crashed" else NOT_JOINED,
        cause,
        f"{plural(ranks)} {wording.ABSENT[cause]}; {wording.they_wait(root.waiting)} in {asked.op if asked else root.place}.",
        wording.ABSENT_REMEDY[cause],
        ranks,
        str(asked or ""),
        "",
        [f"rank {one.rank}: {one.why}" for one in fates[:8]]
        + wording.waiting_there(waits, root.place)
        + [f"not there either: {line}" for line in wording.stacks(waits.job, present)]
        + wording.cascades(waits, root, found),
        [rank for rank in found.victims if rank not in ranks],
        root.place,
    )


def _not_connected(waits: Waits, root: Behind, absent: list[Fate], found: Findings) -> Verdict:
    job = waits.job
    present = [rank for rank in root.ranks if rank in job.ranks]
    return Verdict(
        STUCK_AT_START,
        "initialisation",
        f"{plural(root.ranks)} did not come to make {root.place.group}; {wording.they_wait(root.waiting)}.",
        wording.AT_START,
        root.ranks,
        f"making of {root.place.group}",
        own_frame(job.ranks[present[0]]) if present else "",
        wording.stacks(job, present) + [f"rank {one.rank}: {one.why}" for one in absent[:8]],
        [rank for rank in found.victims if rank not in root.ranks],
        root.place,
    )


def _inside(waits: Waits, found: Findings) -> Verdict:
    job = waits.job
    root = min(found.inside, key=lambda one: min(call.since for call in one.calls.values()))
    call = next(iter(root.calls.values()))
    making = call.asked.op == CONNECTING
    joined = [rank for rank in root.place.group.ranks if rank in job.ranks]
    blockage = locate(job, root, joined)
    blamed = sorted({rank for edge in blockage.edges for rank in edge}) or sorted(root.calls)
    if blockage.cause == "rank":
        blamed = sorted({other for _, other in blockage.edges})
    return Verdict(
        STUCK_AT_START if making else STUCK_INSIDE,
        "initialisation" if making else blockage.cause,
        wording.inside(root, blockage),
        wording.AT_START if making else wording.INSIDE[blockage.cause],
        blamed,
        str(call.asked),
        call.site,
        wording.inside_evidence(job, root, blockage),
        [rank for rank in found.victims if rank not in blamed],
        root.place,
    )


def _before_any_group(job: Job) -> Verdict | None:
    """A job in which nobody has a group, and somebody is in the making of one."""
    if any(trace.rows for trace in job.ranks.values()):
        return None
    meeting = [rank for rank, trace in job.ranks.items() if is_meeting(trace)]
    asked_for = all(trace.reason in ("demand", "signal", "exit") for trace in job.ranks.values())
    if not meeting and asked_for:
        return None
    late = [rank for rank in range(job.world_size) if rank not in meeting]
    there = [rank for rank in late if rank in job.ranks]
    return Verdict(
        STUCK_AT_START,
        "initialisation",
        f"No group has been made yet; {plural(meeting)} {'wait' if len(meeting) > 1 else 'waits'} for {plural(late)}."
        if late
        else f"No group has been made yet: all {job.world_size} ranks are in init_process_group.",
        wording.AT_START,
        late or meeting,
        "init_process_group",
        own_frame(job.ranks[there[0]]) if there else "",
        wording.stacks(job, there or meeting),
        [rank for rank in meeting if rank not in late],
    )


def _data(job: Job, only_failed: bool) -> Verdict | None:
    """A NaN that the trace marks. One that ended a call comes before all that followed from it."""
    first = {rank: trace.nans[0] for rank, trace in job.ranks.items() if trace.nans}
    first = {rank: nan for rank, nan in first.items() if nan.failed or not only_failed}
    if not first:
        return None
    nan = next(iter(first.values()))
    return Verdict(
        NAN,
        "nan",
        f"A NaN entered through {plural(first)}, in {nan.asked.op} ({nan.place}); communication itself is in order.",
        wording.NAN,
        sorted(first),
        str(nan.asked),
        nan.site,
        [f"rank {rank}: NaN in {one.place}" for rank, one in list(first.items())[: wording.FEW]],
        place=nan.place,
    )


def _slowness(job: Job, grids: list[Grid]) -> Verdict | None:
    links = find_slow_links(job, grids)
    if links is not None:
        return Verdict(SLOW_LINK, "slow_link", links.summary, wording.SLOW_LINK, links.ranks, evidence=links.evidence)
    rank = find_slow_rank(job, grids)
    if rank is None:
        return None
    return Verdict(
        SLOW_RANK, "slow_rank", rank.summary, wording.SLOW_RANK, rank.ranks, rank.collective, rank.site, rank.evidence
    )


def _good(job: Job) -> Verdict:
    evidence = wording.standings(job)
    calls = sum(trace.rows for trace in job.ranks.values())
    return Verdict(
        ALL_GOOD, "", f"Nothing is stuck: {calls} calls of {len(job.ranks)} ranks fit together.", "", evidence=evidence
    )


# Parts


def _worst(waits: Waits, roots: list[Behind]) -> Behind:
    """The root to name: one at the start of the job, else one with ranks that are there and elsewhere, the oldest."""
    starting = [root for root in roots if root.place.is_start]
    if starting:
        return starting[0]
    silent = [root for root in roots if any(rank not in waits.job.ranks for rank in root.ranks)]
    present = [root for root in roots if any(rank in waits.job.ranks for rank in root.ranks)]
    return (silent or present or roots)[0]


def _needed(waits: Waits, root: Behind, absent: list[Fate]) -> list[Fate]:
    """Those of the absent that somebody waits for, as far as the plans of those who wait say so."""
    told = [call.waiting_for for rank in root.waiting for call in waits.blocking(rank) if call.place == root.place]
    known = {rank for ranks in told if ranks is not None for rank in ranks}
    if not known or any(one.what in ("stopped", "crashed") for one in absent):
        return [one for one in absent if one.what in ("stopped", "crashed")] or absent
    return [one for one in absent if one.rank in known]


def _asked_at(waits: Waits, root: Behind) -> Asked | None:
    for rank in root.waiting:
        for call in waits.blocking(rank):
            if call.place == root.place:
                return call.asked
    return None


def _where_needed(waits: Waits, ranks: list[int], found: Findings) -> tuple[Place | None, Asked | None, str]:
    """The first call of others that a lost rank kept from ending."""
    calls: list[Open] = [call for rank, call in found.stalled if rank not in ranks and _member(call.group, ranks)]
    if not calls:
        return None, None, ""
    first = min(calls, key=lambda call: call.since)
    return first.place, first.asked, first.site


def _member(group: Group, ranks: list[int]) -> bool:
    return any(rank in group.ranks for rank in ranks)
