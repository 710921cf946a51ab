"""Which versions of what matters to a job are installed here: for ``ncclx info`` and ``ncclx doctor``."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str | None]:
    """Version by name, None where it is not installed."""
    import torch

    import ncclx_py

    return {
        "ncclx_py": ncclx_py.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": _nccl_version(),
        "triton": _package_version("triton"),
        "deepspeed": _package_version("deepspeed"),
    }


def _nccl_version() -> str | None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
