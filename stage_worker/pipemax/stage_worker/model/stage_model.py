"""One stage's part of a model, ready to run steps."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipemax.proto.errors import InvariantError
from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention.interface import StageAttention, Step
from pipemax.stage_worker.attention.probe import probe_plan
from pipemax.stage_worker.model import packed, row_kernels
from pipemax.stage_worker.model.fused import FusedLayers
from pipemax.stage_worker.model.inspect import ModelInfo


class StageModel:
    """Layers `[layers[0], layers[1])` of a model; made by `load_stage_model`.

    The first stage also embeds, the last also applies final norm and head.
    """

    def __init__(
        self,
        model: Any,
        attention: StageAttention,
        info: ModelInfo,
        layers: tuple[int, int],
        tensors_read: tuple[str, ...],
        rebuild: Callable[[], FusedLayers | None] | None = None,
    ) -> None:
        """`rebuild`: makes `model` faster, or takes over from its layers and head, once its
        weights are counted."""
        self._model = model
        self._base = model.base_model
        self._attention = attention
        self.layers = layers
        """[first, last + 1) of the model's layers."""
        self.is_first = layers[0] == 0
        self.is_last = layers[1] == info.num_layers
        self.hidden_size = info.hidden_size
        self.vocab_size = info.vocab_size
        self.tensors_read = tensors_read
        """The checkpoint's tensors that this stage read, under the checkpoint's names."""
        self.weights_bytes: int = sum(
            {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values()
        )
        """Memory of this stage's weights; a tied tensor counts once."""
        self._is_packed = rebuild is not None
        self._fused = None if rebuild is None else rebuild()

    @property
    def fused(self) -> FusedLayers | None:
        """What computes the layers and the head; None: the modules themselves."""
        return self._fused

    @property
    def geometry(self) -> BlockGeometry:
        return self._attention.geometry

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV."""
        return self._attention.dtype

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the model computes rather than reads, such as rotary frequencies."""
        buffers: Iterator[tuple[str, torch.Tensor]] = self._model.named_buffers()
        return buffers

    def bind_pool(self, pool: torch.Tensor) -> None:
        """Uses `pool`, `[num_blocks, layers, 2, block_size, kv_heads, head_dim]`, contiguous, of
        this stage's dtype. Whoever else writes to it must not do so to a block in use."""
        self._attention.bind_pool(pool)

    @property
    def attention(self) -> StageAttention:
        """Where steps are prepared for this model."""
        return self._attention

    def warm_up(self) -> None:
        """Runs a decode and a prompt of two tokens through block 0, so that the first real step
        compiles nothing. Call it after `bind_pool`, before the pool holds
        anything."""
        self._attention.warm_up()
        if self._is_packed:
            packed.warm_up(self.dtype)
        if self._fused is not None:
            row_kernels.warm_up(self.dtype)
        step = self._attention.prepare(probe_plan())
        shape = (step.num_tokens, self.hidden_size)
        hidden = None
        if not self.is_first:
            hidden = torch.zeros(shape, dtype=self.dtype, device=step.token_ids.device)
        self.forward(step, hidden)

    def check_tokens(self, step: Step) -> None:
        """Raises InvariantError for a token id that the first stage's vocabulary does not have.
        `forward` does it too; a replay of what `forward` did does not."""
        if self.is_first and step.max_token >= self.vocab_size:
            raise InvariantError(f"token {step.max_token} of a vocabulary of {self.vocab_size}")

    @torch.inference_mode()
    def forward(self, batch: Step, hidden: torch.Tensor | None) -> torch.Tensor:
        """One step. `hidden` is `[T, hidden_size]` from the stage before, None on the first.

        Returns `[T, hidden_size]` in this stage's dtype, or from the last stage float32 logits
        `[len(batch.sample_rows), vocab_size]`.
        """
        inputs = self._inputs(batch, hidden)
        self._attention.begin(batch)
        if self._fused is not None:
            return self._run_fused(self._fused, batch, inputs)
        arguments = {**inputs, "position_ids": batch.position_ids, "use_cache": False}
        if not self.is_last or batch.sample_rows.shape[0] == 0:
            out: torch.Tensor = self._base(**arguments).last_hidden_state[0]
            return out if not self.is_last else out.new_empty((0, self.vocab_size)).float()
        # The model's own head: it knows about logit scaling and soft-capping.
        logits: torch.Tensor = self._model(**arguments, logits_to_keep=batch.sample_rows).logits
        return logits[0].float()

    def _run_fused(
        self, fused: FusedLayers, batch: Step, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        if self.is_first:
            hidden: torch.Tensor = self._base.get_input_embeddings()(inputs["input_ids"])[0]
        else:
            hidden = inputs["inputs_embeds"][0]
        if not self.is_last:
            return fused.run(hidden, batch.position_ids)
        return fused.logits(fused.run(hidden, batch.position_ids, batch.sample_rows)).float()

    def _inputs(self, batch: Step, hidden: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if self.is_first:
            self.check_tokens(batch)
            return {"input_ids": batch.token_ids}
        if hidden is None or hidden.shape != (batch.num_tokens, self.hidden_size):
            shape = None if hidden is None else tuple(hidden.shape)
            raise InvariantError(
                f"activations of shape {shape} for {batch.num_tokens} tokens of {self.hidden_size}"
            )
        return {"inputs_embeds": hidden[None]}
