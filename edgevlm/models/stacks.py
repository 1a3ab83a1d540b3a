"""The stacks of layers that a fusion consists of: one for a single stream, three for two encoders and what joins them."""

from typing import Literal, NamedTuple

from edgevlm.artifacts import FusionConfig

StackName = Literal["fusion", "vision", "text", "cross"]
Part = Literal["vision", "fusion", "vision encoder", "text encoder", "cross encoder"]
"""Of a model, as pruning tells them apart; `vision` is the extractor."""


class Stack(NamedTuple):
    """Layers of one kind, one after the other, and the fields of `FusionConfig` that describe them."""

    name: StackName
    part: Part
    module: str
    """Name in `Fusion`."""
    heads: str
    ffn: str
    cross_heads: str | None = None
    """Of attention to the other modality, where the layers have it."""

    def depth(self, config: FusionConfig) -> int:
        """How many layers."""
        return len(getattr(config, self.heads))


SINGLE_STREAM = (Stack("fusion", "fusion", "layers", "layer_heads", "layer_ffn"),)
TWO_ENCODERS = (
    Stack("vision", "vision encoder", "vision", "vision_heads", "vision_ffn"),
    Stack("text", "text encoder", "text", "text_heads", "text_ffn"),
    Stack("cross", "cross encoder", "layers", "layer_heads", "layer_ffn", "cross_heads"),
)


def stacks_of(config: FusionConfig) -> tuple[Stack, ...]:
    """The stacks of a fusion, from the image to the answer."""
    return TWO_ENCODERS if config.has_encoders else SINGLE_STREAM
