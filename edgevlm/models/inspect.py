"""What a model costs, part by part: counted on the real modules, beside the published architecture's formulas.

A MAC is one multiply-add; biases, norms and activations are not counted. The formulas are arithmetic on MiniVLM's
architecture (EfficientNet trunk, BiFPN, 1x1 RPN, box and attribute head), so that a module that is built wrong shows.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgevlm.artifacts import FusionConfig, PreprocessSpec, TEEConfig
from edgevlm.models.fusion import Fusion
from edgevlm.models.geometry import box_numbers
from edgevlm.models.stacks import stacks_of
from edgevlm.models.tee import ATTRIBUTE_HIDDEN, CLASS_EMBEDDING, TEE

SCALES = {
    "efficientnet_b0": (1.0, 1.0, True),
    "efficientnet_b1": (1.0, 1.1, True),
    "efficientnet_b2": (1.1, 1.2, True),
    "efficientnet_b3": (1.2, 1.4, True),
    "efficientnet_lite0": (1.0, 1.0, False),
}
"""Trunk -> multiplier of width and of depth, and whether it has squeeze-excite."""
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
"""EfficientNet's stages: expansion, channels out, repeats, stride, kernel."""


class Cost(NamedTuple):
    """Of one image (extractor) or one question (fusion)."""

    parameters: int
    macs: int

    def __add__(self, other: "Cost") -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Cost(self.parameters + other.parameters, self.macs + other.macs)


class Part(NamedTuple):
    """One row of the table."""

    name: str
    counted: Cost
    formula: Cost | None
    """None where no formula is published for this form."""


def count(module: nn.Module, *inputs: object) -> Cost:
    """Parameters of a module, and the multiply-adds of its convolutions and matrix products for these inputs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return Cost(sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2)


def inspect_tee(tee: TEE, *, pruned: bool = False) -> list[Part]:
    """The extractor at the size it was built for; the formulas say nothing of a `pruned` one.

    The last part has no parameters and no formula: RoIAlign and NMS as the matrix products that every target runs.
    Published figures leave them out.
    """
    config, training = tee.config, tee.training
    tee.eval()
    pixels = torch.zeros(1, 3, *tee.image_size)
    num_classes = tee.box_head.classes.out_features - 1
    with torch.no_grad():
        maps_in = list(tee.trunk(pixels))
        channels = [x.shape[1] for x in maps_in]  # now, for the BiFPN appends to the list it is given
        dense = tee.dense(pixels)
        proposals = tee.propose(dense)
        num_rois = proposals.shape[1]
        pooled = torch.zeros(1, num_rois, tee.box_head.fc1.in_features)
        with FlopCounterMode(display=False) as counter:
            tee.box_features(tee.dense(pixels).maps, tee.propose(dense), attributes=False)
    trunk, bifpn = count(tee.trunk, pixels), count(tee.bifpn, maps_in)
    rpn, boxes = count(tee.rpn, dense.maps), count(tee.box_head, pooled)
    static = Cost(0, counter.get_total_flops() // 2 - trunk.macs - bifpn.macs - rpn.macs - boxes.macs)
    attributes, attribute_formula = Cost(0, 0), Cost(0, 0)
    if tee.attribute_head is not None:
        attributes = count(tee.attribute_head, pooled, torch.zeros(1, num_rois, dtype=torch.long))
        embedded, out = tee.attribute_head.embedding.num_embeddings, tee.attribute_head.out.out_features
        attribute_formula = attribute_cost(config, embedded, out, num_rois)
    elif tee.box_head.attributes is not None:
        attributes = count(tee.box_head.attributes, torch.zeros(1, num_rois, tee.box_head.attributes.in_features))
        boxes = Cost(boxes.parameters - attributes.parameters, boxes.macs - attributes.macs)
        attribute_formula = attributes
    areas = [x.shape[2] * x.shape[3] for x in dense.maps]
    num_anchors = len(config.anchor_ratios)
    tee.train(training)
    parts = [
        Part(f"trunk {config.trunk}", trunk, trunk_cost(config.trunk, tee.image_size)),
        Part("BiFPN", bifpn, bifpn_cost(config.fpn_channels, config.fpn_repeats, channels, areas)),
        Part("RPN", rpn, rpn_cost(config.fpn_channels, num_anchors, areas)),
        Part(f"box head, {num_rois} boxes", boxes, box_cost(config, num_classes, num_rois)),
        Part("attribute head", attributes, attribute_formula),
        Part("RoIAlign and NMS as matrices", static, None),
    ]
    return [part._replace(formula=None) for part in parts] if pruned else parts


def inspect_fusion(fusion: Fusion, num_words: int, num_regions: int) -> Part:
    """The fusion on `num_words` words and `num_regions` regions, none of them trimmed."""
    config, region_dim = fusion.config, fusion.region.in_features - box_numbers(fusion.config)
    inputs = (torch.zeros(1, num_regions, region_dim), torch.zeros(1, num_regions, 4), torch.ones(1, num_regions))
    training = fusion.training
    counted = count(fusion.eval(), *inputs, torch.ones(1, num_words, dtype=torch.int32))
    fusion.train(training)
    stacks = [f"{stack.depth(config)} {stack.name}" for stack in stacks_of(config)]
    form = f" of {', '.join(stacks)} layers" if config.has_encoders else ""
    name = f"fusion{form}, {num_words} words and {num_regions} regions"
    return Part(name, counted, fusion_cost(fusion, config, num_words, num_regions))


def build_tee(config: TEEConfig, height: int, width: int, num_classes: int, num_attributes: int) -> TEE:
    """An untrained extractor to count on."""
    return TEE(config, PreprocessSpec(height=height, width=width), num_classes, num_attributes)


# --- formulas ----------------------------------------------------------------------------------------------------


def trunk_cost(name: str, image_size: tuple[int, int]) -> Cost | None:
    """EfficientNet up to its last block, without the classifier; None for other trunks."""
    if name not in SCALES:
        return None
    width, depth, squeeze = SCALES[name]

    def area(stride: int) -> int:
        return math.ceil(image_size[0] / stride) * math.ceil(image_size[1] / stride)

    stride, c = 2, _rounded(32, width)
    total = Cost(27 * c + 2 * c, 27 * c * area(2))
    for expansion, channels, repeats, step, kernel in STAGES:
        out = _rounded(channels, width)
        for repeat in range(math.ceil(repeats * depth)):
            before, stride = area(stride), stride * (step if repeat == 0 else 1)
            m, q, n = expansion * c, max(1, c // 4), area(stride)
            parameters = (m * kernel**2 + 2 * m) + (m * out + 2 * out)
            macs = m * kernel**2 * n + m * out * n
            if expansion > 1:
                parameters, macs = parameters + c * m + 2 * m, macs + c * m * before
            if squeeze:
                parameters, macs = parameters + 2 * m * q + q + m, macs + 2 * m * q
            total, c = total + Cost(parameters, macs), out
    return total


def _rounded(channels: int, width: float) -> int:
    wanted = channels * width
    value = max(8, 8 * int((wanted + 4) // 8))
    return value + 8 if value < 0.9 * wanted else value


def bifpn_cost(w: int, cells: int, channels: list[int], areas: list[int]) -> Cost:
    """`channels` of the trunk's maps, `areas` of all levels, finest first.

    Each cell has a node per level on the way down and one on the way up: depthwise 3x3, pointwise, norm. In the first
    cell, every map of the trunk is projected to the width, those that both ways read twice; a first added level too.
    """
    levels, given = len(areas), len(channels)
    nodes = 2 * (levels - 1) * cells
    parameters = nodes * (9 * w + w * w + w + 2 * w)
    macs = cells * w * (9 + w) * (sum(areas[:-1]) + sum(areas[1:]))
    projections = list(zip(channels, areas, strict=False))
    projections += projections[1:] + (projections[-1:] if levels > given else [])
    projections = [(c, n) for c, n in projections if c != w]
    parameters += sum(w * c + 3 * w for c, _ in projections)
    macs += sum(w * c * n for c, n in projections)
    return Cost(parameters, macs)


def rpn_cost(w: int, num_anchors: int, areas: list[int]) -> Cost:
    """Two 1x1 convolutions per level, shared: one score and four deltas for each anchor."""
    return Cost(5 * num_anchors * (w + 1), 5 * num_anchors * w * sum(areas))


def box_cost(config: TEEConfig, num_classes: int, num_rois: int) -> Cost:
    """Two layers, classes and background, class-agnostic deltas."""
    d, pooled = config.roi_hidden, config.fpn_channels * config.roi_size**2
    weights = pooled * d + d * d + d * (num_classes + 1) + 4 * d
    return Cost(weights + 2 * d + num_classes + 1 + 4, weights * num_rois)


def attribute_cost(config: TEEConfig, num_embedded: int, num_attributes: int, num_rois: int) -> Cost:
    """Two layers, the class embedding, one layer on both, attributes."""
    d, pooled = config.roi_hidden, config.fpn_channels * config.roi_size**2
    weights = pooled * d + d * d + (d + CLASS_EMBEDDING) * ATTRIBUTE_HIDDEN + ATTRIBUTE_HIDDEN * num_attributes
    biases = 2 * d + ATTRIBUTE_HIDDEN + num_attributes
    return Cost(weights + biases + num_embedded * CLASS_EMBEDDING, weights * num_rois)


def fusion_cost(fusion: Fusion, config: FusionConfig, num_words: int, num_regions: int) -> Cost:
    """Embeddings, projection of the regions, layers (heads and neurons may differ), pooler.

    With two encoders: vision layers on the regions, text layers on the words, and cross-modal ones on the words, each with
    a second attention whose keys and values come from the regions.
    """
    d, region_dim = config.hidden, fusion.region.in_features
    tables = fusion.words.num_embeddings + fusion.positions.num_embeddings + fusion.types.num_embeddings
    parameters = tables * d + 2 * d + region_dim * d + d + 2 * d + d * d + d
    macs = num_regions * region_dim * d + d * d
    num_parts = len(config.parts)
    if num_parts:
        parameters += num_parts * d + 2 * d
    if config.box_encoding == "geometry":  # two products pick the corner and size of the part that a box is in
        macs += num_regions * 2 * 2 * max(1, num_parts)
    num_image = num_parts + num_regions
    lengths = {"fusion": num_words + num_image, "vision": num_image, "text": num_words, "cross": num_words}
    for stack in stacks_of(config):
        tokens = lengths[stack.name]
        for heads, ffn in zip(getattr(config, stack.heads), getattr(config, stack.ffn), strict=True):
            inner = heads * config.head_dim
            parameters += 4 * d * inner + 3 * inner + d + 2 * d * ffn + ffn + d + 4 * d
            macs += 4 * d * inner * tokens + 2 * tokens * tokens * inner + 2 * d * ffn * tokens
    for heads in config.cross_heads:
        inner = heads * config.head_dim
        parameters += 4 * d * inner + 3 * inner + d + 2 * d
        macs += 2 * d * inner * (num_words + num_image) + 2 * num_words * num_image * inner
    return Cost(parameters, macs)


def total(parts: list[Part]) -> Cost:
    """The sum of what was counted."""
    result = Cost(0, 0)
    for part in parts:
        result = result + part.counted
    return result
