"""Our Triton kernels against float64, in Triton's interpreter: logic, not speed. On a GPU the same
cases run compiled."""

import pytest

pytest.importorskip("triton")

from support import triton_interpreter
from support.attention_cases import CASES
from support.triton_interpreter import FAR_BLOCKS

_ALL = [(index, splits) for index in range(len(CASES)) for splits in (1, 4)]
_SUITE = {(8, 4), (10, 1), (20, 4), (25, 1), (29, 1), (31, 4), (32, 4), (33, 1)}
"""The suite runs some, `make test-full` all of them."""


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest) -> dict[tuple[int, int], str]:
    wanted = [
        item.callspec.params["run"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    return triton_interpreter.finish(triton_interpreter.start([*wanted, (FAR_BLOCKS, 4)]))


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            run,
            id=f"{CASES[run[0]]}, {run[1]} splits",
            marks=[] if run in _SUITE else [pytest.mark.full],
        )
        for run in _ALL
    ],
)
def test_kernels_follow_the_definition(
    errors: dict[tuple[int, int], str], run: tuple[int, int]
) -> None:
    assert errors[run] == ""


def test_pools_of_more_than_2_31_numbers(errors: dict[tuple[int, int], str]) -> None:
    assert errors[FAR_BLOCKS, 4] == ""
