"""What processes use: read from /proc, of processes that are there."""

import mmap
import os
import subprocess
import sys

import pytest

from pipemax.services.bench.processes import cpu_seconds, memory_of

SPENDING = """
import sys, time
held = bytearray(64 * 2**20)
while time.process_time() < 0.3:
    pass
print("done", flush=True)
sys.stdin.readline()
"""


def test_cpu_time_and_memory_of_another_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SPENDING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.25 <= cpu_seconds(process.pid) < 5
        memory = memory_of(process.pid)
        assert 64 * 2**20 <= memory.private_bytes <= memory.resident_bytes <= memory.peak_bytes
        assert memory.peak_bytes < 2**30
        process.communicate()
    assert cpu_seconds(process.pid) == 0.0
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on when it ended
        memory_of(process.pid)


def test_shared_memory_is_counted_apart() -> None:
    before = memory_of(os.getpid())
    fd = os.memfd_create("pool")
    try:
        os.truncate(fd, 32 * 2**20)
        with mmap.mmap(fd, 32 * 2**20) as pool:
            pool.write(bytes(32 * 2**20))
            after = memory_of(os.getpid())
    finally:
        os.close(fd)
    assert after.shared_bytes - before.shared_bytes >= 32 * 2**20
    assert after.private_bytes - before.private_bytes < 40 * 2**20
