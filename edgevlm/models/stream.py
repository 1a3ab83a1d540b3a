"""What goes through a fusion, from layer to layer, and what comes out of it."""

from dataclasses import dataclass, field

from torch import Tensor

from edgevlm.models.attention import Heads, Image
from edgevlm.models.stacks import StackName
from edgevlm.models.tokens import Tokens


@dataclass
class States:
    """What one stack of layers produced."""

    hidden_BTD: list[Tensor]
    """Its input, then each layer's output."""
    attention_BHTT: list[Tensor] = field(default_factory=list)
    cross_BHTS: list[Tensor] = field(default_factory=list)
    """Attention from words to the image's tokens; cross-modal layers only."""


@dataclass
class Trimming:
    """What went on behind one trimming layer."""

    layer: int
    cls_BD: Tensor
    words_BL: Tensor
    """1 for the words that go on; with gradients to the scores where tokens are masked."""
    regions_BN: Tensor
    """The same of regions, context tokens among them."""
    scores_BN: Tensor | None
    """Keep logits of the regions; None where nothing ranks them."""


@dataclass
class FusionOutput:
    """What the layers produced.

    T = tokens: words, then the parts of the image that the config names, then regions; with two encoders parts and regions
    in the vision encoder, words elsewhere.
    """

    pooled_BD: Tensor
    regions_BND: Tensor
    """Last hidden states of the region tokens that were kept; with two encoders, whose regions have not read the text, times
    the state of [CLS]."""
    looked_at_BN: Tensor
    """Attention that [CLS] pays to each region in the last layer, mean over heads; 0 for dropped regions."""
    stacks: dict[StackName, States]
    """Single stream: `fusion`. Two encoders: `vision`, `text` and `cross`."""
    trimmings: list[Trimming] = field(default_factory=list)
    """One per trimming layer that was passed."""
    heads: dict[int, Heads] = field(default_factory=dict)
    """Of the layers that trim heads."""

    @property
    def hidden_BTD(self) -> list[Tensor]:  # noqa: N802  (named as the fields are)
        """Of the last stack: its first tokens are the words in both forms."""
        return list(self.stacks.values())[-1].hidden_BTD

    @property
    def attention_BHTT(self) -> list[Tensor]:  # noqa: N802
        """Of the last stack."""
        return list(self.stacks.values())[-1].attention_BHTT


@dataclass
class Stream:
    """Words and regions between two layers."""

    words: Tokens
    regions: Tokens
    """Their states and the words' are brought up to date where tokens or heads are trimmed."""
    parts_BPD: Tensor | None
    num_regions: int
    """That were given."""
    num_hidden: int | None
    stacks: dict[StackName, States]
    x_BTD: Tensor = field(init=False)
    """What the next layer works on: words, parts and regions; with two encoders, words."""
    mask_B11T: Tensor = field(init=False)
    keep_BT: Tensor | None = None
    image: Image | None = None
    trimmings: list[Trimming] = field(default_factory=list)
    heads: dict[int, Heads] = field(default_factory=dict)
