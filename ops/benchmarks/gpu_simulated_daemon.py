"""The KV daemon on a simulated CUDA, for rehearsals: takes the arguments of the shipped one."""

import sys
from pathlib import Path

from pipemax.proto.process import process_main

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from support.fake_cuda.bodies import kv_daemon

    sys.exit(process_main("kv-daemon", kv_daemon))
