"""How a core's products are measured: on which weights, and that packed ones give the same."""

import pytest
import torch

from pipemax.services.bench import cores_child
from pipemax.services.bench.cores_child import (
    Model,
    layer_after_layer,
    made_layers,
    packed_layers,
    packed_linear,
    products_flop_s,
)

SHAPES = ((32, 16), (16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_what_plain_ones_give(dtype: torch.dtype) -> None:
    model = Model(SHAPES, dtype, 2)
    rows = torch.randn(8, 16).to(dtype)
    plain, packed = made_layers(model), packed_layers(model, 8)
    assert len(plain) == len(packed) == 2
    for layer, its_packed in zip(plain, packed, strict=True):
        expected = torch.nn.functional.linear(rows, layer[0])
        torch.testing.assert_close(packed_linear(rows, its_packed[0]), expected, atol=0.1, rtol=0.1)


def test_as_many_layers_as_no_cache_holds_but_no_more_than_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores_child, "_WEIGHTS_BYTES", 3 * 4 * 2 * 32 * 16 - 1)
    made_layers.cache_clear()
    assert len(made_layers(Model(SHAPES, torch.float32, 9))) == 3
    assert len(made_layers(Model(SHAPES, torch.bfloat16, 9))) == 6
    assert len(made_layers(Model(SHAPES, torch.float32, 2))) == 2
    made_layers.cache_clear()


def test_layers_take_turns() -> None:
    layers = [[torch.full((2, 3), float(n)), torch.full((1, 2), 10.0 * n)] for n in range(2)]
    seen: list[float] = []

    def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        assert rows.shape[1] == matrix.shape[1]
        seen.append(matrix[0, 0].item())
        return rows

    once = layer_after_layer(layers, {3: torch.ones(4, 3), 2: torch.ones(4, 2)}, product)
    for _ in range(3):
        once()
    assert seen == [0.0, 0.0, 1.0, 10.0, 0.0, 0.0]


def test_the_faster_way_counts_and_a_missing_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([4.0, 2.0])
    monkeypatch.setattr(cores_child, "mean_s", lambda once, seconds: next(times))
    task = {"rows": 8, "matrices": SHAPES, "dtype": "float32", "layers": 1, "seconds": 0.0}
    flop = 2 * 8 * 2 * 32 * 16
    assert products_flop_s(task) == flop / 2.0
    monkeypatch.setattr(cores_child, "packed_layers", lambda model, rows: [])
    monkeypatch.setattr(cores_child, "mean_s", lambda once, seconds: 4.0)
    assert products_flop_s(task) == flop / 4.0
