"""A stage's layers as few large operations, for families whose layer is Llama's.

    x ← x + O·attention(rotary(QKV·norm(x)))
    x ← x + down·(silu(gate·norm(x)) · (up·norm(x)))

transformers' modules compute the same one small operation at a time and look their arguments up in
each; around the same products that takes 1.4 to 1.55 times as long (ops/benchmarks/LOG.md). Here a
layer is four products with what follows them inside, two norms, and attention with the rotation.
The weights are taken out of transformers' modules, which stay as the plain form of all this:
`--no-fused-layers` runs them.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pipemax.stage_worker.attention.interface import HeadNorm, Rotary
from pipemax.stage_worker.attention.paged import PagedAttention
from pipemax.stage_worker.model.families import Family
from pipemax.stage_worker.model.packed import GatedLinear, PackedLinear, padded_rows
from pipemax.stage_worker.model.row_kernels import rms_norm


class FusedLayers:
    """Layers of one stage, and on the last one the norm and head behind them."""

    def __init__(
        self, model: Any, family: Family, layers: tuple[int, int], attention: PagedAttention
    ) -> None:
        """Takes the weights of `model`, which cannot compute afterwards."""
        base = model.base_model
        self._attention = attention
        self._rotary: nn.Module = base.rotary_emb
        self._layers = [
            _FusedLayer(layer, index, _window(family, layer, model.config), attention)
            for index, layer in enumerate(base.layers[slice(*layers)])
        ]
        self._norm: _Norm | None = None
        self._head: PackedLinear | None = None
        if model.lm_head is not None:
            self._norm = _Norm(getattr(base, family.norm))
            embedding = getattr(base, family.embedding)
            tied = embedding is not None and embedding.weight is model.lm_head.weight
            self._head = PackedLinear(model.lm_head, packed=not tied)
            if not tied:
                _let_go(model.lm_head)

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that each layer's attention sees; 0: all."""
        return tuple(layer.window for layer in self._layers)

    def run(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden` `[T, hidden]` and its `position_ids` `[1, T]`. Output of the last layer, before
        any final norm: of the rows `kept`, int64, where it is given, else of all."""
        step = _Step(hidden.shape[0], self._rotary_of(position_ids))
        hidden = _pad(hidden, padded_rows(step.rows, hidden.dtype))
        *others, last = self._layers
        for layer in others:
            hidden = layer.run(hidden, step)
        if kept is None:
            return last.run(hidden, step)[: step.rows]
        if kept.shape[0] == step.rows:
            return last.run(hidden, step)[kept]
        return last.run(hidden, step, kept)[: kept.shape[0]]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, vocab]` in the model's dtype, of the last layer's output `[rows, hidden]`."""
        assert self._norm is not None
        assert self._head is not None
        rows = hidden.shape[0]
        return self._head(self._norm(_pad(hidden, padded_rows(rows, hidden.dtype))))[:rows]

    def _rotary_of(self, position_ids: torch.Tensor) -> Rotary:
        """In float32, whatever the model's dtype is."""
        like = torch.empty(0, dtype=torch.float32)
        cos, sin = self._rotary(like, position_ids)
        return Rotary(cos[0], sin[0])


class _Step(NamedTuple):
    rows: int
    """That are the step's, the first of padded ones."""
    rotary: Rotary


class _Norm:
    """RMSNorm, as transformers' module of that kind."""

    def __init__(self, module: Any) -> None:
        self._weight: torch.Tensor = module.weight.detach()
        self._epsilon: float = module.variance_epsilon

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return rms_norm(rows, self._weight, self._epsilon)


class _FusedLayer:
    def __init__(self, layer: Any, index: int, window: int, attention: PagedAttention) -> None:
        """`index`: within the stage. Lets go of the weights of `layer` that it copies."""
        heads, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._attention = attention
        self._scaling: float = heads.scaling
        self.window = window
        self._head_norm = _head_norm(heads)
        self._before_attention = _Norm(layer.input_layernorm)
        self._before_mlp = _Norm(layer.post_attention_layernorm)
        self._qkv = PackedLinear(heads.q_proj, heads.k_proj, heads.v_proj)
        self._out = PackedLinear(heads.o_proj)
        self._gate_and_up = GatedLinear(mlp.gate_proj, mlp.up_proj)
        self._down = PackedLinear(mlp.down_proj)
        for linear in (heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj):
            _let_go(linear)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            _let_go(linear)

    def run(
        self, hidden: torch.Tensor, step: _Step, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden` `[padded rows, hidden]`, of which the step's are the first; new ones of that
        shape. With `kept` only these rows, padded too: of the last layer nobody needs others, so
        they end with their keys and values."""
        attended = self._attention.attend_packed(
            self._index,
            self._qkv(self._before_attention(hidden))[: step.rows],
            step.rotary,
            scaling=self._scaling,
            window=self.window,
            head_norm=self._head_norm,
        )
        if kept is not None:
            padded = padded_rows(kept.shape[0], hidden.dtype)
            attended, hidden = attended[kept], _pad(hidden[kept], padded)
        hidden = self._out.plus(_pad(attended, hidden.shape[0]), hidden)
        return self._down.plus(self._gate_and_up(self._before_mlp(hidden)), hidden)


def _window(family: Family, layer: Any, config: Any) -> int:
    """Tokens that a layer's attention sees; 0: all. Mistral's modules look it up in the
    configuration at each call, Qwen's keep it, and Llama has none."""
    if family.name == "mistral":
        return config.sliding_window or 0
    return getattr(layer.self_attn, "sliding_window", None) or 0


def _head_norm(heads: Any) -> HeadNorm | None:
    """Qwen 3 normalises each head's query and key."""
    query: Any = getattr(heads, "q_norm", None)
    if query is None:
        return None
    return HeadNorm(query.weight.detach(), heads.k_norm.weight.detach(), query.variance_epsilon)


def _pad(rows: torch.Tensor, count: int) -> torch.Tensor:
    """With rows of zeros behind, so that there are `count`."""
    missing = count - rows.shape[0]
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _let_go(linear: nn.Linear) -> None:
    """Frees the memory of weights that were copied; whoever computes with them now fails."""
    linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
