"""Checks of what a node gives to its ranks: limits, memory, disks, GPUs.

Texts name the limit that is not met rather than the figure of each host, so that hosts with the same fault are one finding.
"""

from __future__ import annotations

from typing import Any

from ncclx_py.doctor.job import FAIL, WARN, Finding, Host, Job, by_rank, differing
from ncclx_py.units import format_size

FILES_BASE = 256  # open files of Python, torch, its data and its log files, before any connection
THREADS_LEAST, THREADS = 32, 128  # tasks of a rank: ours, torch's and the trainer's threads, and data workers
RDMA_LOCKED = 2**30  # bytes that queue pairs and buffers lock
SHARED_LEAST, SHARED = 32 * 2**20, 2**28  # bytes of /dev/shm per rank: NCCL's buffers; data workers' batches as well
MEMORY_LEAST = 2**30  # bytes per rank: torch, imported, with its buffers
DISK_LEAST, DISK = 2**30, 10 * 2**30  # bytes: logs and traces; a checkpoint
FILES_LEFT = 1000
GPU_BUSY = 2**30  # bytes of a GPU that another process holds before the job


def limits(job: Job) -> list[Finding]:
    """Soft limits of every rank against what it needs in a job of this size.

    Open files: connections are made when they are needed. Few are, but an all-to-all, or messages with everyone, need one to
    every other rank.
    """
    parts = job.sections("limits")
    least, wanted = FILES_BASE, job.size + FILES_BASE
    found = _below(
        job,
        {rank: part["open_files"] for rank, part in parts.items()},
        (least, wanted),
        "open files (ulimit -n)",
        f"ulimit -n {max(wanted, 65536)} before the launcher; for good: LimitNOFILE of slurmd or limits.conf.",
    )
    local = {rank: len(host.ranks) for host in job.hosts for rank in host.ranks}
    for kind, what, remedy in (
        ("processes", "processes (ulimit -u)", "Raise ulimit -u before the launcher, or LimitNPROC of slurmd."),
        (
            "task_room",
            "tasks of the control group (pids.max)",
            "Raise the container's pids limit, or TasksMax of slurmd.",
        ),
    ):
        rooms = {rank: part[kind] for rank, part in parts.items()}
        each = {rank: None if room is None else room // local[rank] for rank, room in rooms.items()}
        found += _below(job, each, (THREADS_LEAST, THREADS), f"{what}, per rank,", remedy)
    rdma = {rank for host in job.hosts if host.section("network").get("infiniband") for rank in host.ranks}
    locked = {rank: part["locked_memory"] for rank, part in parts.items() if rank in rdma}
    remedy = "RDMA locks its buffers: ulimit -l unlimited; for good: LimitMEMLOCK=infinity of slurmd or limits.conf."
    return found + _below(job, locked, (RDMA_LOCKED, RDMA_LOCKED), "locked memory (ulimit -l), in bytes,", remedy)


def _below(job: Job, values: dict[int, int | None], floors: tuple[int, int], what: str, remedy: str) -> list[Finding]:
    """Ranks whose value is below the first floor fail, below the second are warned of; None is without limit."""
    found = []
    least, wanted = floors
    for level, low, high in ((FAIL, -(2**63), least), (WARN, least, wanted)):
        ranks = tuple(rank for rank, value in values.items() if value is not None and low <= value < high)
        if ranks:
            smallest = min(value for rank in ranks if (value := values[rank]) is not None)
            need = f"a job of {job.size} ranks needs {'at least' if level == FAIL else 'rather'} {high}"
            found.append(Finding(level, f"{what} may be only {smallest}: {need}", ranks, remedy))
    return found


def memory(job: Job) -> list[Finding]:
    """Shared memory, the memory and CPUs that control groups leave, and hosts that have less of them than others."""
    found: list[Finding] = []
    for host in job.hosts:
        part = host.section("memory")
        if part:
            found += _shared(host, part) + _room(host, part)
    usable = [(host, _cpus(host.section("memory"))) for host in job.hosts if host.section("memory")]
    for host, cpus in usable:
        if cpus < len(host.ranks):
            text = f"{cpus:g} CPUs for {len(host.ranks)} ranks"
            remedy = (
                "Ranks wait for each other's CPU: ask for more (--cpus-per-task, the container's limit) or fewer ranks."
            )
            found.append(Finding(WARN, text, host.ranks, remedy))
    remedy = "Ask for nodes of one kind, or for the same share of each (--cpus-per-task, --mem)."
    found += differing(job, by_rank((host, f"{cpus:g}") for host, cpus in usable), WARN, "the number of CPUs", remedy)
    sizes = by_rank((host, _memory_size(host)) for host in job.hosts if host.section("memory"))
    return found + differing(job, sizes, WARN, "memory", remedy)


def _memory_size(host: Host) -> str:
    """What its ranks may use, rounded so that two machines of one kind are alike."""
    part = host.section("memory")
    known = [size for size in (part["total"], part["group_limit"]) if size]
    return f"{round(min(known) / 2**30):d} GiB" if known else "unknown"


def _shared(host: Host, part: Any) -> list[Finding]:
    if part["memfd"]:
        text = f"no memory can be shared by descriptor (memfd_create): {part['memfd']}"
        remedy = "Ranks of one host exchange through it: allow memfd_create in the container's seccomp profile."
        return [Finding(FAIL, text, host.ranks, remedy)]
    remedy = "docker run --shm-size=16g (or --ipc=host), in Kubernetes an emptyDir of medium Memory; mount -o remount,size=… "
    if part["shared"] is None:
        return [Finding(FAIL, "there is no /dev/shm", host.ranks, remedy + "/dev/shm.")]
    free, ranks = part["shared"]["free"], len(host.ranks)
    for level, each in ((FAIL, SHARED_LEAST), (WARN, SHARED)):
        if free < each * ranks:
            text = f"/dev/shm has less than {format_size(each * ranks)} free, for {ranks} ranks"
            return [Finding(level, text, host.ranks, remedy + "/dev/shm.")]
    return []


def _room(host: Host, part: Any) -> list[Finding]:
    rooms = [(part["available"], "of the machine"), (part["group_room"], "of the control group (memory.max)")]
    for room, whose in rooms:
        if room is not None and room < MEMORY_LEAST * len(host.ranks):
            text = f"less than {format_size(MEMORY_LEAST)} per rank is left of the memory {whose}"
            remedy = "Ranks will be killed (out of memory): ask for more (--mem, the container's limit), see who has the rest."
            return [Finding(FAIL, text, host.ranks, remedy)]
    return []


def _cpus(part: Any) -> float:
    return float(min(part["cpus"], part["cpu_quota"] or part["cpus"]))


def disks(job: Job) -> list[Finding]:
    """Room and permission where the run and the libraries write."""
    found = []
    for host in job.hosts:
        for what, disk in host.section("disks").items():
            where = f"the {what} {disk['path']}"
            if disk["write_error"]:
                text, level = f"nothing can be written to {where}: {disk['write_error']}", FAIL
            elif disk["files_free"] is not None and disk["files_free"] < FILES_LEFT:
                text, level = f"{where} has room for less than {FILES_LEFT} more files (inodes)", FAIL
            elif disk["free"] < DISK:
                level, most = (FAIL, DISK_LEAST) if disk["free"] < DISK_LEAST else (WARN, DISK)
                text = f"{where} has less than {format_size(most)} free"
            else:
                continue
            remedy = "Free space, or choose another place: --run-folder and run.dir, TMPDIR."
            found.append(Finding(level, text, host.ranks, remedy))
    return found


def gpus(job: Job) -> list[Finding]:
    """GPUs that do not answer, have errors or are missing; links that are down; hosts whose GPUs differ."""
    parts = {host: host.section("gpus") for host in job.hosts if host.section("gpus")}
    if not any(part["present"] or part["cards"] or part["torch"] for part in parts.values()):
        return []
    found: list[Finding] = []
    for host, part in parts.items():
        found += _reachable(host, part) or _healthy(host, part)
    working = {host: part for host, part in parts.items() if part["cards"]}
    models = by_rank(
        (host, " + ".join(sorted({card["name"] for card in part["cards"]}))) for host, part in working.items()
    )
    remedy = "The slowest GPU sets the pace: ask for nodes of one kind (--constraint)."
    found += differing(job, models, WARN, "the model of the GPUs", remedy)
    counts = by_rank((host, len(part["cards"])) for host, part in parts.items() if not part["error"])
    remedy = (
        "Look for the missing GPUs in dmesg (Xid 79: fallen off the bus), or ask for the same number (--gpus-per-node)."
    )
    found += differing(job, counts, FAIL, "the number of GPUs", remedy)
    return found + _links(job, working)


def _reachable(host: Host, part: Any) -> list[Finding]:
    if part["error"]:
        text = f"there are GPUs that cannot be asked: {part['error']}"
        remedy = "Load the driver again or restart the node; a container needs the driver's tools (--gpus all)."
        return [Finding(FAIL, text, host.ranks, remedy)]
    if part["cards"] and not part["torch"]:
        text = f"nvidia-smi lists {len(part['cards'])} GPUs, torch sees none"
        if part.get("visible") is not None:
            text += f" (CUDA_VISIBLE_DEVICES={part['visible']!r})"
        meant = part.get("visible") in ("", "-1") or host.section("versions").get("cuda") is None
        remedy = "Install a torch built for CUDA that this driver can run, or correct CUDA_VISIBLE_DEVICES."
        return [Finding(WARN if meant else FAIL, text, host.ranks, remedy)]
    if part["cards"] and part.get("visible") is None and part["torch"] < len(host.ranks):
        text = f"{len(host.ranks)} ranks share {part['torch']} GPUs"
        return [Finding(WARN, text, host.ranks, "Start one rank per GPU, unless this is meant.")]
    return []


def _healthy(host: Host, part: Any) -> list[Finding]:
    found = []
    for card in part["cards"]:
        which = f"GPU {card['index']}"
        if card["memory_errors"]:
            text = f"{which} had {card['memory_errors']} uncorrectable memory errors since the driver was loaded"
            remedy = "Drain the node and reset the GPU (nvidia-smi -r); errors that come back: replace it."
            found.append(Finding(FAIL, text, host.ranks, remedy))
        if (card["memory_used"] or 0) > GPU_BUSY:
            text = f"more than {format_size(GPU_BUSY)} of {which} is in use already"
            remedy = "A process of an earlier job is left: nvidia-smi names it."
            found.append(Finding(WARN, text, host.ranks, remedy))
        if card["pcie_width"] and card["pcie_width_max"] and card["pcie_width"] < card["pcie_width_max"]:
            text = f"{which} has {card['pcie_width']} PCIe lanes of {card['pcie_width_max']}"
            found.append(Finding(WARN, text, host.ranks, "Reseat the card, or look at riser and slot."))
    return found


def _links(job: Job, working: dict[Host, Any]) -> list[Finding]:
    """NVLinks that are down on a GPU whose like elsewhere in the job has them up."""
    most: dict[str, int] = {}
    cards = [(host, card) for host, part in working.items() for card in part["cards"]]
    for _, card in cards:
        most[card["name"]] = max(most.get(card["name"], 0), card["links"])
    found = []
    for host, card in cards:
        if card["links"] < most[card["name"]]:
            text = f"GPU {card['index']} has {card['links']} NVLinks up, others have {most[card['name']]}"
            remedy = "See nvidia-smi nvlink --status, systemctl status nvidia-fabricmanager, and dmesg; drain the node."
            found.append(Finding(FAIL, text, host.ranks, remedy))
    return found
