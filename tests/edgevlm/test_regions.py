"""The matrix forms of NMS, RoIAlign and nearest resizing against plain implementations of their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.models.bifpn import NearestResize
from edgevlm.models.regions import box_iou, cluster_nms, decode_boxes, encode_boxes, roi_align, survivors_first


def random_boxes(count: int, seed: int, size: float = 100.0, spread: float = 40.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, size, (count, 2))
    return torch.tensor(np.hstack([corners, corners + rng.uniform(2, spread, (count, 2))]), dtype=torch.float32)


def plain_iou(a, b) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def greedy_nms(boxes, threshold: float) -> list[float]:
    """The textbook loop on boxes in order of falling score."""
    kept: list[int] = []
    for i, box in enumerate(boxes):
        if all(plain_iou(boxes[j], box) <= threshold for j in kept):
            kept.append(i)
    return [float(i in kept) for i in range(len(boxes))]


def test_iou_is_the_definition() -> None:
    a, b = random_boxes(20, 0), random_boxes(30, 1)
    matrix = box_iou(a[None], b[None])[0]
    expected = [[plain_iou(x, y) for y in b.tolist()] for x in a.tolist()]
    assert torch.allclose(matrix, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("count", "spread"), [(96, 40.0), (32, 90.0), (96, 12.0)])
def test_nms_is_greedy_nms(seed: int, count: int, spread: float) -> None:
    boxes = random_boxes(count, seed, spread=spread)
    for threshold in (0.5, 0.7):
        assert cluster_nms(boxes[None], threshold)[0].tolist() == greedy_nms(boxes.tolist(), threshold)


def test_nms_on_a_chain_needs_as_many_passes_as_the_chain_is_long() -> None:
    """Each box suppresses the next one only: greedy keeps every second, and t passes get t links right."""
    boxes = torch.tensor([[4.0 * i, 0, 4.0 * i + 10, 10] for i in range(9)])  # neighbours overlap by 6/14
    expected = greedy_nms(boxes.tolist(), 0.4)
    assert expected == [1.0, 0.0] * 4 + [1.0]
    assert cluster_nms(boxes[None], 0.4)[0].tolist() == expected
    assert cluster_nms(boxes[None], 0.4, passes=2)[0].tolist() != expected


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
@settings(max_examples=100, deadline=None)
def test_survivors_come_first_and_in_order(keep: list[bool], data) -> None:
    num = data.draw(st.integers(1, len(keep)))
    index = survivors_first(torch.tensor([keep], dtype=torch.float32), num)[0].tolist()
    expected = [i for i, k in enumerate(keep) if k] + [i for i, k in enumerate(keep) if not k]
    assert index == expected[:num]


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    """Value at a point in map coordinates, where cell (0, 0) is centred on (0, 0); edges hold beyond the border."""
    height, width = plane.shape
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    top = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
    return float(top * (1 - fy) + (plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx) * fy)


def plain_roi_align(plane: np.ndarray, box, stride: int, size: int, samples: int) -> np.ndarray:
    """Mask R-CNN's RoIAlign (aligned: half a cell off), sample by sample."""
    x1, y1, x2, y2 = (value / stride - 0.5 for value in box)
    out = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            values = [
                bilinear(
                    plane,
                    y1 + (y2 - y1) * (row + (i + 0.5) / samples) / size,
                    x1 + (x2 - x1) * (column + (j + 0.5) / samples) / size,
                )
                for i in range(samples)
                for j in range(samples)
            ]
            out[row, column] = np.mean(values)
    return out


@pytest.mark.parametrize(("height", "width", "stride", "samples"), [(8, 8, 8, 2), (16, 10, 4, 2), (5, 7, 16, 1)])
def test_roi_align_is_the_definition(height: int, width: int, stride: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, height, width, generator=generator)
    limit = torch.tensor([width, height] * 2) * float(stride)
    boxes = torch.rand(2, 5, 2, 2, generator=generator).sort(2).values.reshape(2, 5, 4) * limit
    boxes[0, 0] = torch.tensor([0.0, 0.0, *limit[:2].tolist()])  # the whole map
    boxes[0, 1] = torch.tensor([3.0, 3.0, 3.0, 3.0])  # no area
    boxes[1, 0] = torch.tensor([-5.0, -4.0, 2.0, 3.0])  # over the border
    pooled = roi_align(maps, boxes, stride, 4, samples).numpy()
    assert pooled.shape == (2, 5, 3, 4, 4) or pooled.shape == (2, 5, 4, 3, 4)
    for b in range(2):
        for r in range(5):
            for c in range(3):
                expected = plain_roi_align(maps[b, c].numpy(), boxes[b, r].tolist(), stride, 4, samples)
                assert np.allclose(pooled[b, r, c], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "target"), [((3, 3), (5, 5)), ((4, 4), (8, 8)), ((5, 3), (10, 7)), ((1, 2), (3, 5)), ((7, 7), (4, 4))]
)
def test_nearest_resize_is_pytorchs(source: tuple[int, int], target: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *source, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(maps, size=target, mode="nearest")
    assert torch.equal(NearestResize(source, target)(maps), expected)


def test_boxes_survive_coding() -> None:
    anchors, boxes = random_boxes(50, 0), random_boxes(50, 1)
    limits = torch.tensor([200.0] * 4)
    for scale in ((1.0, 1.0), (10.0, 5.0)):
        deltas = encode_boxes(anchors, boxes, scale)
        assert torch.allclose(decode_boxes(anchors, deltas, limits, scale), boxes, atol=1e-3)
