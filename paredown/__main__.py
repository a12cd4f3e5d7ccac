"""`python -m paredown`: the command line."""

import sys

from paredown.cli import main

if __name__ == "__main__":
    sys.exit(main())
