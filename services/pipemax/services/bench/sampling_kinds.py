"""Kinds of sampling that are measured apart, as the fields of SamplingParams."""

from typing import Any

STEEP = 0.05
"""Temperature at which made-up weights, whose logits are nearly equal (a standard deviation of
about 0.3), give probabilities as unequal as a trained model's."""
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": STEEP},
    "top-p": {"temperature": STEEP, "top_p": 0.9},
    "top-k": {"temperature": STEEP, "top_k": 50},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}
