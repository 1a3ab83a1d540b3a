"""Detection: what trains the extractor. Matching, losses and COCO mAP."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.models.regions import box_iou, cluster_nms, decode_boxes, encode_boxes, take
from edgevlm.models.tee import BOX_SCALE, REGION_NMS_IOU, TEE

RPN_POSITIVE, RPN_NEGATIVE, ROI_POSITIVE = 0.5, 0.3, 0.5
NEGATIVES_PER_POSITIVE = 3
MIN_NEGATIVES = 16
JITTER = 0.1
"""Ground-truth boxes join the proposals, shifted by up to this share of their size, so that early steps have positives."""


class Truth(NamedTuple):
    """Padded ground truth of a batch; `classes` is -1 where there is no object."""

    boxes_BG4: Tensor
    classes_BG: Tensor
    attributes_BGA: Tensor


class DetectionObjective(nn.Module):
    """RPN objectness and smooth-L1, class cross-entropy, class-agnostic smooth-L1, attribute BCE (MiniVLM, section 3)."""

    def __init__(self, tee: TEE, box_beta: float = 1.0) -> None:
        super().__init__()
        self.tee, self.box_beta = tee, box_beta

    def forward(
        self, pixels_BHWC: Tensor, boxes_BG4: Tensor, classes_BG: Tensor, attributes_BGA: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        truth = Truth(boxes_BG4, classes_BG, attributes_BGA)
        dense = self.tee.dense(pixels_BHWC.permute(0, 3, 1, 2).float())
        objectness, anchor_boxes = self._rpn_loss(dense.objectness_BM, dense.deltas_BM4, truth)
        with torch.no_grad():
            proposals = torch.cat([self.tee.propose(dense), self._jittered(truth.boxes_BG4)], dim=1)
        classes, boxes, attributes = self._roi_loss(proposals, dense.maps, truth)
        loss = objectness + anchor_boxes + classes + boxes + attributes
        logs = {"objectness": objectness, "classes": classes, "boxes": boxes, "attributes": attributes}
        return loss, {name: value.detach() for name, value in logs.items()}

    def _jittered(self, boxes_BG4: Tensor) -> Tensor:
        sizes = (boxes_BG4[..., 2:] - boxes_BG4[..., :2]).repeat(1, 1, 2)
        noise = (torch.rand_like(boxes_BG4) * 2 - 1) * JITTER * sizes
        return torch.minimum((boxes_BG4 + noise).clamp(min=0.0), self.tee.limits)

    def _rpn_loss(self, logits_BM: Tensor, deltas_BM4: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
        anchors = self.tee.anchors.unsqueeze(0).expand(logits_BM.shape[0], -1, -1)
        real_BG = truth.classes_BG >= 0
        iou_BMG = box_iou(anchors, truth.boxes_BG4) * real_BG.unsqueeze(1)
        best_BM, match_BM = iou_BMG.max(dim=2)
        # Each object also claims its best anchors, however small their overlap: small objects get positives too.
        claimed = (iou_BMG == iou_BMG.amax(dim=1, keepdim=True)) & (iou_BMG > 0.1)
        positive = (best_BM >= RPN_POSITIVE) | claimed.any(dim=2)
        negative = (best_BM < RPN_NEGATIVE) & ~positive
        losses = F.binary_cross_entropy_with_logits(logits_BM, positive.float(), reduction="none")
        # The hardest negatives of each image, a fixed ratio to its positives.
        num_negatives = (positive.sum(1) * NEGATIVES_PER_POSITIVE).clamp(min=MIN_NEGATIVES)
        ranked = losses.detach().masked_fill(~negative, -1.0)
        rank = ranked.argsort(1, descending=True).argsort(1)
        used = positive | (negative & (rank < num_negatives.unsqueeze(1)))
        objectness = (losses * used).sum() / used.sum().clamp(min=1)
        matched = truth.boxes_BG4.gather(1, match_BM.unsqueeze(-1).expand(-1, -1, 4))
        errors = F.smooth_l1_loss(deltas_BM4, encode_boxes(anchors, matched), beta=1 / 9, reduction="none").sum(-1)
        return objectness, (errors * positive).sum() / positive.sum().clamp(min=1)

    def _roi_loss(self, proposals_BP4: Tensor, maps: list[Tensor], truth: Truth) -> tuple[Tensor, Tensor, Tensor]:
        output = self.tee.box_features(maps, proposals_BP4)
        iou_BPG = box_iou(proposals_BP4, truth.boxes_BG4) * (truth.classes_BG >= 0).unsqueeze(1)
        best_BP, match_BP = iou_BPG.max(dim=2)
        positive = best_BP >= ROI_POSITIVE
        background = output.class_logits_BRC.shape[-1] - 1
        labels = torch.where(positive, truth.classes_BG.gather(1, match_BP), background)
        real = (proposals_BP4[..., 2:] - proposals_BP4[..., :2]).amin(-1) > 1.0  # not padding
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


@torch.no_grad()
def detect(tee: TEE, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, P, 4) in pixels, class scores (B, P, C) and NMS survivors (B, P), all proposals, for evaluation."""
    dense = tee.dense(pixels_BCHW)
    proposals = tee.propose(dense)
    output = tee.box_features(dense.maps, proposals)
    scores = torch.softmax(output.class_logits_BRC, dim=-1)[..., :-1]
    boxes = decode_boxes(proposals, output.deltas_BR4, tee.limits, BOX_SCALE)
    order = scores.amax(-1).argsort(1, descending=True)
    boxes, scores = take(boxes, order), take(scores, order)
    return boxes, scores, cluster_nms(boxes, REGION_NMS_IOU)


def mean_average_precision(
    truths: list[tuple[np.ndarray, np.ndarray]], detections: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """COCO mAP (0..1) by pycocotools.

    Args:
        truths: per image, boxes (n, 4) corners and classes (n,).
        detections: per image, boxes (m, 4), classes (m,) and scores (m,).
    """
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box: np.ndarray) -> list[float]:
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    annotations, results = [], []
    for image, (boxes, classes) in enumerate(truths):
        for box, label in zip(boxes, classes, strict=True):
            shape = xywh(box)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": int(label), "bbox": shape}
                | {"area": shape[2] * shape[3], "iscrowd": 0}
            )
    for image, (boxes, classes, scores) in enumerate(detections):
        for box, label, score in zip(boxes, classes, scores, strict=True):
            results.append({"image_id": image, "category_id": int(label), "bbox": xywh(box), "score": float(score)})
    if not results:
        return {"map": 0.0, "ap50": 0.0}
    categories = sorted({annotation["category_id"] for annotation in annotations})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {  # pyright: ignore (its stubs ask for fields that boxes do not have)
            "images": [{"id": i} for i in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": c, "name": str(c)} for c in categories],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")  # pyright: ignore (a list works as well as a path)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": float(evaluation.stats[0]), "ap50": float(evaluation.stats[1])}
