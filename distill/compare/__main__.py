"""``python -m distill.compare``."""

import sys

from distill.compare import main

if __name__ == "__main__":
    sys.exit(main())
