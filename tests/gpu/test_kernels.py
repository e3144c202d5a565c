"""Every attention backend of this machine against float64."""

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention.device.base import AttentionBackend
from pipemax.stage_worker.attention.device.select import open_attention
from support import attention_cases
from support.attention_cases import CASES, Case

LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""‖out − expected‖ / ‖expected‖."""
BACKENDS = ("triton", "flashinfer", "reference")
_INTERPRETED = 12
"""Cases of a rehearsal: Triton's interpreter is slow."""


def _backend(name: str, case: Case, device: torch.device) -> AttentionBackend:
    geometry = BlockGeometry(3, case.block_size, case.kv_heads, case.head_dim, case.dtype)
    return open_attention(geometry, case.kv_heads * case.group, name, device).backend


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_follows_the_definition(
    name: str, device: torch.device, rehearsal: bool, figure: Callable[..., None]
) -> None:
    if name != "reference" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "flashinfer" and rehearsal:
        pytest.skip("flashinfer runs on GPUs only")
    largest: dict[str, float] = defaultdict(float)
    wrong = []
    for case in CASES[:_INTERPRETED] if rehearsal else CASES:
        try:
            error = relative_error(_backend(name, case, device), case, device)
        except AssertionError as problem:
            wrong.append(f"{case}: {str(problem).splitlines()[0]}")
            continue
        largest[case.dtype] = max(largest[case.dtype], error)
        if not error <= LARGEST_ERROR[case.dtype]:
            wrong.append(f"{case}: error {error:.2e}")
    for dtype, error in largest.items():
        figure(
            f"{name} {dtype}: largest relative error", error, at_most=LARGEST_ERROR[dtype],
            note="‖out − float64‖ / ‖float64‖",
        )  # fmt: skip
    assert not wrong, "\n".join(wrong)


def relative_error(backend: AttentionBackend, case: Case, device: torch.device) -> float:
    """Infinite for an output that is not finite everywhere. Raises AssertionError when the pool is
    not what it should be, bit by bit, or an element is off."""
    prepared = attention_cases.prepare(case, device)
    poison(device, prepared.query)
    attention_cases.check(backend, case, device)
    poison(device, prepared.query)
    out, _ = attention_cases.run(backend, prepared)
    out = out.double()
    if not bool(torch.isfinite(out).all()):
        return math.inf
    return float((out - prepared.expected).norm() / prepared.expected.norm())


def poison(device: torch.device, like: torch.Tensor) -> None:
    """Fills the memory that torch is about to give out with NaN, so that an output that is not
    written shows."""
    if device.type == "cuda":
        spoiled = [torch.full_like(like, math.nan) for _ in range(8)]
        spoiled += [torch.full((size,), math.nan, device=device) for size in (2**12, 2**16, 2**21)]
        del spoiled


def test_a_wrong_output_is_seen(device: torch.device) -> None:
    """The yardstick itself: one element off, and one that is no number."""
    case = Case("bfloat16")

    class Spoiled:
        def __init__(self, backend: AttentionBackend, by: float) -> None:
            self._backend, self._by = backend, by
            self.bind_pool, self.plan = backend.bind_pool, backend.plan

        def attend(self, *arguments: object, **options: object) -> torch.Tensor:
            out = self._backend.attend(*arguments, **options)  # type: ignore[arg-type]
            out = out.clone()
            out.view(-1)[3] += self._by
            return out

    for by in (1.0, math.nan):
        with pytest.raises(AssertionError):
            relative_error(Spoiled(_backend("reference", case, device), by), case, device)  # type: ignore[arg-type]
