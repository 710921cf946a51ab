"""``python -m ncclx_py``: the same as the ``ncclx`` command."""

import sys

from ncclx_py.cli import main

if __name__ == "__main__":
    sys.exit(main())
