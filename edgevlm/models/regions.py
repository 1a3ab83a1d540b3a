"""Boxes in static shapes: coding, IoU, NMS and RoIAlign in forms that every converter maps exactly.

Boxes are (x1, y1, x2, y2) in pixels of the model's input unless a name ends in `_norm`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)  # as in Faster R-CNN: keeps exp() finite on untrained nets


def encode_boxes(anchors: Tensor, boxes: Tensor, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Deltas (dx, dy, dw, dh), (..., 4), that turn `anchors` into `boxes`; centres times scale[0], sizes times scale[1]."""
    sizes = (anchors[..., 2:] - anchors[..., :2]).clamp(min=1.0)
    centres = anchors[..., :2] + 0.5 * sizes
    box_sizes = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1.0)
    box_centres = boxes[..., :2] + 0.5 * box_sizes
    return torch.cat([(box_centres - centres) / sizes * scale[0], torch.log(box_sizes / sizes) * scale[1]], dim=-1)


def decode_boxes(anchors: Tensor, deltas: Tensor, limits: Tensor, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Inverse of `encode_boxes`, clipped to the image; `limits` is (width, height, width, height)."""
    sizes = (anchors[..., 2:] - anchors[..., :2]).clamp(min=1.0)
    centres = anchors[..., :2] + 0.5 * sizes + deltas[..., :2] * (1.0 / scale[0]) * sizes
    half = 0.5 * sizes * torch.exp((deltas[..., 2:] * (1.0 / scale[1])).clamp(max=MAX_LOG_SCALE))
    boxes = torch.cat([centres - half, centres + half], dim=-1)
    return torch.minimum(boxes.clamp(min=0.0), limits)


def box_iou(a_BN4: Tensor, b_BM4: Tensor) -> Tensor:
    """Intersection over union of every pair, (B, N, M)."""
    a, b = a_BN4.unsqueeze(2), b_BM4.unsqueeze(1)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0.0)
    inter = overlap[..., 0] * overlap[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    return inter / (area_a + area_b - inter).clamp(min=1e-6)


def cluster_nms(boxes_BN4: Tensor, iou_threshold: float, passes: int = 10) -> Tensor:
    """Which of the boxes, sorted by falling score, greedy NMS keeps: (B, N) of 0.0 / 1.0.

    Each pass lets the boxes still standing suppress later ones; after t passes the result equals greedy NMS for every
    chain of at most t suppressions, and it never changes once it repeats (Zheng et al., cluster-NMS). Matrix products
    only, so every runtime takes it.
    """
    iou = box_iou(boxes_BN4, boxes_BN4)
    suppresses = torch.triu((iou > iou_threshold).to(iou.dtype), diagonal=1)
    keep = torch.ones_like(boxes_BN4[..., 0])
    for _ in range(passes):
        keep = (torch.matmul(keep.unsqueeze(1), suppresses).squeeze(1) < 0.5).to(iou.dtype)
    return keep


def survivors_first(keep_BN: Tensor, num: int) -> Tensor:
    """Index (B, num) of the boxes kept, in their order, then of the suppressed, in theirs.

    The keys are distinct whole numbers. A top-k over `scores * keep` would have to choose among equal zeros, and every
    runtime chooses differently, so that a program with few survivors would not give the same regions everywhere.
    """
    count = keep_BN.shape[1]
    return torch.topk(
        keep_BN * count - torch.arange(count, dtype=keep_BN.dtype, device=keep_BN.device), num, dim=1
    ).indices


def take(values: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of `values` (B, N, D) or (B, N) at `index_BK`, so that everything about a box stays with that box."""
    if values.dim() == 2:
        return torch.gather(values, 1, index_BK)
    return torch.gather(values, 1, index_BK.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _bin_weights(low: Tensor, high: Tensor, length: int, bins: int, samples: int) -> Tensor:
    """Averaging weights (B, R, bins, length) of bilinear samples: hat functions centred on the sample points."""
    steps = (torch.arange(bins * samples, device=low.device, dtype=low.dtype) + 0.5) / (bins * samples)
    points = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps  # (B, R, bins * samples), map coordinates
    points = (points - 0.5).clamp(0.0, length - 1.0)  # aligned=True; beyond the border the edge value holds
    grid = torch.arange(length, device=low.device, dtype=low.dtype)
    hats = (1.0 - (points.unsqueeze(-1) - grid).abs()).clamp(min=0.0)
    return hats.unflatten(2, (bins, samples)).mean(3) if samples > 1 else hats


def roi_align(map_BCHW: Tensor, boxes_BR4: Tensor, stride: int, size: int, samples: int = 2) -> Tensor:
    """RoIAlign (aligned=True, `samples` points per bin and axis) as two matrix products; (B, R, C, size, size).

    Bilinear interpolation is separable, so pooling an axis is a product with a (bins, length) matrix of hat functions.
    """
    batch, channels, height, width = map_BCHW.shape
    scaled = boxes_BR4 / stride
    wx = _bin_weights(scaled[..., 0], scaled[..., 2], width, size, samples)
    wy = _bin_weights(scaled[..., 1], scaled[..., 3], height, size, samples)
    num_rois = boxes_BR4.shape[1]
    rows = torch.matmul(wy.flatten(1, 2), map_BCHW.permute(0, 2, 1, 3).reshape(batch, height, channels * width))
    rows = rows.reshape(batch, num_rois, size * channels, width)
    pooled = torch.matmul(rows, wx.transpose(2, 3))  # (B, R, size * C, size)
    return pooled.reshape(batch, num_rois, size, channels, size).transpose(2, 3)


def pool_gathered(
    maps: list[Tensor], boxes_BR4: Tensor, levels_BRL: Tensor, strides: list[int], size: int, samples: int = 2
) -> Tensor:
    """`roi_align` of each box on its own level only; (B, R, C, size, size).

    The same numbers from the few cells under a box instead of a product with the whole map: for training, where
    nothing has to be exported (`grid_sample` is what converters differ on).
    """
    batch, num_rois = boxes_BR4.shape[:2]
    steps = (torch.arange(size * samples, device=boxes_BR4.device) + 0.5) / (size * samples)
    corners, sizes = boxes_BR4[..., :2], boxes_BR4[..., 2:] - boxes_BR4[..., :2]
    points_BRSP = corners.unsqueeze(-1) + sizes.unsqueeze(-1) * steps  # (B, R, x and y, points), pixels
    xs = points_BRSP[:, :, 0].unsqueeze(2).expand(-1, -1, len(steps), -1)
    ys = points_BRSP[:, :, 1].unsqueeze(3).expand(-1, -1, -1, len(steps))
    pooled = maps[0].new_zeros(batch, num_rois, maps[0].shape[1], size, size)
    places, parts = [], []
    for i, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        for b, image_CHW in enumerate(x.unbind(0)):
            rows = torch.nonzero(levels_BRL[b, :, i]).squeeze(1)
            if not len(rows):
                continue
            scale_x, scale_y = 2.0 / (stride * x.shape[3]), 2.0 / (stride * x.shape[2])
            grid = torch.stack([xs[b, rows] * scale_x - 1.0, ys[b, rows] * scale_y - 1.0], dim=-1).to(x.dtype)
            values = F.grid_sample(
                image_CHW.unsqueeze(0), grid.flatten(0, 1).unsqueeze(0), padding_mode="border", align_corners=False
            )
            values = values[0].unflatten(1, (len(rows), len(steps))).transpose(0, 1)
            parts.append(F.avg_pool2d(values, samples) if samples > 1 else values)
            places.append(rows + b * num_rois)
    return pooled.flatten(0, 1).index_copy(0, torch.cat(places), torch.cat(parts)).unflatten(0, (batch, num_rois))


def assign_levels(boxes_BR4: Tensor, strides: list[int], canonical: float) -> Tensor:
    """One-hot level of each box, (B, R, L): the level whose stride x `canonical` is nearest to sqrt(area), in octaves."""
    sizes = (boxes_BR4[..., 2:] - boxes_BR4[..., :2]).clamp(min=1.0)
    octave = 0.5 * torch.log2(sizes[..., 0] * sizes[..., 1]) - math.log2(canonical)
    edges = [math.log2(stride) + 0.5 for stride in strides[:-1]]
    above = torch.stack([(octave >= edge).to(octave.dtype) for edge in edges], dim=-1)  # (B, R, L-1), falling 1..0
    ones, zeros = torch.ones_like(octave).unsqueeze(-1), torch.zeros_like(octave).unsqueeze(-1)
    return torch.cat([ones, above], dim=-1) - torch.cat([above, zeros], dim=-1)


def anchor_grid(
    image_size: tuple[int, int], strides: list[int], scale: float, ratios: tuple[float, ...]
) -> tuple[Tensor, list[int]]:
    """All anchors, (M, 4), level by level, row-major, ratios innermost; and the number per level."""
    anchors, counts = [], []
    for stride in strides:
        rows, columns = math.ceil(image_size[0] / stride), math.ceil(image_size[1] / stride)
        ys, xs = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres = torch.stack([xs, ys], dim=-1).reshape(-1, 1, 2) * stride
        sizes = torch.tensor([[math.sqrt(ratio), 1 / math.sqrt(ratio)] for ratio in ratios]) * scale * stride
        anchors.append(torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1).reshape(-1, 4))
        counts.append(rows * columns * len(ratios))
    return torch.cat(anchors), counts
