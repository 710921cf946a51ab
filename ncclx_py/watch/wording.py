"""The sentences of a verdict: what happened, the evidence, what to do. Ranks are global ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from ncclx_py.units import format_time
from ncclx_py.watch.graph import Behind, Findings, Inside, Waits, main_stack, own_frame
from ncclx_py.watch.inside import Blockage
from ncclx_py.watch.mismatch import Mismatch
from ncclx_py.watch.model import Asked, Job, Open, Place, RankTrace, plural
from ncclx_py.watch.order import Departure

FEW = 6  # ranks of which details are given

_SAME_CALLS = "All ranks of a group must make the same calls in the same order, with equal arguments. "
MISMATCH = {
    "op": _SAME_CALLS
    + "See what differs in the program of the rank that calls something else: a branch on the rank, or data that differs.",
    "size": "Make the tensors equal in size: pad the last batch or drop it, and look for data or a model that differs on that "
    "rank.",
    "dtype": "Give all ranks tensors of one dtype: look for a cast, or for autocast that is on for some ranks only.",
    "reduce_op": "Pass the same reduction on all ranks.",
    "root": "Pass the same src or dst on all ranks; in a sub-group it is a global rank.",
    "splits": "What one rank sends to another must be what that one expects: exchange the counts first.",
    "skipped": _SAME_CALLS
    + "That rank left a call out: look for a branch around the call that the others made, an exception that was caught, or a "
    "loop that ended early (uneven data: use join, or drop the last batch).",
    "extra": _SAME_CALLS
    + "That rank makes a call more than the others: look for a branch on the rank around it, or a retry.",
    "order": _SAME_CALLS
    + "That rank makes two calls in another order: look for collectives on several threads, in hooks, or in a loop over a set.",
}
TIE = " There is no majority, so either side may be the wrong one."
CRASHED = (
    "Look at the end of that rank's log, at dmesg for the out-of-memory killer, and for a program that ended early on that rank "
    "(uneven data). Mend that, and start again from the last checkpoint. The errors of all others are its echo."
)
RAISED = (
    "Mend the error of that rank (its log has the traceback), and start again from the last checkpoint. The errors of all "
    "others are its echo."
)
LEFT = (
    "That program ended while others still had calls to make: look for a loop that is shorter on that rank (uneven data), or a "
    "return or sys.exit under a condition that differs."
)
DEADLOCK = (
    "These ranks use their groups in different orders. Make the calls of all groups in one order on every rank (or from one "
    "thread), and batch sends and receives with batch_isend_irecv."
)
AT_START = (
    "Look at the logs of the ranks that did not come: they crashed while importing, or were given another MASTER_ADDR, "
    "MASTER_PORT or WORLD_SIZE, or cannot reach that address; or new_group was not called on all ranks."
)
NAN = "Not a fault of communication: look at that rank's loss, gradients and data in that step (torch.autograd.set_detect_anomaly)."
SLOW_LINK = (
    "Check cable, port and NIC counters of that host (ethtool -S, ibstat; pause frames, retransmissions) and its place in the "
    "topology, or leave it out. With the measured rates in a topology file (ncclx probe) plans go round it."
)
SLOW_RANK = (
    "Profile that rank: throttled or shared processor, a slower data loader, more work than the others (uneven batches or "
    "sequence lengths), or a disk. If it moves with the host, take the host out."
)
_ALL_CALLED = "All ranks have called it; "
INSIDE = {
    "link": _ALL_CALLED
    + "between these two hosts nothing arrives. Check that link: firewall, cable, switch port, MTU (ping -s 8000).",
    "host": _ALL_CALLED
    + "nothing passes to or from that host. Check its NIC, switch port and firewall, or leave the host out.",
    "partition": _ALL_CALLED
    + "two parts of the network do not reach each other. Check the switches between these hosts.",
    "rank": _ALL_CALLED
    + "that rank does not move: see its stack and its processor (py-spy dump, top); is it swapping or throttled?",
    "inside": _ALL_CALLED
    + "the dumps do not say where it stands: see the ranks that have not finished, and the network between them.",
}
ABSENT = {
    "crashed": "crashed, or ended early",
    "stopped": "stopped: the process is there but does nothing",
    "silent": "left no dump and did not come",
}
ABSENT_REMEDY = {
    "crashed": CRASHED,
    "stopped": "See the state of that process: ps -o pid,stat,wchan (T: stopped by a signal or a debugger, continue it with "
    "kill -CONT; D: it waits for a disk or a network file system).",
    "silent": "See whether that process and its host are there: it was killed, stopped, never started, its host lost power or "
    "the network, or it could not write to the trace folder.",
}


_DID = {
    "skipped": "skipped a call, or would make it later",
    "extra": "made a call too many",
    "order": "made calls in another order",
}


def mismatch(wrong: Mismatch, right: Asked | None) -> str:
    who = plural(wrong.odd)
    if wrong.tie or right is None:
        return f"The ranks contradict each other in {wrong.place}: different {wrong.cause}."
    did = _DID.get(wrong.cause, f"asked for another {wrong.cause}")
    it = "they" if len(wrong.odd) > 1 else "it"
    return f"{who} {did}: in {wrong.place} the others called {right}, {it} called {wrong.asked[wrong.odd[0]]}."


def crash(ranks: list[int], asked: Asked | None, details: list[str]) -> str:
    meanwhile = f" while others were in {asked.op}" if asked else ""
    if details:
        return f"{plural(ranks)} raised {details[0]}{meanwhile}."
    return f"{plural(ranks)} {'are' if len(ranks) > 1 else 'is'} gone (killed, crashed or ended early){meanwhile}."


def calls_side_by_side(wrong: Mismatch) -> list[str]:
    """What was asked for, and by whom."""
    said: dict[tuple[Asked, str], list[int]] = {}
    for rank, asked in wrong.asked.items():
        said.setdefault((asked._replace(bytes=0, algorithm=""), wrong.sites[rank]), []).append(rank)
    ordered = sorted(said.items(), key=lambda item: -len(item[1]))
    return [f"{plural(ranks)} called {asked}{f' at {site}' if site else ''}" for (asked, site), ranks in ordered[:FEW]]


def disorder(departure: Departure, awaited: Open, mine: Open) -> str:
    who, many = plural(departure.ranks), len(departure.ranks) > 1
    did = _DID[departure.cause]
    return f"{who} {did}: the others are in {_where(awaited)}, {'they are' if many else 'it is'} in {_where(mine)}."


def behind(waits: Waits, root: Behind, blamed: list[int], gone: bool) -> str:
    asked = next(
        (call.asked for rank in root.waiting for call in waits.blocking(rank) if call.place == root.place), None
    )
    what = f"{asked.op} ({root.place})" if asked else str(root.place)
    if gone:
        return f"{plural(blamed)} ended without joining {what}; {they_wait(root.waiting)}."
    where = own_frame(waits.job.ranks[blamed[0]])
    at = f" {'The first' if len(blamed) > 1 else 'It'} is at {where}." if where else ""
    return f"{plural(blamed)} did not join {what}; {they_wait(root.waiting)}.{at}"


def outside(waits: Waits, root: Behind) -> str:
    few = len(root.waiting) * 2 <= len(root.ranks)
    hint = (
        f" Only {plural(root.waiting)} made this call: look for a collective under a condition that holds on few ranks."
        if few
        else ""
    )
    return (
        "The rank is in the program, not in communication: see its stack (an endless loop, a blocking read, a long "
        f"evaluation or checkpoint on one rank). If that is meant to take so long, raise the group's timeout.{hint}"
    )


def stacks(job: Job, ranks: Iterable[int]) -> list[str]:
    """Where the main threads of some ranks are, the innermost frames first."""
    lines = []
    for rank in list(ranks)[:FEW]:
        frames = main_stack(job.ranks[rank])[::-1][:5]
        lines.append(f"rank {rank} is at {' < '.join(frames)}" if frames else f"rank {rank}: no stack in its dump")
    return lines


def waiting_there(waits: Waits, place: Place | None) -> list[str]:
    if place is None:
        return []
    ranks = waits.waiting_at(place)
    if not ranks:
        return []
    longest = max(
        ((waits.job.ranks[rank].time_ns if not call.ended else call.ended) - call.since) / 1e9
        for rank in ranks
        for call in waits.blocking(rank)
    )
    sites = sorted({call.site for rank in ranks[:64] for call in waits.blocking(rank) if call.site})
    return [f"{they_wait(ranks)} in {place}, for up to {format_time(max(0.0, longest))}: {'; '.join(sites[:3])}"]


def they_wait(ranks: Collection[int]) -> str:
    """The beginning of a sentence: "rank 0 waits", "ranks 0, 1 wait"."""
    return f"{plural(ranks)} wait{'s' * (len(ranks) == 1)}"


def cascades(waits: Waits, root: Behind, found: Findings) -> list[str]:
    """What waits elsewhere, and only because of the root."""
    others = [rank for rank in found.victims if rank not in root.waiting and rank not in root.ranks]
    return [f"{they_wait(others)} in other groups for ranks that wait here"] if others else []


def circle(steps: list[tuple[int, Open]]) -> str:
    told = []
    for at, (rank, call) in enumerate(steps):
        told.append(f"rank {rank} in {_where(call)} waits for rank {steps[(at + 1) % len(steps)][0]}")
    return ", ".join(told[:FEW]) + (f", and {len(told) - FEW} more" if len(told) > FEW else "")


def circle_steps(waits: Waits, steps: list[tuple[int, Open]]) -> list[str]:
    return [
        f"{plural(waits.waiting_at(call.place)) if not call.ends else f'rank {rank}'}: in {_where(call)}"
        f"{f' at {call.site}' if call.site else ''}"
        for rank, call in steps[:FEW]
    ]


def _where(call: Open) -> str:
    if call.ends:
        return f"send to {call.ends[1]}" if call.asked.op == "send" else f"{call.asked.op} from {call.ends[0]}"
    return f"{call.asked.op} ({call.place})"


def inside(root: Inside, blockage: Blockage) -> str:
    call = next(iter(root.calls.values()))
    start = f"All ranks called {_where(call)}, which does not end: "
    edges = "; ".join(f"rank {one} waits for rank {other}" for one, other in blockage.edges[:3])
    if blockage.cause == "link":
        return f"{start}nothing moves between hosts {' and '.join(blockage.hosts)} ({edges})."
    if blockage.cause == "host":
        return f"{start}nothing moves to or from host {', '.join(blockage.hosts)} ({edges})."
    if blockage.cause == "partition":
        return f"{start}hosts {', '.join(blockage.hosts)} do not reach each other ({edges})."
    if blockage.cause == "rank":
        return f"{start}{edges}, on host {', '.join(blockage.hosts)}."
    return f"{start}{plural(root.calls)} have not finished."


def inside_evidence(job: Job, root: Inside, blockage: Blockage) -> list[str]:
    lines = [f"{plural(blockage.finished)} have finished it"] if blockage.finished else []
    least = sorted(root.calls.items(), key=lambda item: (item[1].progress or (0, 0))[0])
    for rank, call in least[:FEW]:
        host = f" on {job.host(rank)}" if job.host(rank) else ""
        steps = f", {call.progress[0]} of {call.progress[1]} steps done" if call.progress else ""
        waits = f", waits for {plural(call.waiting_for)}" if call.waiting_for else ""
        lines.append(f"rank {rank}{host}: {call.asked.algorithm or call.asked.op}{steps}{waits}")
    errors = sorted({call.error for call in root.calls.values() if call.error})
    return lines + [f"said: {error[:200]}" for error in errors[:2]]


def standings(job: Job) -> list[str]:
    """How far each group is, for a healthy job."""
    lines = []
    reached: dict[int, list[int]] = {}
    for trace in job.ranks.values():
        for number, seq in _latest(trace).items():
            reached.setdefault(number, []).append(seq)
    for number, seqs in list(reached.items())[:FEW]:
        low, high = min(seqs), max(seqs)
        lines.append(
            f"{job.groups[number]}: {f'{low}' if low == high else f'{low} to {high}'} collectives on {len(seqs)} ranks"
        )
    return lines


def _latest(trace: RankTrace) -> dict[int, int]:
    groups, seqs = trace.table["group"], trace.table["seq"]
    return {int(number): int(seqs[groups == number].max()) for number in np.unique(groups)}
