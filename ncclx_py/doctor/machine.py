"""What the doctor touches of the system, in one place, so that tests can put another system in its stead.

    machine = Machine(os.environ)                               # this one
    machine = Machine({}, root=tmp_path, run=lambda words, seconds: Output(0, "…"))

`within` bounds what may block for ever: a dead file server, a name server that does not answer, a driver that hangs.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncclx_py.transport.identity import interface_address


@dataclass(frozen=True)
class Output:
    """What a command printed (stdout and stderr) and its exit status; `status` is None where there is no such command."""

    status: int | None
    text: str = ""


def run_command(words: Sequence[str], seconds: float) -> Output:
    """Runs a command for at most `seconds`. Raises TimeoutError after that."""
    tool = shutil.which(words[0])
    if tool is None:
        return Output(None)
    try:
        done = subprocess.run(
            [tool, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{' '.join(words)} was not done after {seconds:.0f} s") from error
    return Output(done.returncode, done.stdout)


def resolve(name: str) -> list[str]:
    """The IP addresses of a host name. Raises OSError where it has none."""
    return sorted({str(entry[4][0]).split("%")[0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def ipv4_addresses() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    found = {}
    for _, name in socket.if_nameindex():
        try:
            found[name] = interface_address(name)
        except ValueError:
            continue
    return found


def torch_gpus() -> int:
    """The GPUs that torch sees in this process, without starting CUDA."""
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class Machine:
    """The environment, the file system's root, and the ways to ask the system. All may block; none is bounded but `run`."""

    env: Mapping[str, str]
    root: Path = Path("/")
    run: Callable[[Sequence[str], float], Output] = run_command
    resolve: Callable[[str], list[str]] = resolve
    ipv4: Callable[[], dict[str, str]] = ipv4_addresses
    host_name: Callable[[], str] = socket.gethostname
    gpus: Callable[[], int] = torch_gpus

    def read(self, path: str) -> str | None:
        """The text of a file below the root, stripped, at most 64 KiB of it; None where it cannot be read."""
        try:
            with (self.root / path.lstrip("/")).open(encoding="utf-8", errors="replace") as file:
                return file.read(65536).strip()
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The whole number in a file, None where there is none."""
        try:
            return int(self.read(path) or "")
        except ValueError:
            return None

    def names(self, path: str) -> list[str]:
        """What lies in a folder, sorted; empty where there is none."""
        try:
            return sorted(entry.name for entry in (self.root / path.lstrip("/")).iterdir())
        except OSError:
            return []


def within(seconds: float, tasks: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs all `tasks` at once for at most `seconds` together: the results, and why the others have none.

    A task that is still blocked then is left behind in a daemon thread, which does not hold up the end of the process.
    """
    results: dict[str, Any] = {}
    errors: dict[str, str] = {}
    done = threading.Semaphore(0)

    def work(name: str, task: Callable[[], Any]) -> None:
        try:
            results[name] = task()
        except Exception as error:  # whatever a driver or a file system comes up with is a fact to report
            errors[name] = f"{type(error).__name__}: {error}"
        done.release()

    for name, task in tasks.items():
        threading.Thread(target=work, args=(name, task), name=f"doctor {name}", daemon=True).start()
    _wait_for(done, len(tasks), seconds)
    results, errors = dict(results), dict(errors)
    for name in tasks:
        if name not in results and name not in errors:
            errors[name] = f"no answer after {seconds:.1f} s"
    return results, errors


def _wait_for(done: threading.Semaphore, count: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    for _ in range(count):
        if not done.acquire(timeout=max(0.0, until - time.monotonic())):
            return
