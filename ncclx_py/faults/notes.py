"""Which faults came true: each leaves one small JSON file in the job's folder of notes (`NCCLX_INJECT_DIR`).

The launcher reads them to break links when a rank reaches a step, and to say at the end which faults never came true. A
fault whose note is there already does not happen again: a restarted rank starts without it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

_DONE = "fault-{}.json"


def claim(folder: Path | None, index: int, facts: dict[str, Any]) -> bool:
    """Notes that fault number `index` comes true now, with wall time in ns; False where it came true before.

    Without a folder nothing is noted. The note is there in full or not at all.
    """
    if folder is None:
        return True
    target = folder / _DONE.format(index)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(json.dumps({**facts, "time_ns": time.time_ns()}))
    try:
        os.link(partial, target)  # unlike a rename, it fails where somebody was first
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def claimed(folder: Path, index: int) -> dict[str, Any] | None:
    """The note of fault number `index`, None until it comes true. Raises ValueError for a file that is no note."""
    path = folder / _DONE.format(index)
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no note of a fault: {error}.") from None
    if not isinstance(found, dict) or not {"rank", "step", "call", "time_ns"} <= set(found):
        raise ValueError(f"{path} is no note of a fault: it lacks rank, step, call or time_ns.")
    return found
