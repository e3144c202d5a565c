"""`pipemax up` over fake processes; run as a script: `fake_launcher.py COORDINATOR_BEHAVIOUR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipemax.services.foreground import run_until_stopped
from pipemax.services.launcher.system import System
from support.fake_system import fake_config, fakes

run_until_stopped(System(fake_config("fore"), processes=fakes(coordinator=sys.argv[1])))
