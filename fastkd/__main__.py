"""`python -m fastkd` is the same program as `fastkd` (launchers of several processes need it)."""

import sys

from fastkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
