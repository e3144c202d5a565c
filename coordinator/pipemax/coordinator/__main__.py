import sys

from pipemax.coordinator.main import body
from pipemax.proto.process import process_main

sys.exit(process_main("coordinator", body))
