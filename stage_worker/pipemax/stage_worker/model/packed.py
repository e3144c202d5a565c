"""Weights of matrix products in the layout that they are multiplied in.

torch's own `linear` hands oneDNN a plain matrix, which it rearranges within every product. Here
that is done once, at load. On CPUs where that is faster the products are our own (`products`); else
they are oneDNN's, and what follows them element by element (an activation, a sum, a product with
something else) happens while results are in registers. What fits neither is left to torch.

torch has had oneDNN's packed products since 2.0 for what its compiler makes of a model; they are
not in its documented interface, so whoever uses them asks `has_onednn` first.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional

from pipemax.stage_worker.model import products
from pipemax.stage_worker.model.products import TiledMatrix

_USUAL_ROWS: Final = 128
"""oneDNN's layout is chosen for so many rows; measured, it serves others just as well."""
_FINEST: Final = 8
_STEPS_PER_OCTAVE: Final = 64


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies packed matrices of `dtype`."""
    return products.can_tile(dtype) or has_onednn(dtype)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch hands packed matrices of `dtype` to oneDNN."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not _has_operations():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _has_operations() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


def warm_up(dtype: torch.dtype) -> None:
    """Compiles what products of `dtype` need, or loads what was compiled from disk."""
    if products.can_tile(dtype):
        products.warm_up(dtype)


def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """`rows`, or for oneDNN a few more: it compiles a product for each number of rows that it
    meets, which takes about a millisecond, so it should meet few. At most 1/64 more, or 7."""
    if products.can_tile(dtype):
        return rows
    step = _FINEST
    while step * _STEPS_PER_OCTAVE * 2 <= rows:
        step *= 2
    return -(-rows // step) * step


class PackedModule(nn.Module):
    """In the place of a Linear that transformers' modules call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._product = PackedLinear(linear)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        out = self._product(rows.reshape(-1, rows.shape[-1]))
        return out.view(*rows.shape[:-1], out.shape[-1])


def pack_modules(model: nn.Module) -> None:
    """Packs every Linear of `model` but those whose weights others use too: of a tied embedding
    there would then be two copies."""
    counts = Counter(id(parameter) for parameter in _parameters_of_modules(model))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and counts[id(child.weight)] == 1:
                setattr(module, name, PackedModule(child))


def _parameters_of_modules(model: nn.Module) -> Iterator[nn.Parameter]:
    """Each as often as there are modules that have it."""
    for module in model.modules():
        yield from module.parameters(recurse=False)


class Product(Protocol):
    """y = x·Wᵀ + b for rows `[rows, inputs]`."""

    def __call__(self, rows: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """`[rows, outputs]`, new; plus `other` of that shape."""
        ...


class PackedLinear:
    """y = x·Wᵀ + b for rows `[rows, inputs]`, of one or more matrices stacked.

    Keeps copies: what it was made of can go.
    """

    def __init__(self, *linears: nn.Linear, packed: bool = True) -> None:
        """`linears` have the same input; their outputs follow each other. `packed`: if possible.
        A single matrix that is not packed is not copied either."""
        weights: tuple[torch.Tensor, ...] = tuple(linear.weight.detach() for linear in linears)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = tuple(linear.bias.detach() for linear in linears if linear.bias is not None)
        if biases and len(biases) != len(linears):
            raise ValueError("some of the matrices have a bias and some have none")
        self.bias: torch.Tensor | None = torch.cat(biases) if biases else None
        self._product = _product_of(weight, self.bias, packed)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, outputs]`, new."""
        return self._product(rows)

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """y + other. `[rows, outputs]`, new."""
        return self._product(rows, other)


class GatedLinear:
    """silu(x·gateᵀ) · (x·upᵀ), element by element; silu(y) = y / (1 + exp(-y)). Keeps copies."""

    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        weights = gate.weight.detach(), up.weight.detach()
        plain = gate.bias is None and up.bias is None and weights[0].shape == weights[1].shape
        if plain and _can_tile(weights[0]):
            self._gated: TiledMatrix | None = TiledMatrix.gated(*weights)
        else:
            self._gated = None
            self._gate, self._up = (
                _product_of(linear.weight.detach(), linear.bias, True) for linear in (gate, up)
            )

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, inputs]` to `[rows, outputs]`, new."""
        if self._gated is not None:
            return self._gated(rows)
        if isinstance(self._gate, _OneDnnMatrix) and isinstance(self._up, _OneDnnMatrix):
            return self._up.times(rows, self._gate.swish(rows))
        return functional.silu(self._gate(rows)) * self._up(rows)


def _product_of(weight: torch.Tensor, bias: torch.Tensor | None, packed: bool) -> Product:
    if packed and _can_tile(weight):
        return TiledMatrix(weight, bias)
    if packed and has_onednn(weight.dtype):
        return _OneDnnMatrix(weight, bias)
    return _PlainMatrix(weight, bias)


def _can_tile(weight: torch.Tensor) -> bool:
    return products.can_tile(weight.dtype) and products.fits_panels(weight)


class _PlainMatrix:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, rows: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        found = functional.linear(rows, self._weight, self._bias)
        return found if other is None else found + other


class _OneDnnMatrix:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS)
        self._bias = bias

    def __call__(self, rows: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return self._unary(rows, "none") if other is None else self._binary(rows, other, "add")

    def swish(self, rows: torch.Tensor) -> torch.Tensor:
        """silu(y)."""
        return self._unary(rows, "swish")

    def times(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """y · other, element by element."""
        return self._binary(rows, other, "mul")

    def _unary(self, rows: torch.Tensor, what: Literal["none", "swish"]) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, what, [], ""
        )
        return out

    def _binary(
        self, rows: torch.Tensor, other: torch.Tensor, what: Literal["add", "mul"]
    ) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows, other, self._weight, self._bias, what
        )
        return out
