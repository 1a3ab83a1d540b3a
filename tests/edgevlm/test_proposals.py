"""What passes through the filters stays itself: proposals, features, attributes; at any size, in either form of pooling."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.artifacts import PreprocessSpec, TEEConfig
from edgevlm.models.regions import assign_levels, cluster_nms, decode_boxes, pool_gathered, roi_align
from edgevlm.models.registry import TEES
from edgevlm.models.tee import BOX_SCALE, REGION_NMS_IOU, RPN_NMS_IOU, TEE, BoxOutput, Dense
from edgevlm.tasks.detection import DetectionObjective, detect_per_class, largest
from tests.edgevlm.tiny import SPEC


def tiny_tee(spec: PreprocessSpec = SPEC, num_attributes: int = 2, **changes: Any) -> TEE:
    torch.manual_seed(0)
    config: TEEConfig = TEES["test-tee"].model_copy(update=changes)
    return TEE(config, spec, 3, num_attributes).eval()


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Overlap of one box with many."""
    low, high = np.maximum(a[:2], b[:, :2]), np.minimum(a[2:], b[:, 2:])
    inter = np.prod(np.clip(high - low, 0, None), axis=1)
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[:, 2:] - b[:, :2], axis=1) - inter)


def greedy(boxes: np.ndarray, threshold: float) -> np.ndarray:
    """Rows that textbook NMS keeps of boxes in order of falling score."""
    keep = np.ones(len(boxes), bool)
    for row in range(len(boxes)):
        if keep[row]:
            keep[row + 1 :] &= iou(boxes[row], boxes[row + 1 :]) <= threshold
    return keep


def random_dense(tee: TEE, seed: int, batch: int = 2) -> Dense:
    """RPN outputs with distinct scores and small shifts."""
    generator = torch.Generator().manual_seed(seed)
    count = len(tee.anchors)
    scores = torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)]).float() / count
    return Dense([], scores, torch.randn(batch, count, 4, generator=generator) * 0.2)


@pytest.mark.parametrize("seed", range(5))
def test_proposals_per_level_are_the_papers(seed: int) -> None:
    """Top-k per level, NMS per level, then the best of all levels: against a loop."""
    tee = tiny_tee(candidates_per_level=20)
    dense = random_dense(tee, seed)
    proposals = tee.propose(dense)
    for b in range(2):
        survivors: list[tuple[float, np.ndarray]] = []
        start = 0
        for count in tee.level_counts:
            rows = np.arange(start, start + count)
            scores = dense.objectness_BM[b, start : start + count].numpy()
            rows, scores = rows[np.argsort(-scores)][:20], np.sort(scores)[::-1][:20]
            boxes = decode_boxes(tee.anchors[rows], dense.deltas_BM4[b, rows], tee.limits).numpy()
            keep = greedy(boxes, RPN_NMS_IOU)
            survivors += list(zip(scores[keep], boxes[keep], strict=True))
            start += count
        expected = [box for _, box in sorted(survivors, key=lambda pair: -pair[0])][: tee.config.num_proposals]
        np.testing.assert_allclose(proposals[b].numpy(), np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("per_level", [None, 20])
def test_each_proposal_is_an_anchor_moved_by_its_own_deltas(per_level: int | None) -> None:
    tee = tiny_tee(candidates_per_level=per_level)
    dense = random_dense(tee, 7)
    everything = decode_boxes(tee.anchors.expand(2, -1, -1), dense.deltas_BM4, tee.limits)
    for b, boxes in enumerate(tee.propose(dense)):
        assert (boxes[:, None] - everything[b][None]).abs().amax(-1).amin(1).max() < 1e-3


@given(seed=st.integers(0, 10_000), count=st.integers(8, 60), scale=st.floats(0.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_feature_i_belongs_to_box_i(seed: int, count: int, scale: float) -> None:
    """Features that spell out their own box and score come out beside them, whatever NMS and the cut remove."""
    tee = tiny_tee()
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, count, 2, 2, generator=generator).sort(2).values * 64
    proposals = torch.stack([corners[..., 0, 0], corners[..., 0, 1], corners[..., 1, 0], corners[..., 1, 1]], -1)
    deltas = torch.randn(2, count, 4, generator=generator) * scale
    logits = torch.randn(2, count, 4, generator=generator) * 3
    boxes = decode_boxes(proposals, deltas, tee.limits, BOX_SCALE) / tee.limits
    scores = logits.softmax(-1)[..., :-1].amax(-1)
    features = torch.cat([boxes, scores.unsqueeze(-1)], dim=-1)
    regions = tee.select(proposals, BoxOutput(features, logits, deltas, features[..., :0]))
    torch.testing.assert_close(regions.features_BND[..., :4], regions.boxes_norm_BN4)
    valid = regions.scores_BN > 0
    torch.testing.assert_close(regions.features_BND[..., 4][valid], regions.scores_BN[valid])
    for b in range(2):  # and what scores is what textbook NMS keeps, best first
        order = scores[b].argsort(descending=True)
        kept = order[torch.from_numpy(greedy((boxes * tee.limits)[b, order].numpy(), REGION_NMS_IOU))]
        expected = scores[b, kept][: regions.scores_BN.shape[1]]
        torch.testing.assert_close(regions.scores_BN[b, : len(expected)], expected)


@pytest.mark.parametrize("count", [300, 1000])
def test_nms_of_many_boxes_is_greedy_nms(count: int) -> None:
    """At the paper's sizes the passes are enough: 1000 boxes in clusters, as an RPN gives them."""
    rng = np.random.default_rng(count)
    centres = rng.uniform(0, 500, (40, 2))[rng.integers(40, size=count)] + rng.normal(0, 6, (count, 2))
    sizes = rng.uniform(20, 60, (count, 2))
    boxes = np.hstack([centres - sizes / 2, centres + sizes / 2]).astype(np.float32)
    keep = cluster_nms(torch.from_numpy(boxes)[None], RPN_NMS_IOU)[0].numpy() > 0
    assert 0.05 < keep.mean() < 0.95
    assert np.array_equal(keep, greedy(boxes, RPN_NMS_IOU))


def test_gathered_pooling_is_the_matrix_form() -> None:
    """Values and gradients in float64, to rounding."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2, 3, n, n + 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (40, 20, 10)
    ]
    corners = torch.rand(2, 50, 2, 2, generator=generator, dtype=torch.float64).sort(2).values.reshape(2, 50, 4)
    boxes = corners * torch.tensor([43 * 4, 40 * 4] * 2)
    strides = [4, 8, 16]
    levels = assign_levels(boxes, strides, 4.0)
    assert (levels.sum((0, 1)) > 5).all()
    matrix = torch.stack([roi_align(m, boxes, s, 4) * levels[..., i, None, None, None] for i, (m, s) in enumerate(zip(maps, strides, strict=True))]).sum(0)  # fmt: skip
    gathered = pool_gathered(maps, boxes, levels, strides, 4)
    torch.testing.assert_close(gathered, matrix)
    weights = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), maps) for x in (matrix, gathered)), strict=True):
        torch.testing.assert_close(a, b)


SIZES = [(64, 64), (96, 64), (160, 224), (72, 88)]


@pytest.mark.parametrize("size", SIZES)
def test_a_resized_extractor_is_one_built_for_that_size(size: tuple[int, int]) -> None:
    built = tiny_tee(SPEC.model_copy(update={"height": size[0], "width": size[1]}))
    resized = tiny_tee()
    resized.load_state_dict(built.state_dict())
    resized.resize(size)
    assert torch.equal(resized.anchors, built.anchors)
    assert torch.equal(resized.limits, built.limits)
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        for a, b in zip(built(pixels), resized(pixels), strict=True):
            assert torch.equal(a, b)


def test_anchors_of_any_size_cover_the_image_alike() -> None:
    """Every cell of every level has its ratios, centred on the cell; nothing depends on the size but their number."""
    tee = tiny_tee()
    for height, width in SIZES:
        tee.resize((height, width))
        centres = (tee.anchors[:, :2] + tee.anchors[:, 2:]) / 2
        start = 0
        for stride, count in zip(tee.strides, tee.level_counts, strict=True):
            rows, columns = -(-height // stride), -(-width // stride)
            assert count == rows * columns * 3
            level = centres[start : start + count].reshape(rows, columns, 3, 2)
            assert torch.allclose(level[0, 0], torch.full((3, 2), stride / 2))
            assert torch.allclose(level[-1, -1, 0], torch.tensor([columns - 0.5, rows - 0.5]) * stride)
            areas = (tee.anchors[start : start + count, 2:] - tee.anchors[start : start + count, :2]).prod(1)
            torch.testing.assert_close(areas.sqrt(), torch.full((count,), tee.config.anchor_scale * stride))
            start += count
        assert start == len(tee.anchors)


def test_training_at_several_sizes_leaves_the_static_size_as_it_was() -> None:
    tee = tiny_tee()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        before = tee(pixels)
    objective = DetectionObjective(tee)
    for height, width in SIZES:
        truth = (torch.tensor([[[5.0, 5, 40, 40]]]), torch.tensor([[1]]), torch.zeros(1, 1, 2))
        with torch.no_grad():
            loss, _ = objective(torch.zeros(1, height, width, 3, dtype=torch.uint8), *truth)
        assert loss.isfinite()
        assert tee.image_size == (height, width)
    tee.resize((64, 64))
    with torch.no_grad():
        for a, b in zip(before, tee(pixels), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sampling", ["hardest", "random"])
@pytest.mark.parametrize("head", ["linear", "own"])
def test_every_parameter_learns(sampling: str, head: str) -> None:
    """Each loss reaches its own head and all of them the trunk; an image without objects is no trouble."""
    tee = tiny_tee(attribute_head=head, candidates_per_level=20).train()
    boxes = torch.tensor([[[5.0, 5, 40, 40], [30, 30, 50, 60]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    classes = torch.tensor([[0, 2], [-1, -1]])
    pixels = torch.randint(0, 255, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    objective = DetectionObjective(tee, sampling)  # pyright: ignore[reportArgumentType]
    loss, _ = objective(pixels, boxes, classes, torch.ones(2, 2, 2))
    loss.backward()
    silent = [name for name, p in tee.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The fusion weights of the BiFPN pass through a ReLU, and a level without a box on it has no gradient of its own.
    assert not [name for name in silent if not name.startswith("bifpn")], silent
    empty, _ = objective(pixels, boxes * 0, torch.full((2, 2), -1), torch.zeros(2, 2, 2))
    assert empty.isfinite()


def test_the_own_attribute_head_knows_the_class() -> None:
    """Attributes depend on the class that is given, on the best class if none is; classes beyond the table share a row."""
    tee = tiny_tee(attribute_head="own", attribute_classes=2)
    maps = tee.dense(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).maps
    boxes = torch.tensor([[[4.0, 4, 40, 40], [10, 20, 60, 50]]])

    def attributes(classes: Tensor | None) -> Tensor:
        return tee.box_features(maps, boxes, classes).attribute_logits_BRA

    one, two, three = (attributes(torch.full((1, 2), label)) for label in range(3))
    assert not torch.allclose(one, two)
    assert torch.equal(two, three)
    best = tee.box_features(maps, boxes).class_logits_BRC[..., :-1].argmax(-1)
    assert torch.equal(attributes(None), attributes(best))
    assert tee.box_features(maps, boxes, attributes=False).attribute_logits_BRA.shape == (1, 2, 0)


def test_an_extractor_without_attributes_or_config_fields_is_as_before() -> None:
    assert tiny_tee(num_attributes=0).box_head.attributes is None
    names = set(tiny_tee().state_dict())
    assert {"box_head.attributes.weight", "box_head.classes.weight", "rpn.objectness.weight"} <= names
    assert not {name for name in names if name.startswith("attribute_head")}


@given(seed=st.integers(0, 1000), count=st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_largest_takes_the_largest_allowed(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(1, 10, generator=generator)
    allowed = torch.rand(1, 10, generator=generator) < 0.6
    mask = largest(values, allowed, torch.tensor([count]))[0]
    candidates = sorted((float(values[0, i]), i) for i in range(10) if allowed[0, i])[::-1]
    assert set(mask.nonzero().flatten().tolist()) == {i for _, i in candidates[: max(1, count)]}


def test_detections_per_class() -> None:
    """A box may be reported for two classes; of one class, what overlaps a better box is gone; best first."""
    tee = tiny_tee()
    tee.box_head.classes.bias.data = torch.tensor([2.0, 2.0, -9.0, 0.0])
    (found,) = detect_per_class(tee, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255)
    assert {0, 1} <= set(found.classes.tolist())
    assert (np.diff(found.scores) <= 0).all()
    for label in set(found.classes.tolist()):
        boxes = found.boxes[found.classes == label]
        assert greedy(boxes, REGION_NMS_IOU).all()


@pytest.mark.parametrize("changes", [{"candidates_per_level": 20}, {"attribute_head": "own"}])
def test_every_form_traces_in_static_shapes(changes: dict[str, Any]) -> None:
    """What the targets export is the program that `torch.export` sees: the same regions, none of them data-dependent."""
    tee = tiny_tee(**changes)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    program = torch.export.export(tee, (pixels,))
    for a, b in zip(program.module()(pixels), tee(pixels), strict=True):
        torch.testing.assert_close(a, b)
