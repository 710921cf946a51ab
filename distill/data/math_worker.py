"""math-verify in a process of its own: a comparison can be given up at any time, from any thread.

math-verify bounds its running time with SIGALRM, which works in the main thread only, takes the alarm from whoever
else uses it, and does not stop sympy from filling the memory. Here a helper process compares one pair at a time, with
its memory limited; if it is late it is killed, and the next pair gets a new one. It ends with its parent (its input
closes).

The file is both sides: imported, it is the client; run as a script, it is the helper (so it imports nothing heavy on
top).
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from functools import cache

START_SECONDS = 120.0
COMPARE_SECONDS = 6.0
SOFT_SECONDS = 2  # math-verify's own limit for each parse and comparison, inside the helper
MEMORY_BYTES = 4 * 2**30


class MathWorker:
    """Compares answers in a helper process that starts with the first comparison. Safe in threads and after a fork."""

    def __init__(self, seconds: float = COMPARE_SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, predicted: str, gold: str) -> bool:
        """Whether math-verify finds the two equal; False where it gives up, fails, or is not done in time.

        Raises RuntimeError where the helper cannot start at all (math-verify not installed).
        """
        with self._lock:
            process = self._running()
            request = json.dumps([predicted, gold]).encode() + b"\n"
            try:
                assert process.stdin is not None
                process.stdin.write(request)
                process.stdin.flush()
                return _read_line(process, self.seconds) == b"true"
            except (OSError, TimeoutError):  # killed by its memory limit, or late
                self._stop()
                return False

    def close(self) -> None:
        """End the helper process, if this process started one."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork poll() finds that the helper is not this process's child, and a new one is started.
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        # -P: this file's folder must not come first on the path, its modules would hide the standard library's.
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            _read_line(self._process, START_SECONDS)
        except (OSError, TimeoutError) as error:
            self._stop()
            hint = "is math-verify installed? (pip install 'math-verify[antlr4_9_3]')"
            raise RuntimeError(f"the answer checker did not start: {hint}") from error
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # does nothing to a helper that belongs to another process
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unsent bytes of a request to a dead helper
                    pipe.close()


@cache
def shared() -> MathWorker:
    """The one worker of this process."""
    worker = MathWorker()
    atexit.register(worker.close)
    return worker


# A fork may copy a lock that some thread holds: a forked process starts with a worker of its own.
os.register_at_fork(after_in_child=shared.cache_clear)


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of the helper's output without its end. Raises TimeoutError, or OSError where the helper is gone."""
    assert process.stdout is not None
    deadline, received = time.monotonic() + seconds, b""
    while not received.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(f"no answer within {seconds} s")
        part = os.read(process.stdout.fileno(), 4096)
        if not part:
            raise OSError("the answer checker ended")
        received += part
    return received[:-1]


def _serve() -> None:
    """The helper's loop: one JSON pair per line in, ``true`` or ``false`` out."""
    import resource

    import math_verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            predicted, gold = (
                math_verify.parse(text if "$" in text else f"${text}$", parsing_timeout=SOFT_SECONDS)
                for text in json.loads(line)
            )
            equal = bool(math_verify.verify(gold, predicted, timeout_seconds=SOFT_SECONDS))
        except Exception:  # whatever a model wrote, it is not the answer
            equal = False
        print("true" if equal else "false", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve()
