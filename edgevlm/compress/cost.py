"""What a model costs, as a sum of terms that shrink with the groups they belong to: parameters and multiply-adds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig
from edgevlm.models.attention import Attention
from edgevlm.models.geometry import box_numbers
from edgevlm.models.groups import Group
from edgevlm.models.stacks import stacks_of
from edgevlm.models.trimmer import FULL, Trim
from edgevlm.models.vlm import VLM

Measure = Literal["parameters", "macs"]


class Cost(Protocol):
    """What a model costs in some unit, for any number of members in its groups."""

    @property
    def whole(self) -> float:
        """With all members."""
        ...

    def of(self, members: Mapping[str, Any]) -> Any:
        """The cost with so many members (numbers or tensors) left in each group; those not named are whole."""
        ...

    def only(self, names: Iterable[str]) -> "Cost":
        """Of whatever any of these groups has a part in."""
        ...

    def show(self, value: float) -> str:
        """A cost in words."""
        ...


class Term(NamedTuple):
    """A part of the cost, in proportion to the members that each of `groups` has left."""

    cost: float
    groups: tuple[str, ...]


class CostModel(NamedTuple):
    """The cost of a model for any number of members in its groups; exact for whole members."""

    terms: tuple[Term, ...]
    sizes: dict[str, int]

    def of(self, members: Mapping[str, Any]) -> Any:
        """The cost with so many members (numbers or tensors) left in each group; those not named are whole."""
        total: Any = 0.0
        for term in self.terms:
            share: Any = term.cost
            for name in term.groups:
                share = share * (members.get(name, self.sizes[name]) / self.sizes[name])
            total = total + share
        return total

    @property
    def whole(self) -> float:
        """With all members."""
        return sum(term.cost for term in self.terms)

    def only(self, names: Iterable[str]) -> "CostModel":
        """The terms in which any of these groups has a part."""
        chosen = set(names)
        return CostModel(tuple(term for term in self.terms if chosen & set(term.groups)), self.sizes)

    def show(self, value: float) -> str:
        """A cost in words."""
        return f"{value:,.0f}"


def cost_model(model: VLM, groups: Sequence[Group], measure: Measure, num_words: int) -> CostModel:
    """Parameters, or multiply-adds of one image and one question of `num_words` tokens, none of them trimmed.

    As in published figures, biases, norms and activations cost no multiply-adds, nor do RoIAlign and NMS. The word
    table and whatever else no group touches are terms without groups.
    """
    rows: dict[str, list[str]] = {}
    columns: dict[str, list[tuple[str, int]]] = {}
    for group in groups:
        for part in group.slices:
            if part.axis == "in":
                columns.setdefault(part.module, []).append((group.name, group.size * part.repeat))
            else:
                rows.setdefault(part.module, []).append(group.name)
    positions = _positions(model, num_words) if measure == "macs" else {}
    terms: list[Term] = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or (measure == "macs" and path not in positions):
            continue
        out = tuple(rows.get(path, ()))
        if not isinstance(module, nn.Linear | nn.Conv2d):
            if measure == "parameters":
                terms.append(Term(sum(p.numel() for p in own.values()), out))
            continue
        weight, factor = module.weight, positions.get(path, 1)
        if measure == "parameters" and module.bias is not None:
            terms.append(Term(module.bias.numel(), out))
        left = weight.shape[1]
        for name, width in columns.get(path, ()):
            terms.append(Term(factor * weight.numel() * width / weight.shape[1], (*out, name)))
            left -= width
        if left:
            terms.append(Term(factor * weight.numel() * left / weight.shape[1], out))
    if measure == "macs":
        heads = {point.module: group.name for group in groups for point in group.points if point.side == "input"}
        for path, module in model.named_modules():
            if isinstance(module, Attention):  # queries x keys, and maps x values
                pairs = positions[f"{path}.query"] * positions[f"{path}.key"]
                known = (heads[f"{path}.output"],) if f"{path}.output" in heads else ()
                terms.append(Term(float(2 * pairs * module.num_heads * module.head_dim), known))
    return CostModel(tuple(terms), {group.name: group.size for group in groups})


@torch.no_grad()
def _positions(model: VLM, num_words: int) -> dict[str, int]:
    """How often one image and one question apply each convolution (per pixel of its map) and linear layer (per row)."""
    counts: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            width = output.shape[1] if output.dim() == 4 else output.shape[-1]
            counts[path] = counts.get(path, 0) + output.numel() // width

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    training = model.training
    model.eval()
    try:
        device = model.tee.anchors.device
        regions = model.encode(torch.zeros(1, 3, *model.tee.image_size, device=device))
        ids = torch.full((1, num_words), model.fusion.pad_id, dtype=torch.long, device=device)
        model.answer(regions, ids)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return counts


def prunable_parameters(config: FusionConfig) -> int:
    """By formula, the parameters of heads (query, key, value with biases, columns of the output) and FFN neurons."""
    head, neuron = 4 * config.hidden * config.head_dim + 3 * config.head_dim, 2 * config.hidden + 1
    heads = sum(sum(getattr(config, s.heads)) for s in stacks_of(config)) + sum(config.cross_heads)
    return heads * head + sum(sum(getattr(config, s.ffn)) for s in stacks_of(config)) * neuron


def fusion_macs(config: FusionConfig, num_words: int, num_regions: int, region_dim: int, trim: Trim = FULL) -> int:
    """Multiply-adds of one answer program: projection of the regions and all layers; norms, softmax and trimmers not counted."""
    num_words = min(num_words, trim.num_words or num_words)
    num_regions = min(num_regions, trim.num_regions or num_regions)
    words, regions = [num_words], [num_regions]
    for layer in range(len(config.layer_heads) - 1):
        place = config.trim.layers.index(layer) if config.trim and layer in config.trim.layers else None
        keeps_words = config.trim is not None and config.trim.words and trim.words
        words.append(min(words[-1], trim.words[place]) if place is not None and keeps_words else words[-1])
        regions.append(min(regions[-1], trim.regions[place]) if place is not None and trim.regions else regions[-1])
    return int(macs_of(config, region_dim, words, regions))


def macs_of(
    config: FusionConfig,
    region_dim: int,
    words: Sequence[Any],
    regions: Sequence[Any],
    heads: Mapping[int, Any] | None = None,
    image_heads: Mapping[int, Any] | None = None,
) -> Any:
    """The same for any numbers (or tensors) of words and regions that each layer works on, and of heads where not all work.

    With two encoders the layers are the cross-modal ones; the encoders work on all that the first layer has.
    """
    hidden, head_dim, num_parts = config.hidden, config.head_dim, len(config.parts)

    def layer(tokens: Any, num_heads: Any, ffn: int) -> Any:
        inner = num_heads * head_dim
        return 4 * tokens * hidden * inner + 2 * tokens * tokens * inner + 2 * tokens * hidden * ffn

    total = regions[0] * (region_dim + box_numbers(config)) * hidden
    for num_heads, ffn in zip(config.vision_heads, config.vision_ffn, strict=True):
        total = total + layer(num_parts + regions[0], num_heads, ffn)
    for num_heads, ffn in zip(config.text_heads, config.text_ffn, strict=True):
        total = total + layer(words[0], num_heads, ffn)
    for i, ffn in enumerate(config.layer_ffn):
        num_heads, image = (heads or {}).get(i, config.layer_heads[i]), num_parts + regions[i]
        total = total + layer(words[i] if config.has_encoders else words[i] + image, num_heads, ffn)
        if config.has_encoders:  # queries and output of the words, keys and values of the image
            inner = (image_heads or {}).get(i, config.cross_heads[i]) * head_dim
            total = total + 2 * (words[i] + image) * hidden * inner + 2 * words[i] * image * inner
    return total
