"""TEE, the two-stage efficient feature extractor of MiniVLM: trunk -> BiFPN -> RPN -> static proposals -> box head.

Everything has a static shape: `num_candidates` anchors (or `candidates_per_level`), `num_proposals` boxes into the box
head, `num_regions` out. Training may change the input's size from step to step (`resize`); the weights fit any.
Source: MiniVLM (arXiv 2012.06946), section 3; the matrix forms of NMS and RoIAlign are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgevlm.artifacts import PreprocessSpec, TEEConfig
from edgevlm.errors import RecipeError
from edgevlm.models.backbone import create_trunk
from edgevlm.models.bifpn import create_bifpn, resize_bifpn
from edgevlm.models.regions import (
    anchor_grid,
    assign_levels,
    cluster_nms,
    decode_boxes,
    pool_gathered,
    roi_align,
    survivors_first,
    take,
)
from edgevlm.models.rpn import RPNHead

BOX_SCALE = (10.0, 5.0)  # the box head's deltas are small; Faster R-CNN's weights bring them to unit scale
RPN_NMS_IOU = 0.7
REGION_NMS_IOU = 0.5
CLASS_EMBEDDING, ATTRIBUTE_HIDDEN = 256, 512
"""Widths of MiniVLM's attribute head."""
GATHER_ABOVE = 48
"""In training, maps with more rows than this are pooled by gathering: the matrix form grows with the cube of the side."""


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


class AttributeHead(nn.Module):
    """MiniVLM's: two layers of its own on the pooled box, the class as an embedding beside them, one more, attributes."""

    def __init__(self, in_features: int, hidden: int, num_embedded: int, num_attributes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.embedding = nn.Embedding(num_embedded, CLASS_EMBEDDING)
        self.fc3 = nn.Linear(hidden + CLASS_EMBEDDING, ATTRIBUTE_HIDDEN)
        self.out = nn.Linear(ATTRIBUTE_HIDDEN, num_attributes)

    def forward(self, pooled_BRF: Tensor, classes_BR: Tensor) -> Tensor:
        features = self.fc2(self.fc1(pooled_BRF).relu()).relu()
        known = self.embedding(classes_BR.clamp(max=self.embedding.num_embeddings - 1))
        return self.out(self.fc3(torch.cat([features, known], dim=-1)).relu())


class BoxHead(nn.Module):
    """Two fully connected layers, then classes, class-agnostic boxes and attributes."""

    def __init__(self, in_features: int, hidden: int, num_classes: int, num_attributes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.classes = nn.Linear(hidden, num_classes + 1)
        self.deltas = nn.Linear(hidden, 4)
        self.attributes = nn.Linear(hidden, num_attributes) if num_attributes else None
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, pooled_BRF: Tensor) -> BoxOutput:
        features = self.fc2(self.fc1(pooled_BRF).relu()).relu()
        attributes = self.attributes(features) if self.attributes is not None else features[..., :0]
        return BoxOutput(features, self.classes(features), self.deltas(features), attributes)


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
        self.region_dim = config.region_dim(num_classes, num_attributes)
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
        own = config.attribute_head == "own" and num_attributes > 0
        in_features = config.fpn_channels * config.roi_size**2
        self.box_head = BoxHead(in_features, config.roi_hidden, num_classes, 0 if own else num_attributes)
        num_embedded = config.attribute_classes or num_classes
        self.attribute_head = (
            AttributeHead(in_features, config.roi_hidden, num_embedded, num_attributes) if own else None
        )
        for name in ("anchors", "limits"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._set_anchors(image_size)
        self.register_buffer("grid", grid_boxes(config), persistent=False)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("inv_std", 1 / (torch.tensor(spec.std).view(1, 3, 1, 1) * 255), persistent=False)

    def _set_anchors(self, image_size: tuple[int, int]) -> None:
        self.image_size, device = image_size, self.anchors.device
        anchors, self.level_counts = anchor_grid(
            image_size, self.strides, self.config.anchor_scale, self.config.anchor_ratios
        )
        self.anchors = anchors.to(device)
        self.limits = torch.tensor([image_size[1], image_size[0]] * 2, dtype=torch.float32, device=device)

    def resize(self, image_size: tuple[int, int]) -> None:
        """Fit anchors, limits and upsampling to inputs of another size (rows, columns), until the next call."""
        if image_size != self.image_size:
            self._set_anchors(image_size)
            resize_bifpn(self.bifpn, image_size, self.config.first_level, self.config.num_levels)

    def dense(self, pixels_BCHW: Tensor) -> Dense:
        """Trunk, BiFPN and RPN."""
        maps = self.bifpn(list(self.trunk((pixels_BCHW - self.mean) * self.inv_std)))
        return Dense(maps, *self.rpn(maps))

    def propose(self, dense: Dense, num_proposals: int | None = None) -> Tensor:
        """The best boxes by objectness after NMS, (B, P, 4) pixels; rows beyond the survivors are the suppressed."""
        num_proposals = num_proposals or self.config.num_proposals
        if self.config.candidates_per_level is not None:
            return self._propose_per_level(dense, self.config.candidates_per_level, num_proposals)
        index = torch.topk(dense.objectness_BM, self.config.num_candidates, dim=1).indices
        boxes = self._anchor_boxes(dense, index)
        keep = cluster_nms(boxes, RPN_NMS_IOU)
        return take(boxes, survivors_first(keep, num_proposals))

    def _propose_per_level(self, dense: Dense, num_candidates: int, num_proposals: int) -> Tensor:
        """The paper's form: top-k and NMS on each level, then the survivors of all levels by falling objectness.

        Boxes of two levels differ by an octave and so hardly overlap by 0.7; five matrices of 1000 x 1000 pairs at
        most are a fifth of one of 5000 x 5000.
        """
        boxes, scores, keeps, start = [], [], [], 0
        for count in self.level_counts:
            level_BM = dense.objectness_BM[:, start : start + count]
            values, index = torch.topk(level_BM, min(num_candidates, count), dim=1)
            boxes.append(self._anchor_boxes(dense, index + start))
            scores.append(values)
            keeps.append(cluster_nms(boxes[-1], RPN_NMS_IOU))
            start += count
        scores_BK = torch.cat(scores, dim=1)
        order = torch.topk(scores_BK, scores_BK.shape[1], dim=1).indices
        first = survivors_first(take(torch.cat(keeps, dim=1), order), min(num_proposals, scores_BK.shape[1]))
        return take(torch.cat(boxes, dim=1), take(order, first))

    def _anchor_boxes(self, dense: Dense, index_BK: Tensor) -> Tensor:
        anchors = self.anchors.unsqueeze(0).expand(index_BK.shape[0], -1, -1)
        return decode_boxes(take(anchors, index_BK), take(dense.deltas_BM4, index_BK), self.limits)

    def box_features(
        self, maps: list[Tensor], boxes_BR4: Tensor, classes_BR: Tensor | None = None, *, attributes: bool = True
    ) -> BoxOutput:
        """Pool each box from its pyramid level and run the box head.

        Args:
            maps: of `dense`.
            boxes_BR4: pixels.
            classes_BR: what an attribute head of its own embeds; None = the best class of the box head.
            attributes: False leaves that head out, and its logits empty.
        """
        levels = assign_levels(boxes_BR4, self.strides, self.config.anchor_scale)
        if self.training and maps[0].shape[2] > GATHER_ABOVE:
            pooled = pool_gathered(maps, boxes_BR4, levels, self.strides, self.config.roi_size)
        else:
            pooled = sum(
                roi_align(x, boxes_BR4, stride, self.config.roi_size) * levels[..., i, None, None, None]
                for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True))
            )
        pooled_BRF = pooled.flatten(2)  # pyright: ignore
        output = self.box_head(pooled_BRF)
        if self.attribute_head is None or not attributes:
            return output
        if classes_BR is None:
            classes_BR = output.class_logits_BRC[..., :-1].argmax(-1)
        return output._replace(attribute_logits_BRA=self.attribute_head(pooled_BRF, classes_BR))

    def select(self, proposals_BP4: Tensor, output: BoxOutput, features_BPD: Tensor | None = None) -> Regions:
        """Refine the boxes, one class-agnostic NMS on the best class score, and the best `num_regions`.

        `features_BPD`, of the same proposals, are handed over in place of the output's own: another extractor's view.
        """
        scores = torch.softmax(output.class_logits_BRC, dim=-1)[..., :-1].amax(-1)
        boxes = decode_boxes(proposals_BP4, output.deltas_BR4, self.limits, BOX_SCALE)
        scores, index = torch.topk(scores, scores.shape[1], dim=1)
        features = self.region_features(output) if features_BPD is None else features_BPD
        boxes, features = take(boxes, index), take(features, index)
        keep = cluster_nms(boxes, REGION_NMS_IOU)
        index = survivors_first(keep, self.config.num_regions)
        return Regions(take(features, index), take(boxes, index) / self.limits, take(scores * keep, index))

    def region_features(self, output: BoxOutput) -> Tensor:
        """What describes a box to the fusion, (B, R, D): the box head's hidden layer, or the tags that it sees."""
        if self.config.region_feature == "hidden":
            return output.features_BRD
        classes = torch.softmax(output.class_logits_BRC, dim=-1)
        return torch.cat([classes, torch.sigmoid(output.attribute_logits_BRA)], dim=-1)

    def fixed_boxes(self, count: int) -> Tensor:
        """The grid's boxes in pixels for `count` images, (B, R, 4)."""
        return (self.grid * self.limits).unsqueeze(0).expand(count, -1, -1)

    def grid_regions(self, maps: list[Tensor]) -> Regions:
        """Features of the fixed boxes, all with score 1, the whole image first."""
        boxes_BR4 = self.fixed_boxes(maps[0].shape[0])
        features_BRD = self.region_features(self.box_features(maps, boxes_BR4))
        return Regions(features_BRD, boxes_BR4 / self.limits, torch.ones_like(boxes_BR4[..., 0]))

    def forward(self, pixels_BCHW: Tensor) -> Regions:
        dense = self.dense(pixels_BCHW)
        if self.config.grid:
            return self.grid_regions(dense.maps)
        proposals = self.propose(dense)
        return self.select(proposals, self.box_features(dense.maps, proposals, attributes=False))
