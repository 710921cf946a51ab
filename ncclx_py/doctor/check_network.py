"""Checks of what lies between hosts: interfaces and rails, TCP, names, the store, clocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ncclx_py.doctor.job import FAIL, WARN, Finding, Host, Job, by_rank, differing
from ncclx_py.units import format_bandwidth, format_time

_LOSS_BASED = ("reno", "cubic")  # they shrink their window after a pause; bbr paces by what it has measured
CLOCK_WARN, CLOCK_FAIL = 0.1, 2.0  # seconds: times of traces no longer compare; logs, tokens and file times mislead


def carriers(host: Host) -> tuple[str, ...]:
    """The interfaces that carry traffic between hosts, one per rail: as named, else that of the default route.

    A name in full stands for itself even where there is no such interface, which `check_software.variables` reports.
    """
    network, variables = host.section("network"), host.section("variables")
    there = sorted(network.get("interfaces", {}))
    for name in ("NCCLX_RAILS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = str(variables.get(name, ""))
        if value and not value.startswith("^"):
            parts = [part.strip() for part in value.lstrip("=").split(",") if part.strip()]
            if name != "NCCL_SOCKET_IFNAME" or value.startswith("="):
                return tuple(parts)
            return tuple(one for part in parts for one in there if one.startswith(part))
    return (network["default"],) if network.get("default") in there else ()


def _present(host: Host) -> list[tuple[str, Mapping[str, Any]]]:
    """The carriers that are there, with their facts."""
    there = host.section("network").get("interfaces", {})
    return [(name, there[name]) for name in carriers(host) if name in there]


def interfaces(job: Job) -> list[Finding]:
    """NICs that carry traffic: down, without an address, of another MTU or speed than the other hosts'."""
    if not job.several:
        return []
    found: list[Finding] = []
    rows = [(host, _present(host)) for host in job.hosts]
    for host, row in rows:
        for name, facts in row:
            found += _usable(host, name, facts)
    for rail in range(max(len(row) for _, row in rows)):
        here = [(host, row[rail][1]) for host, row in rows if rail < len(row)]
        names = " or ".join(sorted({row[rail][0] for _, row in rows if rail < len(row)}))
        mtu = by_rank((host, facts["mtu"]) for host, facts in here)
        remedy = (
            "Large packets vanish between such hosts: ip link set dev NAME mtu N, the same on all hosts and switches."
        )
        found += differing(job, mtu, FAIL, f"MTU of {names}", remedy)
        speed = by_rank((host, facts["speed"]) for host, facts in here if facts["speed"])
        remedy = "The slowest NIC sets the pace: look at cable, transceiver and switch port (ethtool NAME)."
        found += differing(job, speed, WARN, f"speed of {names}", remedy, format_bandwidth)
    return found


def _usable(host: Host, name: str, facts: Mapping[str, Any]) -> list[Finding]:
    if facts["state"] in ("down", "lowerlayerdown", "notpresent"):
        remedy = f"ip link set {name} up; look at cable and switch port, or take {name} out of NCCLX_RAILS."
        return [Finding(FAIL, f"{name} is {facts['state']}", host.ranks, remedy)]
    if not facts["ipv4"] and not facts["ipv6"]:
        remedy = f"Give {name} an address, or name another interface in NCCLX_RAILS and GLOO_SOCKET_IFNAME."
        return [Finding(FAIL, f"{name} has no address", host.ranks, remedy)]
    return []


def rails(job: Job) -> list[Finding]:
    """The number of NICs and RDMA ports that carry traffic, and their address families, must be the same on all hosts."""
    if not job.several:
        return []
    known = [host for host in job.hosts if host.section("network")]
    found = _without_rails(known)
    counts = by_rank((host, len(carriers(host))) for host in known if carriers(host))
    remedy = "Name the same number of interfaces on every host: NCCLX_RAILS=eth0,eth1."
    found += differing(job, counts, FAIL, "the number of NICs that carry traffic", remedy)
    families = by_rank((host, _families(host)) for host in known if _families(host))
    if families and not frozenset.intersection(*families.values()):
        remedy = "Give the NICs of all hosts an address of the same family: rails need IPv4."
        found += differing(job, families, FAIL, "the address family", remedy, lambda value: " and ".join(sorted(value)))
    return found + _rdma(job, known)


def _without_rails(known: list[Host]) -> list[Finding]:
    none = [host for host in known if not carriers(host)]
    if not none:
        return []
    ranks = tuple(rank for host in none for rank in host.ranks)
    remedy = "There is no default route and no interface is named: set NCCLX_RAILS and GLOO_SOCKET_IFNAME."
    return [Finding(FAIL, "no NIC is known to carry traffic", ranks, remedy)]


def _families(host: Host) -> frozenset[str]:
    kinds = (("IPv4", "ipv4"), ("IPv6", "ipv6"))
    each = [{kind for kind, key in kinds if facts[key]} for _, facts in _present(host)]
    return frozenset(set.intersection(*each)) if each else frozenset()


def _rdma(job: Job, known: list[Host]) -> list[Finding]:
    ports = {host: host.section("network").get("infiniband", {}) for host in known}
    active = {host: [one for one in every.values() if one["state"] == "ACTIVE"] for host, every in ports.items()}
    remedy = (
        "See ibstat and the switch: every host needs as many active ports, or leave the device out with NCCL_IB_HCA."
    )
    counts = by_rank((host, len(row)) for host, row in active.items())
    found = differing(job, counts, FAIL, "the number of active RDMA ports", remedy)
    rates = by_rank((host, ", ".join(sorted({str(one["rate"]) for one in row}))) for host, row in active.items() if row)
    remedy = "The slowest port sets the pace: look at cable, transceiver and switch port (ibstat)."
    return found + differing(job, rates, WARN, "the rate of RDMA ports", remedy)


def tcp(job: Job) -> list[Finding]:
    """How TCP behaves between hosts, where no RDMA port is active: congestion control that differs, or, where it is one that
    probes by losing packets, a window that shrinks while ranks compute (measured: calls of 4 MiB up to twice as slow)."""
    if not job.several:
        return []
    parts = {host: host.section("network") for host in job.hosts}
    over_tcp = {
        host: part
        for host, part in parts.items()
        if part and not any(port["state"] == "ACTIVE" for port in part["infiniband"].values())
    }
    control = by_rank((host, part["congestion"]) for host, part in over_tcp.items() if part["congestion"])
    remedy = "sysctl -w net.ipv4.tcp_congestion_control=NAME, the same on all hosts."
    found = differing(job, control, WARN, "TCP's congestion control", remedy)
    slow = [
        host
        for host, part in over_tcp.items()
        if part["slow_start_after_idle"] == 1 and part["congestion"] in _LOSS_BASED
    ]
    if slow:
        ranks = tuple(rank for host in slow for rank in host.ranks)
        remedy = "sysctl -w net.ipv4.tcp_slow_start_after_idle=0, and in /etc/sysctl.d for good."
        found.append(Finding(WARN, "TCP begins anew after each pause between collectives", ranks, remedy))
    return found


def names(job: Job) -> list[Finding]:
    """A host's own name must lead to an address of that host that others can reach; the master's must resolve alike."""
    found: list[Finding] = []
    for host in job.hosts:
        found += _own_name(job, host)
    masters = {}
    for host in job.hosts:
        part = host.section("names")
        master = part.get("master")
        if isinstance(master, str):
            remedy = "Enter the name in DNS or /etc/hosts on every host, or set MASTER_ADDR to an address."
            text = f"the master {part.get('master_host')} cannot be resolved: {master}"
            found.append(Finding(FAIL, text, host.ranks, remedy))
        elif master:
            masters[host] = ", ".join(one for one in master if not _loopback(one)) or "loopback only"
    remedy = "Correct DNS or /etc/hosts where it differs, or set MASTER_ADDR to an address."
    return found + differing(job, by_rank(masters.items()), WARN, "the address of the master", remedy)


def _own_name(job: Job, host: Host) -> list[Finding]:
    part, network = host.section("names"), host.section("network").get("interfaces", {})
    own, level = part.get("own"), FAIL if job.several else WARN
    if own is None:
        return []
    if isinstance(own, str):
        text, cure = f"its own name {part['host']} does not resolve: {own}", "Enter it"
    elif all(map(_loopback, own)):
        if not job.several:
            return []
        text, cure = (
            f"its own name {part['host']} leads to loopback ({', '.join(own)}): others cannot reach it",
            "Map it",
        )
    else:
        mine = {facts["ipv4"] for facts in network.values()}
        v4 = [one for one in own if ":" not in one and not _loopback(one)]
        if not v4 or not network or mine.intersection(v4):
            return []
        text, cure = f"its own name {part['host']} leads to {', '.join(v4)}, which no interface has", "Correct it"
    remedy = f"{cure} in DNS or /etc/hosts with the host's address, or name the interface: GLOO_SOCKET_IFNAME."
    return [Finding(level, text, host.ranks, remedy)]


def _loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def store(job: Job) -> list[Finding]:
    """Could the ranks meet at all?"""
    if job.store_error is None:
        return []
    remedy = (
        "Look whether rank 0 runs, whether MASTER_ADDR is its host as seen from here, whether a firewall is between, and "
        "whether another job has the port: set MASTER_PORT to a free one."
    )
    return [Finding(FAIL, job.store_error, job.everyone, remedy)]


def clocks(job: Job) -> list[Finding]:
    """Clocks that are further from rank 0's than the measurement can be wrong."""
    found = []
    for host in job.hosts:
        clock = next((job.clocks[rank] for rank in host.ranks if rank in job.clocks), None)
        if clock is None:
            continue
        least = abs(clock.offset) - clock.uncertainty
        if least > CLOCK_WARN:
            side = "ahead of" if clock.offset > 0 else "behind"
            text = f"the clock is {format_time(abs(clock.offset))} {side} rank 0's (± {format_time(clock.uncertainty)})"
            remedy = "Synchronise it: systemctl status chronyd (or ntpd), chronyc makestep."
            found.append(Finding(FAIL if least > CLOCK_FAIL else WARN, text, host.ranks, remedy))
    return found
