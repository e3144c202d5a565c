"""Compiles the attention kernels for GPUs that are not there, as a launch would, and says what the
compiled code takes."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipemax.proto.geometry import DTYPE_BYTES, Dtype
from pipemax.stage_worker.attention.device import triton_kernels as kernels
from pipemax.stage_worker.attention.device.launch import (
    MAX_SPLITS,
    Launch,
    decode_launch,
    padded,
    prefill_launch,
)
from pipemax.stage_worker.attention.device.layout import tile_tokens

SHARED_LIMIT_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Of one program, by compute capability: CUDA C++ programming guide, technical specifications."""

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_FLOAT32_POINTERS = {"partial_sums", "partial_stats"}
_POOL_POINTERS = {"out", "query", "keys", "values", "key_pool", "value_pool"}
_KV_HEADS, _BLOCK_SIZE = 8, 16


@dataclass(frozen=True)
class Usage:
    """Of one thread, and of one program."""

    registers: int
    stack_bytes: int
    """Registers that did not fit, in local memory."""
    shared_bytes: int
    ptx: str


def attend_decodes(
    dtype: Dtype,
    head_dim: int,
    capability: int,
    *,
    group: int = 4,
    softcap: bool = False,
    whole: bool = False,
    launch: Launch | None = None,
) -> Usage:
    launch = launch or decode_launch(head_dim, DTYPE_BYTES[dtype])
    sizes = _sizes(dtype, head_dim, group, softcap, launch)
    sizes |= {"ROWS": padded(group), "WHOLE": whole}
    return _compile(kernels.attend_decodes, dtype, capability, launch, sizes)


def attend_tiles(
    dtype: Dtype,
    head_dim: int,
    capability: int,
    *,
    group: int = 4,
    softcap: bool = False,
    launch: Launch | None = None,
) -> Usage:
    launch = launch or prefill_launch(head_dim, DTYPE_BYTES[dtype])
    tokens = tile_tokens(group, 1, DTYPE_BYTES[dtype])
    sizes = _sizes(dtype, head_dim, group, softcap, launch)
    sizes |= {"TOKENS": tokens, "ROWS": padded(tokens * group)}
    return _compile(kernels.attend_tiles, dtype, capability, launch, sizes)


def reduce_splits(dtype: Dtype, head_dim: int, capability: int) -> Usage:
    launch = decode_launch(head_dim, DTYPE_BYTES[dtype])
    sizes = {"HEADS": 32, "HEAD_DIM": head_dim, "DIMS": padded(head_dim), "TILE": launch.tile}
    one_warp = Launch(launch.tile, 1, 1)
    return _compile(
        kernels.reduce_splits, dtype, capability, one_warp, {**sizes, "MAX_SPLITS": MAX_SPLITS}
    )


def write_kv(dtype: Dtype, head_dim: int, capability: int) -> Usage:
    sizes = {"KV_HEADS": _KV_HEADS, "HEAD_DIM": head_dim, "BLOCK_SIZE": _BLOCK_SIZE, "WIDTH": 1024}
    return _compile(kernels.write_kv, dtype, capability, Launch(0, 4, 1), sizes)


def _sizes(
    dtype: Dtype, head_dim: int, group: int, softcap: bool, launch: Launch
) -> dict[str, Any]:
    return {
        "KV_HEADS": _KV_HEADS,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": _BLOCK_SIZE,
        "DIMS": padded(head_dim),
        "TILE": launch.tile,
        "SOFTCAP": softcap,
        "PRECISION": "ieee" if dtype == "float32" else "tf32",
    }


def _compile(
    kernel: Any, dtype: Dtype, capability: int, launch: Launch, sizes: dict[str, Any]
) -> Usage:
    names = kernel.arg_names
    types = {name: "constexpr" if name in sizes else _type(name, dtype) for name in names}
    # A launch finds out by itself that pointers and strides are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or name.endswith("stride")
    }
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in sizes.items()}, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _type(name: str, dtype: Dtype) -> str:
    if name in _POOL_POINTERS:
        return f"*{_TYPES[dtype]}"
    if name in _FLOAT32_POINTERS:
        return "*fp32"
    if name == "slots":
        return "*i64"
    if name in ("inner", "outer"):
        return "fp32"
    if name == "block_stride":
        return "i64"
    return "i32" if name in ("window", "splits") or name.endswith("stride") else "*i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes, by the cuobjdump that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", found.stdout)
    assert match, found.stdout
    return int(match[1]), int(match[2])
