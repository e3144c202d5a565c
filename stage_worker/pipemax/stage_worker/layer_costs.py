"""What the parts of a model cost on one device: what `measure` finds out and the layer split is
made from. Imports no torch."""

import msgspec


class PartCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that a part adds to a step; none is negative."""

    fixed_s: float = 0.0
    request_s: float = 0.0
    """For each request that decodes."""
    context_s: float = 0.0
    """For each token of context that decoding requests read."""
    prompt_s: float = 0.0
    """For each prompt token, in chunks as long as can be."""

    def scaled(self, factor: float) -> "PartCost":
        return PartCost(
            fixed_s=factor * self.fixed_s,
            request_s=factor * self.request_s,
            context_s=factor * self.context_s,
            prompt_s=factor * self.prompt_s,
        )


class ModelCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Of a whole model on one device."""

    layers: tuple[PartCost, ...]
    layer_bytes: tuple[int, ...]
    """Weights, by layer."""
    embedding: PartCost
    embedding_bytes: int
    head: PartCost
    """Final norm, head and sampling."""
    head_bytes: int
    step: PartCost
    """What a step costs on any stage, whatever its layers."""

    def scaled(self, factor: float) -> "ModelCosts":
        """Times alone: on a device that others use as well."""
        return msgspec.structs.replace(
            self,
            layers=tuple(layer.scaled(factor) for layer in self.layers),
            embedding=self.embedding.scaled(factor),
            head=self.head.scaled(factor),
            step=self.step.scaled(factor),
        )
