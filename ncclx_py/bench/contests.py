"""Times all algorithms of collectives side by side and keeps every sample. For ``python -m ncclx_py.simulate.accuracy``.

    ncclx launch emulate 2x4 --rate 200mbit -- -m ncclx_py.bench.contests FILE all_reduce,all_to_all 65536,4194304 --iters 9

What ``ncclx tune`` measures, as JSON: per algorithm its samples in seconds. An algorithm with wrong results is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ncclx_py.bench.tuning import Options, tune


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("file", type=Path, help="where rank 0 writes")
    parser.add_argument("collectives", metavar="C,…")
    parser.add_argument("bytes", metavar="N,…", help="sizes in bytes")
    parser.add_argument("--iters", type=int, default=9, metavar="N", help="samples of each algorithm (default 9)")
    parser.add_argument(
        "--hopeless", type=float, default=4, metavar="X", help="leave out what is predicted X × the best"
    )
    args = parser.parse_args(argv)
    sizes = [int(size) for size in args.bytes.split(",")]
    _, trials = tune(args.collectives.split(","), sizes, Options(args.iters, hopeless=args.hopeless), lambda _: None)
    if os.environ["RANK"] == "0":
        found = [
            {
                "collective": trial.collective,
                "bytes": trial.bytes,
                "algorithm": trial.candidate.algorithm,
                "parameters": dict(trial.candidate.parameters),
                "samples": trial.samples,
            }
            for trial in trials
            if trial.samples
        ]
        args.file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
