"""`python -m pipemax.stage_worker.sampling --run-dir D --index I [--parent-pipe-fd N]`"""

import sys

from pipemax.proto.process import process_main
from pipemax.stage_worker.sampling.main import body

if __name__ == "__main__":
    sys.exit(process_main("sampler", body))
