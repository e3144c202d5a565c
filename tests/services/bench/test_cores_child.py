"""How a core's products are measured: on which weights, and that packed ones give the same."""

import pytest
import torch

from pipemax.services.bench import cores_child
from pipemax.services.bench.cores_child import (
    Model,
    Product,
    layer_after_layer,
    made_layers,
    packed_products,
    plain_products,
    products_flop_s,
    tiled_products,
)

SHAPES = ((32, 16), (16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_gives_what_plain_weights_give(dtype: torch.dtype) -> None:
    model = Model(((32, 16), (64, 16)), dtype, 2)
    rows = torch.randn(8, 16).to(dtype)
    plain = plain_products(model)
    assert len(plain) == 2
    for way in (packed_products(model, 8), tiled_products(model)):
        assert len(way) in (0, 2)  # this CPU may lack one
        for layer, its_other in zip(plain, way, strict=False):
            for other, product in zip(its_other, layer, strict=True):
                torch.testing.assert_close(other(rows), product(rows), atol=0.1, rtol=0.1)


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
    seen: list[tuple[int, int, int]] = []

    def product(layer: int, matrix: int) -> Product:
        def note(rows: torch.Tensor) -> torch.Tensor:
            seen.append((layer, matrix, rows.shape[1]))
            return rows

        return note

    layers = [[product(layer, matrix) for matrix in range(2)] for layer in range(2)]
    once = layer_after_layer(layers, [torch.ones(4, 3), torch.ones(4, 2)])
    for _ in range(3):
        once()
    assert seen == [(0, 0, 3), (0, 1, 2), (1, 0, 3), (1, 1, 2), (0, 0, 3), (0, 1, 2)]


def test_the_fastest_way_counts_and_a_missing_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([4.0, 2.0, 3.0])
    monkeypatch.setattr(cores_child, "tiled_products", plain_products)
    monkeypatch.setattr(cores_child, "mean_s", lambda once, seconds: next(times))
    task = {"rows": 8, "matrices": SHAPES, "dtype": "float32", "layers": 1, "seconds": 0.0}
    flop = 2 * 8 * 2 * 32 * 16
    assert products_flop_s(task) == flop / 2.0
    monkeypatch.setattr(cores_child, "packed_products", lambda model, rows: [])
    monkeypatch.setattr(cores_child, "tiled_products", lambda model: [])
    monkeypatch.setattr(cores_child, "mean_s", lambda once, seconds: 4.0)
    assert products_flop_s(task) == flop / 4.0
