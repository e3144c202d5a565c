"""The model that a benchmark runs where none is given."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipemax.services.tiny_model import ModelShape, make_demo_model

SHAPE_121M = ModelShape(
    num_layers=14,
    hidden_size=768,
    intermediate_size=2304,
    num_heads=12,
    num_kv_heads=4,
    vocab_size=16_384,
    dtype="bfloat16",
)
"""A Llama of 121 million parameters, untied: large enough that its weights do not fit a cache,
small enough that two cores run hundreds of requests in a minute."""


@contextlib.contextmanager
def model_folder(given: Path | None, shape: ModelShape = SHAPE_121M) -> Iterator[Path]:
    """The folder given, or one of random weights that goes at the end of the block."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="pipemax-bench-") as folder:
        yield make_demo_model(Path(folder), shape=shape)
