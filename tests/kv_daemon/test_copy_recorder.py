"""When copies ran, from when they were started and when they ended."""

from pipemax.kv_daemon.copy_recorder import CopyRecorder
from pipemax.kv_daemon.events import Direction, Run, StartCopy
from pipemax.proto.messages.spans import MAX_SPANS, unpack_i64


def start(recorder: CopyRecorder, now_ns: int, length: int = 1, way: Direction = "load") -> None:
    runs = (Run(0, 0, length), Run(9, 9, 1))
    recorder.started(StartCopy(stage=1, direction=way, runs=runs), now_ns)


def test_copies_of_one_link_follow_each_other() -> None:
    recorder = CopyRecorder()
    recorder.block_bytes[1] = 100
    start(recorder, 5)  # before anybody watches, and ends while somebody does
    recorder.record_until(1000)
    start(recorder, 10, length=3)
    start(recorder, 12, way="store")
    recorder.ended(1, "load", 20)
    recorder.ended(1, "store", 25)
    recorder.ended(1, "load", 50)
    start(recorder, 90)
    recorder.ended(1, "load", 95)
    spans = recorder.take()
    assert spans is not None
    assert list(unpack_i64(spans.stages)) == [1, 1, 1, 1]
    assert spans.directions == b"\0\1\0\0"
    assert list(unpack_i64(spans.begins_ns)) == [5, 12, 20, 90]
    assert list(unpack_i64(spans.lengths_ns)) == [15, 13, 30, 5]
    assert list(unpack_i64(spans.sizes_bytes)) == [200, 200, 400, 200]
    assert recorder.take() is None


def test_nothing_is_kept_unless_somebody_watches_and_never_more_than_a_message_holds() -> None:
    recorder = CopyRecorder()
    start(recorder, 1)
    recorder.ended(1, "load", 2)
    assert recorder.take() is None
    recorder.record_until(10**9)
    for moment in range(MAX_SPANS + 3):
        start(recorder, moment)
        recorder.ended(1, "load", moment)
    spans = recorder.take()
    assert spans is not None
    assert len(spans.directions) == MAX_SPANS
