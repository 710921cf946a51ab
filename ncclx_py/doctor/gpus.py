"""What ``nvidia-smi`` and torch say of a node's GPUs and the NVLinks between them, as plain data."""

from __future__ import annotations

import re
from typing import Any

from ncclx_py.doctor.machine import Machine, Output

_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
_MOST = 32  # GPUs of a node
_HEAD = 256  # characters of an error


def gpus(machine: Machine, seconds: float) -> dict[str, Any]:
    """``cards`` as `nvidia-smi` lists them, how many torch may use, and what the tool said where it failed.

    ``present``: the kernel's driver has GPUs, whether or not anything can use them. Raises TimeoutError when the tool
    hangs for `seconds`, as it does when a GPU has fallen off the bus.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    listed = machine.run(query, seconds / 2)
    present = len(machine.names("/proc/driver/nvidia/gpus"))
    if listed.status is None and not present:
        return {"present": 0, "cards": [], "torch": machine.gpus(), "error": None}
    cards = parse_cards(listed.text) if listed.status == 0 else []
    if cards:
        links = parse_links(machine.run(["nvidia-smi", "nvlink", "--status"], seconds / 2).text)
        for card in cards:
            card["links"], card["links_down"] = links.get(card["index"], (0, 0))
    error = None if cards else _why(listed)
    visible = machine.env.get("CUDA_VISIBLE_DEVICES")
    return {"present": present, "cards": cards, "torch": machine.gpus(), "visible": visible, "error": error}


def parse_cards(text: str) -> list[dict[str, Any]]:
    """The rows of the query; a field that the card does not have ("[N/A]") is None. Sizes in bytes."""
    cards = []
    for line in text.splitlines()[:_MOST]:
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(_FIELDS) or not words[0].isdigit():
            continue
        total, used, errors, width, widest = (int(word) if word.isdigit() else None for word in words[3:])
        cards.append(
            {
                "index": int(words[0]),
                "name": words[1],
                "driver": words[2],
                "memory": None if total is None else total * 2**20,
                "memory_used": None if used is None else used * 2**20,
                "memory_errors": errors,
                "pcie_width": width,
                "pcie_width_max": widest,
            }
        )
    return cards


def parse_links(text: str) -> dict[int, tuple[int, int]]:
    """NVLinks that are up and down, by GPU, from ``nvidia-smi nvlink --status``."""
    found: dict[int, tuple[int, int]] = {}
    for part in re.split(r"^GPU (?=\d+:)", text, flags=re.MULTILINE)[1:]:
        index = int(part.split(":", 1)[0])
        up = len(re.findall(r"Link \d+: [\d.]+ GB/s", part))
        found[index] = (up, len(re.findall(r"Link \d+: <inactive>", part)))
    return found


def _why(output: Output) -> str:
    if output.status is None:
        return "nvidia-smi is not installed"
    return f"nvidia-smi (exit status {output.status}): {output.text.strip() or 'no output'}"[:_HEAD]
