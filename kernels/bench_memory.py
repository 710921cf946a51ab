"""Peak memory of a call: allocator statistics on CUDA, the kernel's high-water mark of the process elsewhere."""

from collections.abc import Callable
from pathlib import Path

import torch


def peak_above(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes above what is allocated before `function()`, at its worst moment.

    On CPU this is resident memory (Linux): exact to a few MiB, and meaningful only in a process where no earlier, larger
    call has left freed memory with the allocator. Measure each configuration in a process of its own.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory on CPU can be measured on Linux only")
