"""Which sampler gets which row."""

from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.messages.control import RowExtras, SampleRow
from pipemax.stage_worker.sampling.shares import share_out


def row(item: int, request: int) -> SampleRow:
    """request: -1 for one without rules."""
    return SampleRow(item, 1, 0, 1.0, 0, 1.0, 0.0, extras=RowExtras(request=request))


@given(st.lists(st.integers(-1, 40)), st.integers(1, 4), st.data())
def test_every_row_has_one_sampler_and_state_stays_with_it(
    requests: list[int], num_samplers: int, data: st.DataObject
) -> None:
    sample = [row(item, request) for item, request in enumerate(requests)]
    rows = data.draw(st.lists(st.sampled_from(range(len(sample))), unique=True)) if sample else []
    shares = share_out(sample, rows, num_samplers)
    assert len(shares) == num_samplers
    assert sorted(r for share in shares for r in share) == sorted(rows)
    for index, share in enumerate(shares):
        assert list(share) == sorted(share)
        assert all(requests[r] % num_samplers == index for r in share if requests[r] >= 0)


def test_rows_without_state_fill_up() -> None:
    sample = [row(0, 4), row(1, 6), row(2, -1), row(3, -1), row(4, -1), row(5, -1)]
    assert share_out(sample, range(6), 2) == ((0, 1, 4), (2, 3, 5))
