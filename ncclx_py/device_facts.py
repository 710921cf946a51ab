"""What this host's devices can do: NIC speeds from the kernel, NVLink and PCIe where there is a GPU.

    facts = host_facts(os.environ)          # Facts(intra_bandwidth=None, nics=(1.25e9,), source="devices")

Nothing is measured and nothing is guessed: what the system does not say is None. ``ncclx probe`` measures.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ncclx_py.plans.spec import Facts
from ncclx_py.transport.identity import rail_names

_NET = Path("/sys/class/net")
_PCI = Path("/sys/bus/pci/devices")
_ROUTES = Path("/proc/net/route")
_PCIE_SHARE = {2.5: 8 / 10, 5.0: 8 / 10}  # of the line rate that is data; later generations use 128b/130b
_SECONDS = 10.0  # for nvidia-smi


def host_facts(env: Mapping[str, str], gpus: bool = True) -> Facts:
    """The facts of the host that this process runs on; the NICs are those of ``NCCLX_RAILS``, else of the default route.

    Without `gpus` the links between them are left out, for plans that move CPU memory.
    """
    names = rail_names(env) or tuple(filter(None, [default_interface()]))
    return Facts(gpu_link() if gpus else None, tuple(nic_speed(name) for name in names), "devices")


def nic_speed(name: str, root: Path = _NET) -> float | None:
    """Bytes per second of an interface, None where its driver does not know (or the link is down)."""
    try:
        megabits = int((root / name / "speed").read_text())
    except (OSError, ValueError):
        return None
    return megabits * 1e6 / 8 if megabits > 0 else None


def gpu_link() -> float | None:
    """Bytes per second and direction between this host's GPUs: NVLink, else PCIe; None without at least one GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    links = [_nvlink(index) or _pcie(index) for index in range(torch.cuda.device_count())]
    known = [link for link in links if link]
    return min(known) if len(known) == len(links) else None


def parse_nvlink(text: str) -> float | None:
    """The sum of the links in what ``nvidia-smi nvlink --status`` prints for one GPU, in bytes per second and direction."""
    links = [float(speed) for speed in re.findall(r"Link \d+: ([\d.]+) GB/s", text)]
    return sum(links) * 1e9 if links else None


def _nvlink(index: int) -> float | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, "nvlink", "--status", "--id", _bus(index)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_nvlink(done.stdout) if done.returncode == 0 else None


def _pcie(index: int, root: Path = _PCI) -> float | None:
    """The most that the slot of a GPU can do; the present speed is lower while the GPU rests."""
    device = root / _bus(index)[-12:].lower()
    try:
        rate = float((device / "max_link_speed").read_text().split()[0])
        width = int((device / "max_link_width").read_text())
    except (OSError, ValueError, IndexError):
        return None
    return rate * 1e9 / 8 * width * _PCIE_SHARE.get(rate, 128 / 130)


def _bus(index: int) -> str:
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    return f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def default_interface(routes: Path = _ROUTES) -> str:
    """The interface of the default route, "" where there is none."""
    try:
        lines = routes.read_text().splitlines()[1:]
    except OSError:
        return ""
    return next((line.split()[0] for line in lines if line.split()[1] == "00000000"), "")
