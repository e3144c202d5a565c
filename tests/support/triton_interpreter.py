"""Runs attention cases through Triton's interpreter, in a process of its own: triton looks at
TRITON_INTERPRET when it is imported.

    python -m support.triton_interpreter 3:1 7:4     (number of the case : splits; prints JSON)

Number -1 is `check_far_blocks`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.attention_cases import CASES

FAR_BLOCKS = -1


def start(cases: list[tuple[int, int]]) -> "subprocess.Popen[str]":
    """Starts checking `(index in CASES, splits)`."""
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, *(f"{index}:{splits}" for index, splits in cases)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> dict[tuple[int, int], str]:
    """What went wrong, by case and splits; empty text where nothing did."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the interpreter's process ended with {process.returncode}")
    return {(index, splits): error for index, splits, error in json.loads(out)}


def _mend_interpreter() -> None:
    """What triton 3.6's interpreter lacks: bounds of loops with NumPy 2.4, which makes no number of
    an array of one, and products of bfloat16, whose bits it multiplies as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    dot = interpreter.InterpreterBuilder.create_dot

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = create_dot


def _main() -> None:
    _mend_interpreter()
    import torch

    from pipemax.stage_worker.attention.device.triton_backend import TritonBackend
    from support import attention_cases

    results = []
    for argument in sys.argv[1:]:
        index, splits = map(int, argument.split(":"))
        error = ""
        try:
            backend = TritonBackend(1, splits=splits)
            if index == FAR_BLOCKS:
                attention_cases.check_far_blocks(backend, torch.device("cpu"))
            else:
                attention_cases.check(backend, CASES[index], torch.device("cpu"))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        results.append((index, splits, error))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
