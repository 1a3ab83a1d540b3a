"""TEE, the two-stage efficient feature extractor of MiniVLM: trunk -> BiFPN -> RPN -> static proposals -> box head.

Everything has a static shape: `num_candidates` anchors, `num_proposals` boxes into the box head, `num_regions` out.
Source: MiniVLM (arXiv 2012.06946), section 3; the matrix forms of NMS and RoIAlign are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgevlm.artifacts import PreprocessSpec, TEEConfig
from edgevlm.errors import RecipeError
from edgevlm.models.backbone import create_trunk
from edgevlm.models.bifpn import create_bifpn
from edgevlm.models.regions import (
    anchor_grid,
    assign_levels,
    cluster_nms,
    decode_boxes,
    roi_align,
    survivors_first,
    take,
)
from edgevlm.models.rpn import RPNHead

BOX_SCALE = (10.0, 5.0)  # the box head's deltas are small; Faster R-CNN's weights bring them to unit scale
RPN_NMS_IOU = 0.7
REGION_NMS_IOU = 0.5


class Dense(NamedTuple):
    """Everything before the first top-k: comparable between runtimes element by element."""

    maps: list[Tensor]
    objectness_BM: Tensor
    deltas_BM4: Tensor


class BoxOutput(NamedTuple):
    """Box head outputs per box; index i of each tensor belongs to box i."""

    features_BRD: Tensor
    class_logits_BRC: Tensor
    """The last class is background."""
    deltas_BR4: Tensor
    attribute_logits_BRA: Tensor


class Regions(NamedTuple):
    """What the extractor hands to the fusion: `num_regions` rows, best score first."""

    features_BND: Tensor
    boxes_norm_BN4: Tensor
    """Corners divided by the input's width and height, 0..1."""
    scores_BN: Tensor
    """Probability of the best class; 0 for rows that NMS removed."""


class BoxHead(nn.Module):
    """Two fully connected layers, then classes, class-agnostic boxes and attributes."""

    def __init__(self, in_features: int, hidden: int, num_classes: int, num_attributes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.classes = nn.Linear(hidden, num_classes + 1)
        self.deltas = nn.Linear(hidden, 4)
        self.attributes = nn.Linear(hidden, num_attributes)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, pooled_BRF: Tensor) -> BoxOutput:
        features = self.fc2(self.fc1(pooled_BRF).relu()).relu()
        return BoxOutput(features, self.classes(features), self.deltas(features), self.attributes(features))


def grid_boxes(config: TEEConfig) -> Tensor:
    """Normalised corners of the fixed boxes, coarse before fine and row by row, (R, 4).

    Raises:
        RecipeError: `num_regions` is not their number.
    """
    boxes = [
        (x / side, y / side, (x + 1) / side, (y + 1) / side)
        for side in config.grid
        for y in range(side)
        for x in range(side)
    ]
    if boxes and len(boxes) != config.num_regions:
        raise RecipeError(
            f"The grid {list(config.grid)} has {len(boxes)} boxes, but tee.num_regions is {config.num_regions}",
            f"Set tee.num_regions to {len(boxes)}",
        )
    return torch.tensor(boxes).reshape(-1, 4)


class TEE(nn.Module):
    """Pixels to regions. Input: (B, 3, H, W) float, 0..255, RGB, already resized per PreprocessSpec."""

    anchors: Tensor
    limits: Tensor
    grid: Tensor
    mean: Tensor
    inv_std: Tensor

    def __init__(self, config: TEEConfig, spec: PreprocessSpec, num_classes: int, num_attributes: int) -> None:
        super().__init__()
        self.config = config
        self.strides = [2**level for level in range(config.first_level, config.first_level + config.num_levels)]
        image_size = (spec.height, spec.width)
        self.trunk = create_trunk(config.trunk, config.first_level, config.num_levels)
        self.bifpn = create_bifpn(
            self.trunk.feature_info.channels(),  # pyright: ignore
            image_size,
            config.first_level,
            config.num_levels,
            config.fpn_channels,
            config.fpn_repeats,
        )
        self.rpn = RPNHead(config.fpn_channels, len(config.anchor_ratios))
        self.box_head = BoxHead(
            config.fpn_channels * config.roi_size**2, config.roi_hidden, num_classes, num_attributes
        )
        anchors, _ = anchor_grid(image_size, self.strides, config.anchor_scale, config.anchor_ratios)
        width_height = torch.tensor([spec.width, spec.height] * 2, dtype=torch.float32)
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("limits", width_height, persistent=False)
        self.register_buffer("grid", grid_boxes(config), persistent=False)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("inv_std", 1 / (torch.tensor(spec.std).view(1, 3, 1, 1) * 255), persistent=False)

    def dense(self, pixels_BCHW: Tensor) -> Dense:
        """Trunk, BiFPN and RPN."""
        maps = self.bifpn(list(self.trunk((pixels_BCHW - self.mean) * self.inv_std)))
        return Dense(maps, *self.rpn(maps))

    def propose(self, dense: Dense, num_proposals: int | None = None) -> Tensor:
        """The best boxes by objectness after NMS, (B, P, 4) pixels; rows beyond the survivors are the suppressed."""
        index = torch.topk(dense.objectness_BM, self.config.num_candidates, dim=1).indices
        anchors = self.anchors.unsqueeze(0).expand(index.shape[0], -1, -1)
        boxes = decode_boxes(take(anchors, index), take(dense.deltas_BM4, index), self.limits)
        keep = cluster_nms(boxes, RPN_NMS_IOU)
        return take(boxes, survivors_first(keep, num_proposals or self.config.num_proposals))

    def box_features(self, maps: list[Tensor], boxes_BR4: Tensor) -> BoxOutput:
        """Pool each box from its pyramid level and run the box head."""
        levels = assign_levels(boxes_BR4, self.strides, self.config.anchor_scale)
        pooled = sum(
            roi_align(x, boxes_BR4, stride, self.config.roi_size) * levels[..., i, None, None, None]
            for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True))
        )
        return self.box_head(pooled.flatten(2))  # pyright: ignore

    def select(self, proposals_BP4: Tensor, output: BoxOutput) -> Regions:
        """Refine the boxes, one class-agnostic NMS on the best class score, and the best `num_regions`."""
        scores = torch.softmax(output.class_logits_BRC, dim=-1)[..., :-1].amax(-1)
        boxes = decode_boxes(proposals_BP4, output.deltas_BR4, self.limits, BOX_SCALE)
        scores, index = torch.topk(scores, scores.shape[1], dim=1)
        boxes, features = take(boxes, index), take(output.features_BRD, index)
        keep = cluster_nms(boxes, REGION_NMS_IOU)
        index = survivors_first(keep, self.config.num_regions)
        return Regions(take(features, index), take(boxes, index) / self.limits, take(scores * keep, index))

    def grid_regions(self, maps: list[Tensor]) -> Regions:
        """Features of the fixed boxes, all with score 1, the whole image first."""
        boxes_BR4 = (self.grid * self.limits).unsqueeze(0).expand(maps[0].shape[0], -1, -1)
        features_BRD = self.box_features(maps, boxes_BR4).features_BRD
        return Regions(features_BRD, boxes_BR4 / self.limits, torch.ones_like(boxes_BR4[..., 0]))

    def forward(self, pixels_BCHW: Tensor) -> Regions:
        dense = self.dense(pixels_BCHW)
        if self.config.grid:
            return self.grid_regions(dense.maps)
        proposals = self.propose(dense)
        return self.select(proposals, self.box_features(dense.maps, proposals))
