"""`python -m benchmarks [SUITE...]`: see suites.py."""

import sys

from .suites import main

if __name__ == "__main__":
    sys.exit(main())
