"""Every attention backend of this machine against float64."""

import importlib.util
import math
import os
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from pipemax.stage_worker.attention.device.base import AttentionBackend
from support.attention_cases import CASES, Case
from support.attention_errors import FAR_BLOCKS, measure, open_backend, relative_error

LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""‖out − expected‖ / ‖expected‖."""
BACKENDS = ("triton", "flashinfer", "reference")
_REHEARSED = (0, 4, 8, 20, 29, 32)
"""Cases for Triton's interpreter, which is slow."""


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_follows_the_definition(
    name: str, device: torch.device, rehearsal: bool, figure: Callable[..., None]
) -> None:
    if name != "reference" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "flashinfer" and rehearsal:
        pytest.skip("flashinfer runs on GPUs only")
    numbers = _REHEARSED if rehearsal else (FAR_BLOCKS, *range(len(CASES)))
    processes = 1 if rehearsal or name == "reference" else min(8, os.cpu_count() or 1)
    largest: dict[str, float] = defaultdict(float)
    wrong = []
    for number, (error, problem) in measure(name, device.type, numbers, processes).items():
        case = Case("float16") if number == FAR_BLOCKS else CASES[number]
        largest[case.dtype] = max(largest[case.dtype], float(error))
        if problem or not float(error) <= LARGEST_ERROR[case.dtype]:
            what = "far blocks" if number == FAR_BLOCKS else str(case)
            wrong.append(f"{what}: {problem or f'error {float(error):.2e}'}")
    for dtype, error in largest.items():
        figure(
            f"{name} {dtype}: largest relative error", error, at_most=LARGEST_ERROR[dtype],
            note="‖out − float64‖ / ‖float64‖",
        )  # fmt: skip
    assert not wrong, "\n".join(wrong)


class _Spoiled:
    """A backend whose output is off in one element."""

    def __init__(self, backend: AttentionBackend, by: float) -> None:
        self._backend, self._by = backend, by
        self.bind_pool, self.plan = backend.bind_pool, backend.plan

    def attend(self, *arguments: object, **options: object) -> torch.Tensor:
        out = self._backend.attend(*arguments, **options).clone()  # type: ignore[arg-type]
        out.view(-1)[3] += self._by
        return out


@pytest.mark.parametrize("by", [1.0, math.nan])
def test_a_wrong_output_is_seen(device: torch.device, by: float) -> None:
    """The yardstick itself."""
    case = Case("bfloat16")
    with pytest.raises(AssertionError):
        relative_error(_Spoiled(open_backend("reference", case, device), by), case, device)  # type: ignore[arg-type]
