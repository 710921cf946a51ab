"""vLLM servers of the run's own: started here, reached through a socket that only this user can open, and ended with the run.

    with OwnServer("teacher", command(...), environment, log) as server:
        server.wait(start_s=900)
        Http("…", server.address, gone=server.gone, …)

A Unix socket in a folder of mode 0700 takes the place of port and key: nothing to collide with, and no other user can reach what
the development mode of a student's server offers (new weights). What it prints goes to ``log``. It is ended by SIGTERM, then
SIGKILL, and by the kernel should this process die without ending it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from distill.errors import ConfigError, ServerError
from distill.rollouts.vllm.http import Http

_STOP_S = 20.0
_CLEAN_S = 5.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
# Of torchrun: a server is a world of its own.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def command(
    python: str, folder: str | Path, who: str, *, dtype: str, context: int, top_k: int, arguments: Sequence[str]
) -> list[str]:
    """The command of a server for the model in ``folder``, but for its address. ``arguments`` win over those named here."""
    return [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={folder}",
        f"--served-model-name={who}",
        f"--dtype={dtype}",
        f"--max-model-len={context}",
        f"--max-logprobs={max(top_k, 1)}",
        "--logprobs-mode=raw_logprobs",
        "--generation-config=vllm",  # no defaults of sampling from the model's folder
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
        *arguments,
    ]


class OwnServer:
    """A started server. ``address`` is for `Http`."""

    def __init__(
        self, who: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, updatable: bool
    ) -> None:
        """Starts it and returns at once; ``updatable`` servers take new weights. Raises ConfigError where it cannot be started."""
        self.who, self.log = who, log
        self._folder = tempfile.mkdtemp(prefix="distill-vllm-")
        socket = os.path.join(self._folder, "socket")
        self.address = f"unix:{socket}"
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _LAUNCHER and not name.startswith("TORCHELASTIC")
        }
        kept |= {"VLLM_SERVER_DEV_MODE": "1" if updatable else "0"} | dict(environment)
        kept.setdefault("VLLM_NO_USAGE_STATS", "1")
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [*command, f"--uds={socket}"],
                    env=kept,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ConfigError(
                f"the {who}'s server cannot be started: {command[0]}: {error.strerror}; set rollout.vllm.python to the "
                f"interpreter of an environment with vLLM, or rollout.vllm.{who}.url to a server that runs"
            ) from None

    def gone(self) -> str | None:
        """Why it has ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        how = f"signal {-status}" if status < 0 else f"exit code {status}"
        return f"{how}; {self._last_words()} (whole log: {self.log})"

    def wait(self, deadline: float) -> None:
        """Until it answers. Raises ServerError where it ends, or ``deadline`` (of ``time.monotonic``) passes."""
        http = Http(f"the {self.who}'s server", self.address, request_s=10.0, retry_s=0.0)
        while True:
            ended = self.gone()
            if ended is not None:
                raise ServerError(f"the {self.who}'s vLLM server did not start: {ended}")
            with contextlib.suppress(ServerError):
                if http.ask("GET", "/health")[0] == 200:
                    return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the {self.who}'s vLLM server was not ready in time: {self._last_words()} (whole log: {self.log}); "
                    "raise rollout.vllm.start_s"
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """End it and all its processes."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sent)
            try:
                self._process.wait(_STOP_S)
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(
            ProcessLookupError
        ):  # its engine, where that outlives it; what cleans up after both gets some time
            deadline = time.monotonic() + _CLEAN_S
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.1)
            os.killpg(self._process.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _last_words(self) -> str:
        """The last line of the log that tells an error, or the last line."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 65536))
                lines = [" ".join(line.split()) for line in file.read().decode(errors="replace").splitlines()]
        except OSError:
            lines = []
        lines = [line for line in lines if line]
        errors = [line for line in lines if "Error: " in line and "See root cause above" not in line]
        return (errors or lines or ["it printed nothing"])[-1][-300:]


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
