"""Topology-aware collective communication for torch.distributed.

``import ncclx_py`` registers the backend ``ncclx``; then, under torchrun or SLURM,

    torch.distributed.init_process_group("ncclx")

and DDP, FSDP2, DeviceMesh, functional collectives and DeepSpeed run on it unchanged: over gloo for CPU tensors and NCCL
for CUDA tensors. A collective that fails raises `CollectiveError` (or `CollectiveTimeout`), which names the collective,
the group and the rank. ``ncclx info`` shows what is installed and what the launcher said.
"""

from ncclx_py.runtime.errors import CollectiveError, CollectiveTimeout
from ncclx_py.runtime.registration import register

__version__ = "0.1.0"

__all__ = ["CollectiveError", "CollectiveTimeout", "register"]

register()
