"""All checks: pure functions from the facts of all ranks (a `Job`) to what is wrong in them, each with its remedy.

    results = examine(job)
    worst(results)                         # "ok", "warn" or "fail"

A check that finds nothing says in a few words what it saw. A node's facts that cannot be read as this version writes them
make one finding and are left out of the other checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ncclx_py.doctor import check_host, check_network, check_software
from ncclx_py.doctor.facts import FORMAT
from ncclx_py.doctor.job import FAIL, OK, WARN, Finding, Job
from ncclx_py.units import format_size, format_time


@dataclass(frozen=True)
class Result:
    """A check's findings; `note` says what it saw where there are none."""

    check: str
    note: str
    findings: tuple[Finding, ...]

    @property
    def level(self) -> str:
        return max((one.level for one in self.findings), key=(OK, WARN, FAIL).index, default=OK)


def examine(job: Job) -> list[Result]:
    """Runs all checks, in the order in which a person would look."""
    known = {rank: facts for rank, facts in job.facts.items() if facts.get("format") == FORMAT}
    readable = replace(job, facts=known)
    results = [Result("ranks", f"{len(job.facts)} of {job.size} answered", tuple(answers(job)))]
    if not known:
        return results
    for name, check, note in _CHECKS:
        results.append(Result(name, note(readable), _merged(check(readable))))
    return results


def _merged(findings: list[Finding]) -> tuple[Finding, ...]:
    """The same thing on several hosts is one finding."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for one in findings:
        ranks.setdefault((one.level, one.text, one.remedy), []).extend(one.ranks)
    return tuple(Finding(*key[:2], tuple(sorted(set(every))), key[2]) for key, every in ranks.items())


def worst(results: list[Result]) -> str:
    return max((result.level for result in results), key=(OK, WARN, FAIL).index)


def answers(job: Job) -> list[Finding]:
    """Ranks that did not answer, in whole or in part, and those that another version of this project answered for."""
    found = []
    reasons: dict[str, list[int]] = {}
    for rank, why in sorted(job.silent.items()):
        reasons.setdefault(why, []).append(rank)
    remedy = "See whether the node is up and the launcher's log for the rank; drain the node if it stays silent."
    found += [Finding(FAIL, f"no facts: {why}", tuple(ranks), remedy) for why, ranks in reasons.items()]
    other = tuple(rank for rank, facts in job.facts.items() if facts.get("format") != FORMAT)
    if other:
        text = "the facts are of another version of ncclx_py than rank 0's"
        found.append(Finding(FAIL, text, other, "Install the same version of ncclx_py on all nodes."))
    parts: dict[tuple[str, str], list[int]] = {}
    for rank, facts in sorted(job.facts.items()):
        for section, why in _errors(facts).items():
            parts.setdefault((str(section), str(why)), []).append(rank)
    for (section, why), ranks in parts.items():
        text = f"{section}: {why}"
        remedy = _HUNG.get(section, "The node could not be asked for this; run ncclx doctor there alone to see more.")
        found.append(Finding(FAIL, text, tuple(ranks), remedy))
    return found


def _errors(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    errors = facts.get("errors")
    return errors if isinstance(errors, Mapping) else {}


_HUNG = {
    "disks": "A file server may not answer: see mount, dmesg and the server.",
    "names": "A name server may not answer: see /etc/resolv.conf.",
    "gpus": "The driver may hang (a GPU fallen off the bus): see dmesg for Xid, restart the node.",
}


def _version_note(job: Job) -> str:
    part = next(iter(job.sections("versions").values()), {})
    return ", ".join(f"{name} {part.get(name)}" for name in ("python", "torch", "nccl", "ncclx_py") if part.get(name))


def _variable_note(job: Job) -> str:
    count = len({name for part in job.sections("variables").values() for name in part})
    return f"{count} set, all alike" if job.size > 1 else f"{count} set"


def _interface_note(job: Job) -> str:
    if not job.several:
        return "one host: nothing leaves it"
    host = job.hosts[0]
    names = check_network.carriers(host)
    mtus = {str(host.section("network").get("interfaces", {}).get(name, {}).get("mtu")) for name in names}
    return f"{', '.join(names) or 'none'}, MTU {', '.join(sorted(mtus))}"


def _rail_note(job: Job) -> str:
    return f"{len(check_network.carriers(job.hosts[0]))} per host" if job.several else "one host: none needed"


def _tcp_note(job: Job) -> str:
    if not job.several:
        return "one host: none between hosts"
    known = {host.section("network").get("congestion") for host in job.hosts}
    return f"congestion control {', '.join(sorted(filter(None, known))) or 'not known'}"


def _name_note(job: Job) -> str:
    own = job.hosts[0].section("names").get("own")
    return f"{job.hosts[0].name} is {', '.join(own)}" if isinstance(own, list) else "not known"


def _store_note(job: Job) -> str:
    if not job.store:
        return "one rank: none needed"
    return f"{job.store}" + (f", answers in {format_time(job.round_trip)}" if job.round_trip is not None else "")


def _clock_note(job: Job) -> str:
    if not job.clocks:
        return "one clock" if not job.several else "not measured: no time left for it"
    left = sum(1 for host in job.hosts[1:] if job.clocks.keys().isdisjoint(host.ranks))
    error = max(clock.uncertainty for clock in job.clocks.values())
    missing = f"; {left} hosts not measured" if left else ""
    return f"{len(job.clocks)} compared with rank 0's, to within {format_time(error)}{missing}"


def _limit_note(job: Job) -> str:
    files = [part["open_files"] for part in job.sections("limits").values() if part["open_files"] is not None]
    return f"open files {min(files)}" if files else "open files unlimited"


def _memory_note(job: Job) -> str:
    part = job.hosts[0].section("memory")
    return f"/dev/shm {format_size(part['shared']['free'])} free" if part.get("shared") else "not known"


def _disk_note(job: Job) -> str:
    free = [disk["free"] for host in job.hosts for disk in host.section("disks").values()]
    return f"at least {format_size(min(free))} free" if free else "not known"


def _gpu_note(job: Job) -> str:
    cards = [card for host in job.hosts for card in host.section("gpus").get("cards", [])]
    return f"{len(cards)} x {cards[0]['name']}" if cards else "no GPU"


_CHECKS: tuple[tuple[str, Callable[[Job], list[Finding]], Callable[[Job], str]], ...] = (
    ("store", check_network.store, _store_note),
    ("versions", check_software.versions, _version_note),
    ("variables", check_software.variables, _variable_note),
    ("names", check_network.names, _name_note),
    ("interfaces", check_network.interfaces, _interface_note),
    ("rails", check_network.rails, _rail_note),
    ("tcp", check_network.tcp, _tcp_note),
    ("clocks", check_network.clocks, _clock_note),
    ("limits", check_host.limits, _limit_note),
    ("memory", check_host.memory, _memory_note),
    ("disks", check_host.disks, _disk_note),
    ("gpus", check_host.gpus, _gpu_note),
)
