"""`python -m pipemax` is `pipemax`."""

import sys

from pipemax.services.cli import main

sys.exit(main())
