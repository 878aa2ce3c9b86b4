"""``python -m fleetgym`` is the ``fleetgym`` command."""

import sys

from fleetgym.cli import main

if __name__ == "__main__":
    sys.exit(main())
