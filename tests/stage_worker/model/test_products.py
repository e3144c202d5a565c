"""Our own matrix products against float64's."""

import pytest
import torch
from torch.nn import functional

from pipemax.stage_worker.model import products
from pipemax.stage_worker.model.products import TiledMatrix

DTYPES = (torch.float32, torch.bfloat16)
ERRORS = {torch.float32: 4e-6, torch.bfloat16: 8e-3}
"""Of the largest number: of sums of thousands of float32, and of one rounding."""


@pytest.fixture(autouse=True)
def _needs_vectors(request: pytest.FixtureRequest) -> None:
    dtype = request.node.callspec.params["dtype"]
    if not products.can_tile(dtype):
        pytest.skip(f"this CPU has faster products of {dtype}, or none of these")


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` is float64."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < ERRORS[found.dtype]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 5, 12, 13, 29, 205])
@pytest.mark.parametrize("shape", [(64, 96), (96, 512), (32, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_number_of_rows(
    dtype: torch.dtype, shape: tuple[int, int], rows: int, threads: int
) -> None:
    """Rows of 512 and 4,096 numbers lie in few sets of a cache; 205 are more than a block."""
    outputs, inputs = shape
    weight, left = _random(dtype, outputs, inputs), _random(dtype, rows, inputs)
    bias, other = _random(dtype, outputs), _random(dtype, rows, outputs)
    product = left.double() @ weight.double().T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _assert_near(TiledMatrix(weight)(left), product)
        matrix = TiledMatrix(weight, bias)
        _assert_near(matrix(left), product + bias.double())
        _assert_near(matrix(left, other), product + bias.double() + other.double())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [3, 7, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_products(dtype: torch.dtype, rows: int) -> None:
    gate, up = 0.3 * _random(dtype, 96, 64), _random(dtype, 96, 64).flip(0)
    left = _random(dtype, rows, 64)
    activated = functional.silu(left.double() @ gate.double().T)
    _assert_near(TiledMatrix.gated(gate, up)(left), activated * (left.double() @ up.double().T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_and_none(dtype: torch.dtype) -> None:
    weight, wide = _random(dtype, 32, 16), _random(dtype, 6, 40)
    matrix = TiledMatrix(weight)
    _assert_near(matrix(wide[:, 8:24]), wide[:, 8:24].double() @ weight.double().T)
    assert matrix(wide[:0, :16]).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_fits_no_panel(dtype: torch.dtype) -> None:
    assert products.fits_panels(torch.empty(64, 16, dtype=dtype))
    assert not products.fits_panels(torch.empty(48, 16, dtype=dtype))
    assert products.fits_panels(torch.empty(64, 15, dtype=dtype)) == (dtype == torch.float32)
