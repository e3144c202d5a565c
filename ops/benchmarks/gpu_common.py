"""What the benchmarks of `make gpu-check` share: the model, the system's settings, a rehearsal's
small sizes."""

import argparse
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_findings import FindingsWriter

from pipemax.services.cli.options import EngineOptions
from pipemax.services.tiny_model import ModelShape, make_text_folder

SHAPE_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=128_256,
    max_position_embeddings=8192,
    dtype="bfloat16",
)
"""Llama 3 8B's sizes: 8.03 G parameters, 128 KiB of KV per token."""
SHAPE_SMALL = ModelShape(
    num_layers=4,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=4096,
    dtype="bfloat16",
)
"""For rehearsals on a CPU."""


def run(doc: str | None, part: Callable[[argparse.Namespace, FindingsWriter, Path], None]) -> int:
    """A benchmark's `main`: takes the arguments all have, gives `part` a folder of its own and
    returns the exit status. A system that fails is a finding."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--findings", type=Path, metavar="FILE", help="what was found, as JSON")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes")
    asked = parser.parse_args()
    found = FindingsWriter(asked.findings)
    with tempfile.TemporaryDirectory(prefix="pipemax-bench-") as folder:
        try:
            part(asked, found, Path(folder))
        except Exception as error:
            traceback.print_exc()
            found.fail(" ".join(f"{type(error).__name__}: {error}".split()))
    return 0 if found.finish() else 1


def shape_for(rehearse: bool) -> ModelShape:
    return SHAPE_SMALL if rehearse else SHAPE_8B


def write_model(directory: Path, shape: ModelShape) -> Path:
    """A model folder without weights, for `--load-format dummy`. Returns `directory`."""
    make_text_folder(directory)
    ids = json.loads((directory / "generation_config.json").read_text())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": shape.dtype,
        **ids,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def weights_bytes(shape: ModelShape) -> int:
    """Of the whole model."""
    item_bytes = 2 if shape.dtype == "bfloat16" else 4
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = shape.num_kv_heads * shape.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    return item_bytes * (shape.num_layers * layer + 2 * shape.vocab_size * hidden + hidden)


def kv_token_bytes(shape: ModelShape) -> int:
    """Of one token, on all stages together."""
    item_bytes = 2 if shape.dtype == "bfloat16" else 4
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item_bytes


def engine_options(model: Path, stages: int, *, rehearse: bool, **settings: Any) -> EngineOptions:
    """All stages on GPU 0, random weights; blocks and pools as large as they are by default."""
    device: dict[str, Any] = {"device": "cpu", "threads_per_stage": 1}
    if not rehearse:
        device = {"device": "cuda", "gpus": ",".join(["0"] * stages)}
    return EngineOptions(
        model=str(model),
        pipeline_parallel_size=stages,
        load_format="dummy",
        **device,
        **settings,
    )
