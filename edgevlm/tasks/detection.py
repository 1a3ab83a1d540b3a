"""Detection: what trains the extractor. Matching, losses and finding boxes; `average_precision.py` has the metric."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.models.regions import box_iou, cluster_nms, decode_boxes, encode_boxes, take
from edgevlm.models.tee import BOX_SCALE, REGION_NMS_IOU, TEE
from edgevlm.tasks.average_precision import Detected
from edgevlm.tasks.average_precision import mean_average_precision as mean_average_precision  # its older place

RPN_POSITIVE, RPN_NEGATIVE, ROI_POSITIVE = 0.5, 0.3, 0.5
NEGATIVES_PER_POSITIVE = 3
MIN_NEGATIVES = 16
ANCHORS_SAMPLED, MAX_POSITIVE_SHARE = 256, 0.5
"""Of an image, where background is sampled at random (Faster R-CNN)."""
RANDOM_COPIES = 3
"""Shifted copies of each true box beside the proposals then; otherwise one."""
MIN_CLAIM = 0.1
"""Overlap an object needs to claim its best anchors."""
MIN_SCORE, MAX_SCORED, MAX_DETECTIONS = 0.01, 1000, 100
"""Which pairs of box and class are evaluated: above this score, so many before NMS, so many after (COCO counts 100)."""
JITTER = 0.1
"""Ground-truth boxes join the proposals, shifted by up to this share of their size, so that early steps have positives."""


class Truth(NamedTuple):
    """Padded ground truth of a batch; `classes` is -1 where there is no object."""

    boxes_BG4: Tensor
    classes_BG: Tensor
    attributes_BGA: Tensor


class DetectionObjective(nn.Module):
    """RPN objectness and smooth-L1, class cross-entropy, class-agnostic smooth-L1, attribute BCE (MiniVLM, section 3).

    Args:
        tee: what is trained.
        sampling: which background counts. `hardest`: the worst anchors, three to each on an object, and all boxes: quick
            where background is plain. `random`: 256 anchors of an image, and three boxes to each on an object, drawn
            anew each time: for photos, where the worst are often objects that nobody annotated.
        box_beta: where the box head's smooth L1 turns from square to linear.
    """

    def __init__(self, tee: TEE, sampling: Literal["hardest", "random"] = "hardest", box_beta: float = 1.0) -> None:
        super().__init__()
        self.tee, self.sampling, self.box_beta = tee, sampling, box_beta

    def forward(
        self, pixels_BHWC: Tensor, boxes_BG4: Tensor, classes_BG: Tensor, attributes_BGA: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        truth = Truth(boxes_BG4, classes_BG, attributes_BGA)
        self.tee.resize((pixels_BHWC.shape[1], pixels_BHWC.shape[2]))
        dense = self.tee.dense(pixels_BHWC.permute(0, 3, 1, 2).float())
        objectness, anchor_boxes = self._rpn_loss(dense.objectness_BM, dense.deltas_BM4, truth)
        with torch.no_grad():
            proposals = torch.cat([self.tee.propose(dense), self._jittered(truth.boxes_BG4)], dim=1)
        classes, boxes, attributes = self._roi_loss(proposals, dense.maps, truth)
        loss = objectness + anchor_boxes + classes + boxes + attributes
        logs = {"objectness": objectness, "classes": classes, "boxes": boxes, "attributes": attributes}
        return loss, {name: value.detach() for name, value in logs.items()}

    def _jittered(self, boxes_BG4: Tensor) -> Tensor:
        if self.sampling == "random":
            boxes_BG4 = boxes_BG4.repeat(1, RANDOM_COPIES, 1)
        sizes = (boxes_BG4[..., 2:] - boxes_BG4[..., :2]).repeat(1, 1, 2)
        noise = (torch.rand_like(boxes_BG4) * 2 - 1) * JITTER * sizes
        return torch.minimum((boxes_BG4 + noise).clamp(min=0.0), self.tee.limits)

    def _rpn_loss(self, logits_BM: Tensor, deltas_BM4: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        anchors = self.tee.anchors
        best_BM, claimed_BM, matched_BM4 = match_anchors(anchors, truth.boxes_BG4, truth.classes_BG >= 0)
        positive = (best_BM >= RPN_POSITIVE) | claimed_BM
        negative = (best_BM < RPN_NEGATIVE) & ~positive
        losses = F.binary_cross_entropy_with_logits(logits_BM, positive.to(logits_BM.dtype), reduction="none")
        if self.sampling == "random":
            most = torch.full_like(positive[:, 0], int(ANCHORS_SAMPLED * MAX_POSITIVE_SHARE), dtype=torch.long)
            positive = largest(torch.rand_like(losses), positive, most)
            used = positive | largest(torch.rand_like(losses), negative, ANCHORS_SAMPLED - positive.sum(1))
        else:
            num_negatives = (positive.sum(1) * NEGATIVES_PER_POSITIVE).clamp(min=MIN_NEGATIVES)
            used = positive | largest(losses.detach(), negative, num_negatives)
        objectness = (losses * used).sum() / used.sum().clamp(min=1)
        rows = positive.nonzero(as_tuple=True)
        targets = encode_boxes(anchors[rows[1]], matched_BM4[rows])
        errors = F.smooth_l1_loss(deltas_BM4[rows], targets, beta=1 / 9, reduction="none").sum(-1)
        # Added up in place, as over all anchors: the sum's rounding then does not depend on how many are positive.
        table_BM = torch.zeros_like(logits_BM).index_put(rows, errors)
        return objectness, table_BM.sum() / positive.sum().clamp(min=1)

    def _roi_loss(self, proposals_BP4: Tensor, maps: list[Tensor], truth: Truth) -> tuple[Tensor, Tensor, Tensor]:
        iou_BPG = box_iou(proposals_BP4, truth.boxes_BG4) * (truth.classes_BG >= 0).unsqueeze(1)
        best_BP, match_BP = iou_BPG.max(dim=2)
        positive = best_BP >= ROI_POSITIVE
        background = self.tee.box_head.classes.out_features - 1
        labels = torch.where(positive, truth.classes_BG.gather(1, match_BP), background)
        # An attribute head of its own learns from the true classes; where there is none, its output is not used.
        output = self.tee.box_features(maps, proposals_BP4, labels.clamp(max=background - 1))
        real = (proposals_BP4[..., 2:] - proposals_BP4[..., :2]).amin(-1) > 1.0  # not padding
        if self.sampling == "random":
            num_negatives = (positive.sum(1) * NEGATIVES_PER_POSITIVE).clamp(min=MIN_NEGATIVES)
            real = positive | largest(torch.rand_like(best_BP), real & ~positive, num_negatives)
        losses = F.cross_entropy(output.class_logits_BRC.transpose(1, 2), labels, reduction="none")
        classes = (losses * real).sum() / real.sum().clamp(min=1)
        count = positive.sum().clamp(min=1)
        matched = truth.boxes_BG4.gather(1, match_BP.unsqueeze(-1).expand(-1, -1, 4))
        targets = encode_boxes(proposals_BP4, matched, BOX_SCALE)
        errors = F.smooth_l1_loss(output.deltas_BR4, targets, beta=self.box_beta, reduction="none").sum(-1)
        boxes = (errors * positive).sum() / count
        tags = truth.attributes_BGA.gather(1, match_BP.unsqueeze(-1).expand(-1, -1, truth.attributes_BGA.shape[-1]))
        errors = F.binary_cross_entropy_with_logits(output.attribute_logits_BRA, tags, reduction="none").sum(-1)
        return classes, boxes, (errors * positive).sum() / count


def match_anchors(anchors_M4: Tensor, boxes_BG4: Tensor, real_BG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The object each anchor overlaps most, among the real ones of its image.

    Returns:
        That overlap (B, M), 0..1; whether an object claims the anchor (B, M), because no other overlaps it more, however
        little that is: small objects get positives too; and the box of the object (B, M, 4).
    """
    # One table for the objects there are: padded to the busiest image it would be most of a step.
    iou_NM = box_iou(boxes_BG4[real_BG][None], anchors_M4[None])[0]
    columns = [
        _best(iou_GM, boxes_G4[real_G]) if len(iou_GM) else _nothing(anchors_M4)
        for iou_GM, boxes_G4, real_G in zip(iou_NM.split(real_BG.sum(1).tolist()), boxes_BG4, real_BG, strict=True)
    ]
    best_BM, claimed_BM, matched_BM4 = (torch.stack(column) for column in zip(*columns, strict=True))
    return best_BM, claimed_BM, matched_BM4


def _best(iou_GM: Tensor, boxes_G4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best_M, match_M = iou_GM.max(dim=0)
    claimed = (iou_GM == iou_GM.amax(dim=1, keepdim=True)) & (iou_GM > MIN_CLAIM)
    return best_M, claimed.any(dim=0), boxes_G4[match_M]


def _nothing(anchors_M4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.zeros_like(anchors_M4[:, 0])
    return none, none.bool(), anchors_M4


def largest(values_BM: Tensor, allowed_BM: Tensor, count_B: Tensor) -> Tensor:
    """Mask (B, M) of the `count_B` largest non-negative values of each row among those allowed (all, if fewer)."""
    count_B = count_B.clamp(min=1, max=values_BM.shape[1])
    ranked = values_BM.masked_fill(~allowed_BM, -1.0)
    top = torch.topk(ranked, int(count_B.max()), dim=1).values
    return allowed_BM & (ranked >= top.gather(1, count_B.unsqueeze(1) - 1))


@torch.no_grad()
def detect(tee: TEE, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, P, 4) in pixels, class scores (B, P, C) and NMS survivors (B, P), all proposals, for evaluation."""
    boxes, scores = _refined(tee, pixels_BCHW)
    order = scores.amax(-1).argsort(1, descending=True)
    boxes, scores = take(boxes, order), take(scores, order)
    return boxes, scores, cluster_nms(boxes, REGION_NMS_IOU)


@torch.no_grad()
def detect_per_class(tee: TEE, pixels_BCHW: Tensor) -> list[Detected]:
    """COCO's protocol: NMS for each class by itself, and the 100 best of an image; a box may have several classes."""
    found = []
    for boxes_P4, scores_PC in zip(*_refined(tee, pixels_BCHW), strict=True):
        rows, classes = (scores_PC > MIN_SCORE).nonzero(as_tuple=True)
        order = scores_PC[rows, classes].argsort(descending=True)[:MAX_SCORED]
        rows, classes = rows[order], classes[order]
        boxes = boxes_P4[rows]
        # Classes are moved apart, so that no box overlaps one of another class.
        apart = boxes + (classes * tee.limits.max()).unsqueeze(-1)
        kept = cluster_nms(apart[None], REGION_NMS_IOU)[0].nonzero().squeeze(1)[:MAX_DETECTIONS]
        columns = (boxes[kept], classes[kept], scores_PC[rows[kept], classes[kept]])
        found.append(Detected(*(column.cpu().numpy() for column in columns)))
    return found


def _refined(tee: TEE, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    dense = tee.dense(pixels_BCHW)
    proposals = tee.propose(dense)
    output = tee.box_features(dense.maps, proposals, attributes=False)
    scores = torch.softmax(output.class_logits_BRC, dim=-1)[..., :-1]
    return decode_boxes(proposals, output.deltas_BR4, tee.limits, BOX_SCALE), scores
