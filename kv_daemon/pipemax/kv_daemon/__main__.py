"""`python -m pipemax.kv_daemon --run-dir D`"""

import sys

from pipemax.kv_daemon.main import body
from pipemax.proto.process import process_main

if __name__ == "__main__":
    sys.exit(process_main("kv-daemon", body))
