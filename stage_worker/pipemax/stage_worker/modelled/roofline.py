"""How long a step takes on a stage.

Stage time, for `rows` tokens in the batch over `context` tokens of KV:

    t = max(weights / (η_b·B_h), 2·P_active·rows / (η_c·F)) + attention + t_fix

with B_h the device memory's bandwidth and F the peak FLOP/s. Attention of decode reads the KV:
κ·context / (η_a·B_h), κ the KV bytes of a token on the stage. Attention of a prompt computes:
4·layers·heads·head_dim FLOP for each pair of a new token and a token it sees.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from pipemax.proto.errors import ConfigError
from pipemax.stage_worker.modelled.catalogue import Gpu, ModelShape

TILE_TOKENS = 128
_FIRST_TILE_CLIMB = 0.36
"""Measured on an L20 (Llama-13B and Qwen2.5-32B): at 128 tokens a step takes 1.36 times as long as
at 1, although weights alone should bound it."""


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """Shares of the data sheet's figures that are reached, and what is set aside."""

    hbm: float = 0.87
    """Weight streaming; 0.85 to 0.89 measured on an L20."""
    gemm: float = 0.85
    attention: float = 0.75
    link: float = 0.9
    """Closed form only. In the simulation the scheduler's own η takes this place."""
    usable_memory: float = 0.92
    reserved_bytes: float = 1.5e9
    """Activations, workspace and the driver's own."""
    t_fix_s: float = 0.3e-3
    """Launches and the like, per step and stage."""
    gemm_staircase: bool = False
    """GEMM cost climbs in steps of 128 tokens, shaped after measurements on an L20."""


DEFAULT_EFFICIENCIES = Efficiencies()


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What of a step the time depends on."""

    decode_rows: int
    """Tokens of decode items: one each."""
    decode_context: int
    """Context tokens that decode items read, summed."""
    prefill_rows: int = 0
    """Prompt tokens."""
    prefill_pairs: int = 0
    """Pairs of a new prompt token and a token it attends to, summed."""
    prefill_context: int = 0
    """Context tokens in the KV cache before each prompt chunk, summed: read once per chunk."""


@dataclass(frozen=True)
class StageModel:
    """One stage's share of a model on one GPU. Times in seconds, sizes in bytes."""

    gpu: Gpu
    model: ModelShape
    num_layers: int
    efficiencies: Efficiencies = DEFAULT_EFFICIENCIES
    weight_element_bytes: float = 2.0
    kv_element_bytes: float = 2.0
    free_prefill: bool = False
    """Prompt tokens cost no time: isolates decode, where the closed form is about it."""

    @cached_property
    def share(self) -> float:
        """This stage's share of the model. Embedding and head are spread like the layers."""
        return self.num_layers / self.model.num_layers

    @cached_property
    def weights_bytes(self) -> float:
        return self.weight_element_bytes * self.model.parameters * self.share

    @cached_property
    def kv_token_bytes(self) -> float:
        return self.model.kv_token_bytes(self.num_layers, self.kv_element_bytes)

    @cached_property
    def kv_bytes(self) -> float:
        """Device memory left for KV. Raises ConfigError when the weights alone do not fit."""
        usable = self.efficiencies.usable_memory * self.gpu.memory_bytes
        left = usable - self.weights_bytes - self.efficiencies.reserved_bytes
        if left <= 0:
            raise ConfigError(
                f"{self.num_layers} layers of {self.model.name} need "
                f"{self.weights_bytes / 1e9:.1f} GB, {self.gpu.name} has {usable / 1e9:.1f} GB "
                "usable: use more GPUs or larger ones"
            )
        return left

    @cached_property
    def knee(self) -> float:
        """Requests in a batch at which GEMM takes as long as streaming the weights."""
        per_row = self._gemm_s(1)
        return self._weights_s(math.inf) / per_row

    def step_s(self, load: StepLoad) -> float:
        """Compute time of one step."""
        efficiencies = self.efficiencies
        read_s = 1 / (efficiencies.attention * self.gpu.hbm_bytes_s)
        attention_s = self.kv_token_bytes * load.decode_context * read_s
        rows = load.decode_rows
        if not self.free_prefill:
            attention_s += self.kv_token_bytes * load.prefill_context * read_s
            attention_s += self._pair_s * load.prefill_pairs
            rows += load.prefill_rows
        return self._linear_s(rows) + attention_s + efficiencies.t_fix_s

    def decode_s(self, requests: float, context: float) -> float:
        """Step time of a batch of `requests` that decode over `context` tokens in all; both may be
        fractions, for closed forms."""
        read = self.kv_token_bytes * context / (self.efficiencies.attention * self.gpu.hbm_bytes_s)
        return self._linear_s(requests) + read + self.efficiencies.t_fix_s

    def prefill_tokens_s(self, prompt_tokens: float, chunk_tokens: float = 4096) -> float:
        """Prompt tokens per second of this stage when it does nothing but prefill whole prompts of
        this length in batches of `chunk_tokens`."""
        pairs = chunk_tokens * (prompt_tokens + 1) / 2
        seconds = self._linear_s(chunk_tokens) + self._pair_s * pairs + self.efficiencies.t_fix_s
        return chunk_tokens / seconds

    def hop_bytes(self, rows: int) -> float:
        """Activations to the next stage."""
        return self.model.hidden_size * rows * self.weight_element_bytes

    @cached_property
    def _pair_s(self) -> float:
        model = self.model
        flop = 4 * self.num_layers * model.num_heads * model.head_dim
        return flop / (self.efficiencies.gemm * self.gpu.flop_s)

    def _linear_s(self, rows: float) -> float:
        """Everything but attention and t_fix."""
        if not self.efficiencies.gemm_staircase:
            return max(self._weights_s(rows), self._gemm_s(rows))
        climb = 1 + _FIRST_TILE_CLIMB * min(rows, TILE_TOKENS) / TILE_TOKENS
        tiles = rows if rows <= TILE_TOKENS else TILE_TOKENS * math.ceil(rows / TILE_TOKENS)
        return max(self._weights_s(rows) * climb, self._gemm_s(tiles))

    def _weights_s(self, rows: float) -> float:
        """Streaming the weights that `rows` tokens touch: of the experts only those chosen, each
        with the same probability and independently."""
        model = self.model
        used = model.parameters
        if model.expert_parameters:
            missed = (1 - model.experts_per_token / model.num_experts) ** rows
            used -= model.num_experts * model.expert_parameters * missed
        used_bytes = self.weight_element_bytes * used * self.share
        return used_bytes / (self.efficiencies.hbm * self.gpu.hbm_bytes_s)

    def _gemm_s(self, rows: float) -> float:
        flop = 2 * self.model.active_parameters * self.share * rows
        return flop / (self.efficiencies.gemm * self.gpu.flop_s)
