"""Weights of matrix products in the layout that oneDNN computes with.

torch's own `linear` hands oneDNN a plain matrix, which it rearranges within every product. Done
once at load, products of a few rows take half to two thirds of their time, large ones 5 to 10 %
less in bfloat16 and 20 to 40 % less in float32 (ops/benchmarks/LOG.md). What follows a product
element by element (an activation, a sum, a product with something else) happens while its result is
in registers.

torch has had these operations since 2.0 for what its compiler makes of a model; they are not in
its documented interface, so whoever uses them asks `can_pack` first.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional

_USUAL_ROWS: Final = 128
"""The layout is chosen for so many rows; measured, it serves others just as well."""
_FINEST: Final = 8
_STEPS_PER_OCTAVE: Final = 64


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and this torch multiply packed matrices of `dtype`."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not _has_operations():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _has_operations() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


def padded_rows(rows: int) -> int:
    """`rows` or a few more: oneDNN compiles a product for each number of rows that it meets, which
    takes about a millisecond, so it should meet few. At most 1/64 more, or 7."""
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


class PackedLinear:
    """y = x·Wᵀ + b for rows `[rows, inputs]`, of one or more matrices stacked.

    Keeps copies: what it was made of can go. Plain torch where `can_pack` says no.
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
        self._packed = packed and can_pack(weight.dtype)
        self._weight: Any = weight
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, outputs]`, new."""
        return self._unary(rows, "none")

    def swish(self, rows: torch.Tensor) -> torch.Tensor:
        """silu(y) = y / (1 + exp(-y)). `[rows, outputs]`, new."""
        if self._packed:
            return self._unary(rows, "swish")
        return functional.silu(self(rows))

    def times(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """y · other, element by element. `[rows, outputs]`, new."""
        return self._binary(rows, other, "mul") if self._packed else self(rows) * other

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """y + other. `[rows, outputs]`, new."""
        return self._binary(rows, other, "add") if self._packed else self(rows) + other

    def _unary(self, rows: torch.Tensor, what: Literal["none", "swish"]) -> torch.Tensor:
        if not self._packed:
            return functional.linear(rows, self._weight, self.bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self.bias, what, [], ""
        )
        return out

    def _binary(
        self, rows: torch.Tensor, other: torch.Tensor, what: Literal["add", "mul"]
    ) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows, other, self._weight, self.bias, what
        )
        return out
