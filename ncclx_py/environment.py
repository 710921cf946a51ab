"""What the launcher said: ranks and hosts from the variables of torchrun or SLURM, without asking the network.

    launch = read_launch(os.environ)
    launch.rank, launch.size, launch.hosts

torchrun's variables win over SLURM's, because ``srun torchrun`` sets both and torchrun's are the ones that count ranks. Where
both count alike (``ncclx launch slurm`` sets torchrun's for the program), SLURM's tell more: every host, by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ncclx_py.plans.spec_file import place


@dataclass(frozen=True)
class Launch:
    """Who this process is. `launcher` is "torchrun", "slurm" or "none" (a process on its own: rank 0 of 1).

    `hosts` is the number of hosts, `ranks_per_host` one number per host where the launcher tells (else empty), and
    `host_names` the hosts' names where it tells (SLURM only). `placement` is "block", "cyclic", or "" where it is neither;
    it holds within each of `components` (numbers of hosts) of a heterogeneous job, whose ranks follow one another.
    """

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    hosts: int = 1
    ranks_per_host: list[int] = field(default_factory=list)
    host_names: list[str] = field(default_factory=list)
    master: str | None = None
    placement: str = "block"
    components: list[int] = field(default_factory=list)

    def host_of(self) -> tuple[int, ...]:
        """The host of each rank; empty where the launcher does not tell (uneven hosts under torchrun, odd placements)."""
        if self.size == 1 or self.launcher == "none":
            return (0,) * self.size
        if not self.ranks_per_host or not self.placement:
            return ()
        hosts: list[int] = []
        first = 0
        for count in self.components or [len(self.ranks_per_host)]:
            placed = place(self.ranks_per_host[first : first + count], self.placement)
            hosts += [first + host for host in placed]
            first += count
        return tuple(hosts)


def read_launch(env: Mapping[str, str]) -> Launch:
    """The launch that `env` describes. Raises ValueError naming the variable that is missing, malformed or impossible."""
    if ("RANK" in env or "WORLD_SIZE" in env) and not _alike(env):
        return _checked(_from_torchrun(env), "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        return _checked(_from_slurm(env), "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return Launch("none")


MOST = 10_000_000  # ranks or hosts that a launcher may speak of: more is a mistake, and would not fit into memory


def expand_hosts(text: str) -> list[str]:
    """SLURM's host list in full: ``n[1-3,07],gpu`` → n1 n2 n3 n07 gpu. Raises ValueError when it is malformed."""
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text)
    if ",".join(parts) != text:
        raise ValueError(f"The SLURM host list {text!r} is malformed: a bracket or a comma is out of place.")
    return [name for part in parts for name in _expand_one(part, text)]


def expand_counts(text: str) -> list[int]:
    """SLURM's counts per host in full: ``4(x2),2`` → 4 4 2. Raises ValueError when they are malformed."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"SLURM_TASKS_PER_NODE={text!r} is malformed at {part!r}: expected for example 4(x2),2.")
        if int(match[2] or 1) > MOST:
            raise ValueError(f"SLURM_TASKS_PER_NODE={text!r}: {match[2]} hosts are more than there can be.")
        counts.extend([int(match[1])] * int(match[2] or 1))
    return counts


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    size = _number(env, "WORLD_SIZE")
    local_size = _number(env, "LOCAL_WORLD_SIZE", 0)
    even = local_size > 0 and size % local_size == 0
    master = env.get("MASTER_ADDR")
    return Launch(
        "torchrun",
        _number(env, "RANK"),
        size,
        _number(env, "LOCAL_RANK", 0),
        -(-size // local_size) if local_size else 1,
        [local_size] * (size // local_size) if even else [],
        master=f"{master}:{env.get('MASTER_PORT', '?')}" if master else None,
    )


def _from_slurm(env: Mapping[str, str]) -> Launch:
    names = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    return Launch(
        "slurm",
        _number(env, "SLURM_PROCID"),
        _number(env, "SLURM_NTASKS"),
        _number(env, "SLURM_LOCALID", 0),
        _number(env, "SLURM_STEP_NUM_NODES", len(names) or 1),
        expand_counts(counts) if counts else [],
        names,
        _master(env, names),
        _distribution(env.get("SLURM_DISTRIBUTION", "block")),
        _components(env),
    )


def _alike(env: Mapping[str, str]) -> bool:
    """Whether SLURM has one task per rank, and counts them as the variables of torchrun do."""
    pairs = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID"))
    return all(ours in env and env[ours] == env.get(theirs) for ours, theirs in pairs)


def _master(env: Mapping[str, str], names: list[str]) -> str | None:
    """Where the ranks meet: what somebody has chosen, or else the host that starts the tasks, which is the first one."""
    if env.get("MASTER_ADDR"):
        return f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT', '?')}"
    return env.get("SLURM_LAUNCH_NODE_IPADDR") or (names[0] if names else None)


def _components(env: Mapping[str, str]) -> list[int]:
    """The hosts of each component of a heterogeneous job that this step runs on as a whole; else empty."""
    if "SLURM_HET_SIZE" not in env:
        return []
    counts = [
        _number(env, f"SLURM_JOB_NUM_NODES_HET_GROUP_{part}", 0) for part in range(_number(env, "SLURM_HET_SIZE"))
    ]
    return counts if sum(counts) == _number(env, "SLURM_STEP_NUM_NODES", 0) else []


def _distribution(text: str) -> str:
    """The first part of SLURM's --distribution says how ranks are dealt out to hosts."""
    first = text.split(":")[0].split(",")[0].lower()
    return first if first in ("block", "cyclic") else ""


def _checked(launch: Launch, rank: str, size: str, local: str) -> Launch:
    if launch.size < 1 or not 0 <= launch.rank < launch.size:
        raise ValueError(f"{rank}={launch.rank} with {size}={launch.size}: ranks go from 0 to {size} - 1.")
    if launch.ranks_per_host and sum(launch.ranks_per_host) != launch.size:
        raise ValueError(f"The ranks per host {launch.ranks_per_host} do not add up to {size}={launch.size}.")
    if launch.ranks_per_host and launch.local_rank >= max(launch.ranks_per_host):
        raise ValueError(f"{local}={launch.local_rank}, but no host has more than {max(launch.ranks_per_host)} ranks.")
    return launch


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"{name} is not set, though other variables of the launcher are: start through torchrun.")
        return default
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name}={text!r} is not a number: fix the environment or start through torchrun or srun.")
    if int(text[-20:]) > MOST or len(text) > 20:
        raise ValueError(f"{name}={text!r} is too large: at most {MOST}.")
    return int(text)


def _expand_one(part: str, text: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\]]+)\]([^\[\]]*)", part)
    if match is None:
        if "[" in part or "]" in part:
            raise ValueError(f"The SLURM host list {text!r} is malformed at {part!r}.")
        return [part]
    prefix, ranges, suffix = match.groups()
    names: list[str] = []
    for piece in ranges.split(","):
        low, _, high = piece.partition("-")
        if not low.isdigit() or not (high or low).isdigit():
            raise ValueError(f"The SLURM host list {text!r} is malformed at {piece!r}.")
        if len(low) > 9 or len(high) > 9 or int(high or low) - int(low) > MOST:
            raise ValueError(f"The SLURM host list {text!r} names too many hosts at {piece!r}.")
        names.extend(f"{prefix}{n:0{len(low)}d}{suffix}" for n in range(int(low), int(high or low) + 1))
    return names
